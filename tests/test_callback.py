"""GradTrace in a real Trainer: nothing changes in the training, and the trace says what happened."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_gradtrace import GradTrace, TopK, open_trace

VOCAB, LENGTH, N_SAMPLES = 17, 6, 23


class Sentences(Dataset):
    """Tokens and their successors; item i begins with token i."""

    def __init__(self, n: int = N_SAMPLES, as_dict: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(VOCAB, (n, LENGTH + 1), generator=generator)
        self.as_dict = as_dict

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int):
        x, y = self.tokens[i, :-1], self.tokens[i, 1:]
        return {"x": x, "y": y, "id": 1000 + i} if self.as_dict else (x, y)


class Stream(IterableDataset):
    def __iter__(self):
        data = Sentences()
        return (data[i] for i in range(len(data)))


class Model(pl.LightningModule):
    """A small language model with dropout."""

    def __init__(self, dropout: float = 0.2, rate: float = 0.5, momentum: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(VOCAB, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.encoder(self.embedding(tokens), mask, is_causal=True))

    def training_step(self, batch, batch_idx):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        return F.cross_entropy(self(x).flatten(0, 1), y.flatten())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        inner = list(self.encoder.parameters())
        outer = [*self.embedding.parameters(), *self.head.parameters()]
        groups = [{"params": inner, "lr": self.hparams.rate}, {"params": outer}]
        optimizer = torch.optim.SGD(groups, lr=0.3, momentum=self.hparams.momentum)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(model: pl.LightningModule, *callbacks: pl.Callback, loader: DataLoader | None = None, **options) -> pl.Trainer:
    loader = DataLoader(Sentences(), batch_size=5, shuffle=True) if loader is None else loader
    settings = {"max_epochs": 2, "gradient_clip_val": 0.3, **options}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # Lightning's advice on workers and loops
        warnings.filterwarnings("ignore", "You requested to overfit")
        trainer.fit(
            model, loader, DataLoader(Sentences(4), batch_size=2) if options.get("val_check_interval") else None
        )
    return trainer


def make(seed: int = 3, **settings) -> Model:
    pl.seed_everything(seed, verbose=False)
    return Model(**settings)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"val_check_interval": 2},
        {"gradient_clip_algorithm": "value", "gradient_clip_val": 0.01},
        {"gradient_clip_val": None},
        {"overfit_batches": 2},
        {"fast_dev_run": 3},
    ],
    ids=str,
)
def test_training_is_the_same_bit_for_bit_and_the_ledger_closes(options: dict, tmp_path: Path) -> None:
    plain = make()
    fit(plain, **options)
    traced = make()
    path = tmp_path / "a.zarr"
    records = [TopK(20), TopK(30, per="step")]
    fit(traced, GradTrace(path, records, ledger_every_n_steps=1, weights_every_n_steps=3), **options)
    for (name, a), (_, b) in zip(plain.named_parameters(), traced.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    trace = open_trace(path)
    assert trace.attrs["complete"]
    assert (trace.steps["residual"] < 1e-5).all()
    assert (trace.steps["sum_error"] < 1e-5).all()
    assert trace.verify().ok
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize(("precision", "bound"), [("bf16-mixed", 1e-2), ("64-true", 1e-12)])
def test_other_precisions_change_nothing_and_close_the_ledger(precision: str, bound: float, tmp_path: Path) -> None:
    """In bfloat16 autocast the layers round their gradients themselves; the shares are summed in single precision."""
    plain, path = make(), tmp_path / "a.zarr"
    fit(plain, precision=precision)
    traced = make()
    fit(traced, GradTrace(path, TopK(5), ledger_every_n_steps=1), precision=precision)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), traced.parameters(), strict=True))
    trace = open_trace(path)
    assert (trace.steps["residual"] < bound).all()
    assert trace.verify().ok


def test_selected_shifts_add_up_to_the_change_of_the_weights(tmp_path: Path) -> None:
    """With every entry kept, the shifts of a step add up to W_after - W_before, read off snapshots."""
    path = tmp_path / "a.zarr"
    model = make()
    names = [n for n, p in model.named_parameters() if p.dim() > 1 and "encoder" in n]
    n_entries = sum(p.numel() for n, p in model.named_parameters() if n in names)
    fit(model, GradTrace(path, TopK(n_entries), weights_every_n_steps=1))
    trace = open_trace(path)
    frame = trace.topk.frame()
    assert len(trace.weight_steps) == len(trace.steps) + 1
    for step in trace.steps.index:
        for name in names:
            part = frame[(frame["step"] == step) & (frame["param"] == name)]
            found = np.zeros(trace.weights(name, step).size)
            np.add.at(found, part["index"].to_numpy(), part["shift"].to_numpy())
            expected = (trace.weights(name, step + 1).astype(float) - trace.weights(name, step)).ravel()
            assert np.linalg.norm(found - expected) < 3e-5 * np.linalg.norm(expected)


def test_the_ledger_closes_for_adamw_and_its_shifts_are_selected_exactly(tmp_path: Path) -> None:
    """The denominators differ from weight to weight: selection must see them, not only the gradients."""

    class Adaptive(Model):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)

    everything, few = tmp_path / "everything.zarr", tmp_path / "few.zarr"
    for path, record in ((everything, TopK(96)), (few, TopK(10))):
        pl.seed_everything(3, verbose=False)
        fit(Adaptive(), GradTrace(path, record, params="encoder.layers.1.linear1.weight", ledger_every_n_steps=1))
    steps = open_trace(few).steps
    assert (steps["residual"] < 1e-5).all()
    dense = np.stack([block.shift.reshape(-1, 96) for block in open_trace(everything).topk.blocks()][:1])[0]
    order = np.sort(np.argsort(-np.abs(dense), axis=1, kind="stable")[:, :10], axis=1)
    found = next(iter(open_trace(few).topk.blocks()))
    np.testing.assert_array_equal(found.entry.reshape(-1, 10), order)


def test_gradients_are_recorded_when_asked_for(tmp_path: Path) -> None:
    shift, gradient = tmp_path / "shift.zarr", tmp_path / "gradient.zarr"
    for path, quantity in ((shift, "shift"), (gradient, "gradient")):
        # One group only, so that both quantities order the entries alike.
        callback = GradTrace(path, TopK(20), params="encoder.*weight", quantity=quantity, ledger_every_n_steps=1)
        fit(make(), callback)
    a, b = open_trace(shift), open_trace(gradient)
    assert (b.steps["residual"] < 1e-5).all()
    left, right = a.topk.frame(), b.topk.frame()
    np.testing.assert_array_equal(left["index"], right["index"])
    factor = (-a.steps["lr"] * a.steps["clip_factor"]).reindex(left["step"]).to_numpy()
    np.testing.assert_allclose(left["shift"], factor * right["shift"], rtol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_sample_ids_are_dataset_indices(workers: int, drop_last: bool, tmp_path: Path) -> None:
    seen = []

    class Watching(Model):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append(batch[0].clone())

    pl.seed_everything(3, verbose=False)
    data = Sentences()
    loader = DataLoader(data, batch_size=5, shuffle=True, num_workers=workers, drop_last=drop_last)
    path = tmp_path / "a.zarr"
    original = loader.batch_sampler
    fit(Watching(), GradTrace(path, TopK(5)), loader=loader, limit_train_batches=4)
    assert loader.batch_sampler is original
    trace = open_trace(path)
    occurrences = trace.occurrences
    for (_, rows), tokens in zip(occurrences.groupby("step"), seen, strict=True):
        np.testing.assert_array_equal(data.tokens[rows["sample_id"].tolist(), :-1], tokens)
        assert rows["slot"].tolist() == list(range(len(tokens)))
    ids = occurrences["sample_id"].unique()
    np.testing.assert_array_equal(trace.inputs(ids), data.tokens[ids.tolist(), :-1])


def test_ids_may_come_with_the_batch(tmp_path: Path) -> None:
    loader = DataLoader(Sentences(as_dict=True), batch_size=5)
    for sample_ids in ("id", lambda batch: batch["id"].tolist()):
        path = tmp_path / "a.zarr"
        fit(make(), GradTrace(path, TopK(5), sample_ids=sample_ids, overwrite=True), loader=loader)
        assert open_trace(path).occurrences["sample_id"].tolist() == 2 * list(range(1000, 1000 + N_SAMPLES))


def test_without_indices_samples_are_numbered_in_order_of_arrival(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    with pytest.warns(UserWarning, match="a training dataloader without dataset indices: samples are numbered"):
        fit(make(), GradTrace(path, TopK(5)), loader=DataLoader(Stream(), batch_size=5))
    assert open_trace(path).occurrences["sample_id"].tolist() == list(range(2 * N_SAMPLES))


def test_every_n_steps_records_every_nth(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    fit(make(), GradTrace(path, TopK(5), every_n_steps=3, ledger_every_n_steps=5))
    trace = open_trace(path)
    assert trace.steps.index.tolist() == [0, 3, 6, 9]
    assert trace.steps["residual"].notna().tolist() == [True, False, True, False]


def test_a_batch_as_long_as_it_is_wide_is_read_off_the_data_set(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    data = Sentences()
    fit(make(), GradTrace(path, TopK(5)), loader=DataLoader(data, batch_size=LENGTH, shuffle=True))
    trace = open_trace(path)
    np.testing.assert_array_equal(trace.inputs(np.arange(N_SAMPLES)), data.tokens[:, :-1])


def test_the_probe_leaves_no_trace_in_the_model(tmp_path: Path) -> None:
    """T = B needs the probe, which runs `training_step` again: metrics, logs, buffers and modes must not notice."""

    class Counting(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.logged = 0

        def training_step(self, batch, batch_idx):
            self.calls += 1
            self.logged += 1
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    pl.seed_everything(3, verbose=False)
    model = Counting()
    loader = DataLoader(Sentences(), batch_size=LENGTH, drop_last=True)
    trainer = fit(model, GradTrace(tmp_path / "a.zarr", TopK(5)), loader=loader)
    assert model.calls == model.logged == trainer.global_step == 6
    assert model.training
    assert "loss" in trainer.callback_metrics


def test_a_run_that_fails_leaves_a_readable_trace_and_nothing_behind(tmp_path: Path) -> None:
    class Failing(Model):
        def training_step(self, batch, batch_idx):
            if self.global_step == 4:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    path = tmp_path / "a.zarr"
    loader = DataLoader(Sentences(), batch_size=5)
    original = loader.batch_sampler
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(Failing(), GradTrace(path, TopK(5)), loader=loader)
    trace = open_trace(path)
    assert not trace.attrs["complete"]
    assert "out of luck" in trace.attrs["end_reason"]
    assert trace.steps.index.tolist() == [0, 1, 2, 3]
    assert loader.batch_sampler is original
    assert not _get_current_function_mode_stack()


def test_one_callback_serves_two_fits(tmp_path: Path) -> None:
    callback = GradTrace(tmp_path / "a.zarr", TopK(5), overwrite=True)
    fit(make(), callback)
    first = open_trace(tmp_path / "a.zarr").topk.frame()
    fit(make(), callback)
    second = open_trace(tmp_path / "a.zarr").topk.frame()
    np.testing.assert_array_equal(first["index"], second["index"])


def test_attributes_say_where_the_trace_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    fit(make(), GradTrace(path, TopK(5), config={"note": "mine", "rate": 0.5}))
    attrs = open_trace(path).attrs
    assert attrs["model"]["class"].endswith("Model")
    assert attrs["optimizer"][0]["class"] == "torch.optim.sgd.SGD"
    assert [group["lr"] for group in attrs["optimizer"][0]["groups"]] == [0.5, 0.3]
    assert attrs["config"]["user"] == {"note": "mine", "rate": 0.5}
    assert attrs["config"]["hparams"]["dropout"] == 0.2
    assert attrs["config"]["trainer"]["gradient_clip_val"] == 0.3
    assert attrs["versions"]["torch"]
    trace = open_trace(path)
    assert [c for c in trace.steps.columns if c.startswith("lr")] == ["lr", "lr_1"]

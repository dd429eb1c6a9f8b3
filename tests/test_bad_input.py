"""Bad input gives one clear error, or a documented behaviour, and nothing already written is lost."""

from __future__ import annotations

import random
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradtrace import GradTrace, TopK, open_trace
from lightning_gradtrace.capture.parameters import select_parameters
from lightning_gradtrace.capture.placing.placement import UnattributableError
from tests.test_callback import Model, Sentences, fit, make


class Unused(Model):
    """Has a layer that the loss never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)


def test_tracked_parameters_that_are_never_used(tmp_path: Path) -> None:
    with pytest.raises(UnattributableError, match=r"none of the tracked parameters \(`unused.weight`\) took part"):
        fit(Unused(), GradTrace(tmp_path / "a.zarr", TopK(3), params="unused.weight"))


def test_some_tracked_parameters_that_are_never_used_are_named_and_have_shifts_of_zero(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    names = ["unused.weight", "encoder.layers.0.linear1.weight"]
    with pytest.warns(UserWarning, match="GradTrace: `unused.weight` took no part in the loss of the first captured"):
        fit(Unused(), GradTrace(path, TopK(105), params=names))
    frame = open_trace(path).topk.frame()
    unused = frame[frame["param"] == "unused.weight"]
    assert len(unused) == 9 * 2 * len(Sentences())
    assert (unused["shift"] == 0).all()


def test_a_loss_that_needs_no_gradient(tmp_path: Path) -> None:
    class Detached(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach()

    with pytest.raises(ValueError, match="the loss needs no gradient: `training_step` returned a tensor that no"):
        fit(Detached(), GradTrace(tmp_path / "a.zarr", TopK(3)))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning says it once per process
def test_a_step_without_a_loss_is_left_out(tmp_path: Path) -> None:
    class Skipping(Model):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    path = tmp_path / "a.zarr"
    model = Skipping()
    fit(model, GradTrace(path, TopK(3)), loader=DataLoader(Sentences(), batch_size=5))
    trace = open_trace(path)
    assert 5 not in trace.occurrences["sample_id"].tolist()  # the second batch has samples 5 to 9
    assert trace.verify().ok


def test_a_filter_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`params='decoder.\*'` matches no parameter of `Model`. It has `emb"):
        fit(make(), GradTrace(tmp_path / "a.zarr", TopK(3), params="decoder.*"))
    assert not (tmp_path / "a.zarr").exists()


class _Strings(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> str:
        return "text"


def test_a_batch_without_samples(tmp_path: Path) -> None:
    callback = GradTrace(tmp_path / "a.zarr", TopK(3), sample_ids=lambda batch: np.arange(2))
    with pytest.raises(ValueError, match=r"the batch has no tensors \(a `list`\), and 2 sample ids are known"):
        fit(make(), callback, loader=DataLoader(_Strings(), batch_size=2))


def test_a_collate_function_that_drops_samples(tmp_path: Path) -> None:
    def collate(items):
        return torch.utils.data.default_collate(items[:-1])

    with pytest.raises(ValueError, match="5 sample ids are known for it, but no tensor has 5 entries along"):
        fit(make(), GradTrace(tmp_path / "a.zarr", TopK(3)), loader=DataLoader(Sentences(), 5, collate_fn=collate))


def test_sample_ids_by_a_key_that_the_batch_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`sample_ids='id'` names a key of the batch, but the batch has a `list`"):
        fit(make(), GradTrace(tmp_path / "a.zarr", TopK(3), sample_ids="id"))


def test_sample_ids_that_are_no_whole_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample ids must be whole numbers, one per sample"):
        fit(make(), GradTrace(tmp_path / "a.zarr", TopK(3), sample_ids=lambda batch: np.linspace(0, 1, len(batch[0]))))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_kept_and_flagged(bad: float, tmp_path: Path) -> None:
    class Exploding(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * bad if self.global_step == 3 else loss

    path = tmp_path / "a.zarr"
    fit(Exploding(), GradTrace(path, TopK(5)), gradient_clip_val=None, max_epochs=1)
    trace = open_trace(path)
    assert (trace.steps["nonfinite"] > 0).tolist() == [False, False, False, True, True]
    frame = trace.topk.frame()
    assert not np.isfinite(frame[frame["step"] == 3]["shift"]).any()
    assert np.isfinite(frame[frame["step"] < 3]["shift"]).all()
    assert trace.verify().ok


def test_an_existing_trace_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    fit(make(), GradTrace(path, TopK(3)))
    before = open_trace(path).topk.frame()
    with pytest.raises(Exception, match="overwrite=True") as caught:
        fit(make(seed=4), GradTrace(path, TopK(3)))
    assert str(path) in str(caught.value)
    np.testing.assert_array_equal(open_trace(path).topk.frame()["shift"], before["shift"])
    fit(make(seed=4), GradTrace(path, TopK(3), overwrite=True))
    assert not np.array_equal(open_trace(path).topk.frame()["shift"], before["shift"])


def test_a_directory_that_is_no_trace_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(Exception, match="thesis"):
            fit(make(), GradTrace(precious, TopK(3), overwrite=overwrite))
        assert (precious / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantity": "weight"}, "`GradTrace(quantity='weight')`: expected one of `shift`, `gradient`"),
        ({"batch_axis": 2}, "`GradTrace(batch_axis=2)`: expected one of `auto`, `0`, `1`"),
        ({"engine": "magic"}, "`GradTrace(engine='magic')`: expected one of"),
        ({"on_error": "ignore"}, "`GradTrace(on_error='ignore')`: expected one of `raise`, `disable`"),
        ({"every_n_steps": 0}, "`GradTrace(every_n_steps=0)`: expected a whole number of steps, at least 1"),
        ({"ledger_every_n_steps": -1}, "`GradTrace(ledger_every_n_steps=-1)`: expected a whole number of steps"),
        ({"record": [TopK(3), TopK(4)]}, "expected at least one and no two that write the same arrays"),
        ({"record": []}, "expected at least one and no two that write the same arrays"),
    ],
    ids=str,
)
def test_arguments_out_of_range(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        GradTrace(tmp_path / "a.zarr", **arguments)
    assert message in str(caught.value)


def test_a_vocabulary_of_the_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`vocab` is a `int`, expected None, a list of strings, or an object with"):
        GradTrace(tmp_path / "a.zarr", vocab=3)


class _Coupled(Model):
    """Mixes the samples of the batch inside a use of a parameter: no axis of that use holds samples."""

    def training_step(self, batch, batch_idx):
        x = self.embedding(batch[0])
        mixed = self.encoder.layers[0].linear1(x.mean(0))
        return super().training_step(batch, batch_idx) + mixed.square().mean()


def test_a_parameter_whose_samples_can_not_be_told_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnattributableError, match=r"can't attribute `encoder.layers.0.linear1.weight`.*no axis holds"):
        fit(_Coupled(), GradTrace(tmp_path / "a.zarr", TopK(3)))


def test_training_goes_on_without_the_trace_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"

    class Later(_Coupled):
        def training_step(self, batch, batch_idx):
            if self.global_step < 3:
                return Model.training_step(self, batch, batch_idx)
            return super().training_step(batch, batch_idx)

    pl.seed_everything(3, verbose=False)
    plain = Later()
    fit(plain)
    pl.seed_everything(3, verbose=False)
    traced = Later()
    with pytest.warns(UserWarning, match="GradTrace stopped recording, training goes on: UnattributableError"):
        trainer = fit(traced, GradTrace(path, TopK(3), on_error="disable"))
    assert trainer.global_step == 10
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), traced.parameters(), strict=True))
    trace = open_trace(path)
    assert trace.steps.index.tolist() == [0, 1, 2]
    assert not trace.attrs["complete"]
    assert "encoder.layers.0.linear1.weight" in trace.attrs["end_reason"]


def test_a_gradient_that_the_tape_did_not_see_is_noticed(tmp_path: Path) -> None:
    class Hidden(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            weight = self.encoder.layers[0].linear1.weight
            with torch._C.DisableTorchFunction():
                return loss + weight.square().sum()

    with pytest.raises(UnattributableError, match=r"`encoder.layers.0.linear1.weight` \(relative error .*don't add up"):
        fit(Hidden(), GradTrace(tmp_path / "a.zarr", TopK(3)))


def test_sums_are_checked_again_when_a_parameter_is_used_in_another_way(tmp_path: Path) -> None:
    class Changing(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.global_step < 3:
                return loss
            weight = self.encoder.layers[0].linear1.weight
            with torch._C.DisableTorchFunction():
                loss = loss + weight.square().sum()
            return loss + torch.nn.functional.linear(self.embedding(batch[0]), weight).mean()

    path = tmp_path / "a.zarr"
    with pytest.raises(UnattributableError, match=r"`encoder.layers.0.linear1.weight` \(relative error .*don't add up"):
        fit(Changing(), GradTrace(path, TopK(3), ledger_every_n_steps=None))
    assert open_trace(path).steps.index.tolist() == [0, 1, 2]


def test_positions_that_are_as_many_as_the_samples_are_not_taken_for_samples(tmp_path: Path) -> None:
    """A layer on a fixed table meets the batch later; its rows must not be taken for samples when T = B."""

    class Positions(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(6, 3))
            self.place = nn.Linear(3, 8)

        def forward(self, tokens):
            return self.head(self.encoder(self.embedding(tokens) + self.place(self.table)))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for n in (5, 6):
        path, numel = tmp_path / f"{n}.zarr", 3 * 8 + 8 * 17
        loader = DataLoader(Sentences(), batch_size=n)
        callback = GradTrace(path, TopK(numel), params=["place.weight", "head.weight"], quantity="gradient")
        fit(Positions(), callback, loader=loader)
        trace = open_trace(path)
        shifts = trace.topk.frame(steps=[0])
        shifts = shifts[shifts["param"] == "place.weight"]
        sizes = shifts["shift"].abs().groupby(shifts["sample_id"]).sum()
        assert sizes.nunique() == n  # every sample has shares of its own


PROBED: list[tuple[float, float]] = []  # global, because what a function shares with its surroundings is put back


def test_the_probe_leaves_other_random_numbers_alone(tmp_path: Path) -> None:
    """T = B makes the probe run `training_step` twice more in the first step; later draws must be the same."""

    class Drawing(Model):
        def training_step(self, batch, batch_idx):
            if torch.is_grad_enabled():
                drawn.append((np.random.rand(), random.random()))
            else:
                PROBED.append((np.random.rand(), random.random()))
            return super().training_step(batch, batch_idx)

    draws = []
    PROBED.clear()
    for callbacks in ([], [GradTrace(tmp_path / "a.zarr", TopK(3))]):
        drawn: list[tuple[float, float]] = []
        pl.seed_everything(3, verbose=False)
        fit(Drawing(), *callbacks, max_epochs=1, loader=DataLoader(Sentences(), batch_size=6))
        draws.append(drawn)
    assert len(PROBED) == 2
    assert draws[0] == draws[1]


def test_a_layer_as_wide_as_a_position_table_is_long_is_tracked() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.positions = nn.Embedding(100, 16), nn.Embedding(32, 16)
            self.wide, self.head = nn.Linear(16, 32), nn.Linear(16, 100)

    assert [p.name for p in select_parameters(Two(), None)] == ["wide.weight"]

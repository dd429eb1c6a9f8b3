"""What else a Trainer does while it trains: the training stays the same, the trace true, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from lightning_gradtrace import GradTrace, TopK, open_trace
from lightning_gradtrace.store.target import StoreError
from tests.loops.models import WIDTH, Net, check_nothing_left, data, fit, run


def loader(**options) -> DataLoader:
    return DataLoader(data(), **{"batch_size": 4, "shuffle": True, **options})


def test_an_accumulation_that_changes_by_epoch_and_ends_early(tmp_path: Path) -> None:
    trace, _ = run(Net, tmp_path / "a.zarr", lambda: [GradientAccumulationScheduler({0: 1, 1: 3, 2: 2})], max_epochs=3)
    parts = trace.occurrences.groupby("step")["micro_batch"].max() + 1
    assert parts.tolist() == [1, 1, 1, 1, 3, 1, 2, 2]
    assert (trace.steps["residual"] < 1e-5).all()


class Logging(Net):
    """Validates, logs, and calls itself without gradients in the training step."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.log("early", self(batch[0]).mean())
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return {"loss": loss, "more": batch[0].mean()}

    def validation_step(self, batch, batch_idx):
        self.log("val", Net.training_step(self, batch, batch_idx))

    def val_dataloader(self):
        return DataLoader(data(6), batch_size=3)

    test_step = validation_step
    predict_step = Net.training_step


@pytest.mark.parametrize(
    "options",
    [
        {"num_sanity_val_steps": 2, "val_check_interval": 2},
        {"limit_train_batches": 3},
        {"max_steps": 3, "max_epochs": -1},
        {"max_time": {"minutes": 5}},
        {"overfit_batches": 1},
        {"fast_dev_run": True},
        {"reload_dataloaders_every_n_epochs": 1},
        {"check_val_every_n_epoch": 2},
        {"detect_anomaly": True},
        {"barebones": True},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:You requested to overfit", "ignore:Trainer.barebones", "ignore:.*barebones")
def test_trainer_settings(options: dict, tmp_path: Path) -> None:
    kind = Net if "barebones" in options else Logging
    trace, _ = run(kind, tmp_path / "a.zarr", **options)
    assert (trace.steps["residual"] < 1e-5).all()


@pytest.mark.parametrize(
    "callback",
    [
        lambda: StochasticWeightAveraging(0.1, swa_epoch_start=1),
        lambda: WeightAveraging(),
        lambda: EarlyStopping("loss_epoch", patience=1),
        lambda: RichProgressBar(),
    ],
    ids=["swa", "ema", "early", "rich"],
)
def test_callbacks_beside_it(callback, tmp_path: Path) -> None:
    made = [callback(), callback()]
    bar = isinstance(made[0], RichProgressBar)
    trace, _ = run(Logging, tmp_path / "a.zarr", lambda: [made.pop()], enable_progress_bar=bar)
    assert (trace.steps["residual"] < 1e-5).all()


def test_checkpoints_are_saved_beside_it(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    fit(Net(), GradTrace(tmp_path / "a.zarr", TopK(3)), saved, enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == 4
    assert open_trace(tmp_path / "a.zarr").attrs["complete"]


def test_two_traces_of_one_training(tmp_path: Path) -> None:
    names = {"a": "first.weight", "b": "*"}
    callbacks = [GradTrace(tmp_path / key, TopK(4), params=params) for key, params in names.items()]
    trace, _ = run(Net, tmp_path / "c", lambda: [])
    pl.seed_everything(3, verbose=False)
    model = Net()
    check_nothing_left(model, fit(model, *callbacks))
    frames = {key: open_trace(tmp_path / key).topk.frame() for key in names}
    assert set(frames["a"]["param"]) == {"first.weight"}
    whole = trace.topk.frame()
    largest = whole.loc[whole.groupby(["step", "slot"])["shift"].apply(lambda s: s.abs().idxmax())]
    found = frames["b"].loc[frames["b"].groupby(["step", "slot"])["shift"].apply(lambda s: s.abs().idxmax())]
    np.testing.assert_allclose(found["shift"].to_numpy(), largest["shift"].to_numpy(), rtol=1e-6)


def test_two_fits_with_one_callback(tmp_path: Path) -> None:
    callback = GradTrace(tmp_path / "a.zarr", TopK(3))
    fit(Net(), callback)
    with pytest.raises(StoreError, match="overwrite=True"):
        fit(Net(), callback)
    callback.path = tmp_path / "b.zarr"
    model = Net()
    check_nothing_left(model, fit(model, callback))
    assert all(open_trace(tmp_path / name).attrs["complete"] for name in ("a.zarr", "b.zarr"))


def test_validate_test_and_predict_record_nothing(tmp_path: Path) -> None:
    callback = GradTrace(tmp_path / "a.zarr", TopK(3))
    model = Logging()
    trainer = fit(model, callback)
    n = len(open_trace(tmp_path / "a.zarr").occurrences)
    for call in (trainer.validate, trainer.test, trainer.predict):
        call(model, DataLoader(data(6), batch_size=3), **({} if call == trainer.predict else {"verbose": False}))
    assert len(open_trace(tmp_path / "a.zarr").occurrences) == n
    check_nothing_left(model, trainer)


class Boom(RuntimeError):
    pass


class Failing(Net):
    """Fails at one place of the third step."""

    def __init__(self, where: str, error: type[BaseException] = Boom) -> None:
        super().__init__()
        self.where, self.error = where, error

    def fail(self, where):
        if where == self.where and self.global_step == 2:
            raise self.error("out of luck")

    def training_step(self, batch, batch_idx):
        hidden = self.first(batch[0])
        self.fail("forward")
        hidden.register_hook(lambda grad: self.fail("backward"))
        return self.last(hidden).square().mean()

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        step = optimizer.step

        def failing(closure=None):
            result = step(closure)
            self.fail("optimizer")
            return result

        optimizer.step = failing
        return optimizer


class FailingCallback(pl.Callback):
    def __init__(self, hook: str) -> None:
        def fail(trainer, *args, **kwargs):
            if trainer.global_step == 2:
                raise Boom("out of luck")

        setattr(self, hook, fail)


HOOKS = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step")


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_an_exception_of_the_model_leaves_nothing_behind(where: str, tmp_path: Path) -> None:
    model = Failing(where)
    with pytest.raises(Boom):
        fit(model, GradTrace(tmp_path / "a.zarr", TopK(3)))
    check_nothing_left(model, model.trainer)
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.attrs["end_reason"] == "Boom: out of luck"
    assert trace.steps.index.tolist()[:2] == [0, 1]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", [*HOOKS, "on_before_zero_grad", "on_train_batch_end"])
def test_an_exception_of_another_callback_leaves_nothing_behind(hook: str, first: bool, tmp_path: Path) -> None:
    model, callbacks = Net(), [FailingCallback(hook), GradTrace(tmp_path / "a.zarr", TopK(3))]
    with pytest.raises(Boom):
        fit(model, *(callbacks if first else callbacks[::-1]))
    check_nothing_left(model, model.trainer)
    assert open_trace(tmp_path / "a.zarr").attrs["end_reason"] == "Boom: out of luck"


def test_a_keyboard_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    model = Failing("forward", KeyboardInterrupt)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(model, GradTrace(tmp_path / "a.zarr", TopK(3)))
    check_nothing_left(model, model.trainer)
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.attrs["end_reason"] == "KeyboardInterrupt: out of luck"
    assert trace.steps.index.tolist() == [0, 1]


class Unfreezing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x):
        return super().forward(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.2)


def test_parameters_that_are_unfrozen_later_join_the_trace(tmp_path: Path) -> None:
    finetuning = lambda: [BackboneFinetuning(1, backbone_initial_lr=0.1, should_align=False)]  # noqa: E731
    trace, _ = run(Unfreezing, tmp_path / "a.zarr", finetuning)
    frame = trace.topk.frame()
    moved = frame[(frame["shift"] != 0) & frame["param"].str.startswith("backbone")]
    assert sorted(moved["step"].unique()) == [4, 5, 6, 7]
    assert (trace.steps["residual"] < 1e-5).all()
    assert trace.steps["lr_1"].isna().tolist() == [True] * 4 + [False] * 4


def test_every_parameter_may_be_frozen_at_first(tmp_path: Path) -> None:
    class Freeze(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.backbone)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)

    pl.seed_everything(3, verbose=False)
    fit(Unfreezing(), Freeze(), GradTrace(tmp_path / "a.zarr", TopK(5), params="backbone.*"))
    frame = open_trace(tmp_path / "a.zarr").topk.frame()
    assert sorted(frame["step"].unique()) == list(range(8))
    assert ((frame["shift"] != 0) <= (frame["step"] >= 4)).all()


def test_a_frozen_base_is_not_tracked_unless_named(tmp_path: Path) -> None:
    class Adapted(Unfreezing):
        def __init__(self) -> None:
            super().__init__()
            self.backbone.requires_grad_(False)

    fit(Adapted(), GradTrace(tmp_path / "a.zarr", TopK(5)))
    assert open_trace(tmp_path / "a.zarr").params["param"].tolist() == ["first.weight", "last.weight"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("what", ["submodule", "in place", "model", "training step"])
def test_a_compiled_model_is_refused(what: str, tmp_path: Path) -> None:
    model = Net()
    if what == "submodule":
        model.first = torch.compile(model.first)
    elif what == "in place":
        model.last.compile()
    elif what == "training step":
        model.training_step = torch.compile(model.training_step)
    else:
        model = torch.compile(model)
    with pytest.raises(ValueError, match=r"was compiled with `torch\.compile`\. Inside compiled code the uses of"):
        fit(model, GradTrace(tmp_path / "a.zarr", TopK(3)))
    assert not (tmp_path / "a.zarr").exists()


def test_a_sample_may_stand_twice_in_a_batch(tmp_path: Path) -> None:
    def sampler():
        generator = torch.Generator().manual_seed(1)
        return WeightedRandomSampler(torch.ones(14), 16, replacement=True, generator=generator)

    trace, _ = run(Net, tmp_path / "a.zarr", loader=lambda: loader(shuffle=None, sampler=sampler()))
    generator = torch.Generator().manual_seed(1)
    drawn = list(WeightedRandomSampler(torch.ones(14), 16, replacement=True, generator=generator))
    assert trace.occurrences["sample_id"].tolist()[:16] == drawn
    assert len(set(drawn[:4])) < 4 or len(set(drawn)) < 16


@pytest.mark.parametrize("options", [{"num_workers": 1, "persistent_workers": True}, {"num_workers": 2}], ids=str)
def test_ids_with_workers(options: dict, tmp_path: Path) -> None:
    seen = []

    class Watching(Net):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append(batch[0])

    pl.seed_everything(3, verbose=False)
    settings = {**options, "reload_dataloaders_every_n_epochs": 1} if options["num_workers"] == 2 else options
    reload = {"reload_dataloaders_every_n_epochs": settings.get("reload_dataloaders_every_n_epochs", 0)}
    fit(Watching(), GradTrace(tmp_path / "a.zarr", TopK(3)), loader=loader(**options), **reload)
    ids = open_trace(tmp_path / "a.zarr").occurrences["sample_id"].tolist()
    assert torch.equal(data().tensors[0][ids], torch.cat(seen))


@pytest.mark.filterwarnings("ignore:GradTrace. several training dataloaders")
def test_several_loaders_at_once_are_numbered_as_they_arrive(tmp_path: Path) -> None:
    class Several(Net):
        def training_step(self, batch, batch_idx):
            return sum(Net.training_step(self, part, batch_idx) for part in batch.values())

    def loaders():
        return {"a": loader(drop_last=True), "b": loader(drop_last=True)}

    trace, _ = run(Several, tmp_path / "a.zarr", loader=loaders)
    assert trace.occurrences["sample_id"].tolist() == list(range(24))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning says it once per process
def test_a_training_step_without_a_loss_leaves_out_its_batch_only(tmp_path: Path) -> None:
    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    trace, _ = run(Skipping, tmp_path / "a.zarr", accumulate_grad_batches=2)
    assert trace.occurrences.groupby("step")["micro_batch"].max().tolist() == [0, 1, 0, 1]


def test_passes_of_parameters_that_no_optimizer_holds_are_not_hoarded(tmp_path: Path) -> None:
    """Nobody zeroes their gradients, so nothing would ever end what they hold."""
    held = []

    class Partial(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.last.parameters(), lr=0.2)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            run_ = self.trainer.callbacks[0]._run
            held.append(len(run_.tracer.accumulation._passes))

    model = Partial()
    fit(model, GradTrace(tmp_path / "a.zarr", TopK(50), params="*"))
    assert held == [0] * 8
    frame = open_trace(tmp_path / "a.zarr").topk.frame()
    assert (frame[frame["param"].str.startswith("first")]["shift"] == 0).all()


def test_gradients_that_a_hook_changes_are_followed(tmp_path: Path) -> None:
    """Between backward and step the module halves its gradients: measured like clipping."""

    class Halving(Net):
        def on_after_backward(self):
            for p in self.parameters():
                p.grad.mul_(0.5)

    trace, _ = run(Halving, tmp_path / "a.zarr")
    np.testing.assert_allclose(trace.steps["clip_factor"], 0.5, rtol=1e-5)
    assert (trace.steps["residual"] < 1e-5).all()

"""What people use with Lightning: schedules, hooks that edit gradients, averages of weights. The ledger closes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn
from torch.optim import lr_scheduler

from lightning_gradtrace import GradTrace, TopK, open_trace
from lightning_gradtrace.store import Trace
from tests.test_callback import Model, fit


def model_with(configure: Callable[[nn.Module], Any], base: type[Model] = Model, dropout: float = 0.2) -> Model:
    """Return the small language model with another `configure_optimizers`."""

    class Configured(base):  # type: ignore[misc, valid-type]
        def configure_optimizers(self):
            return configure(self)

    pl.seed_everything(3, verbose=False)
    return Configured(dropout)


def traced(path: Path, make: Callable[[], Model], *callbacks: pl.Callback, **options: Any) -> Trace:
    """Train without and with a trace, check that the weights are equal, and return the trace."""
    before, after = callbacks[:1], callbacks[1:]
    plain, recorded = make(), None
    fit(plain, *(c for c in callbacks), **options)
    recorded = make()
    fit(recorded, *before, GradTrace(path, TopK(5), ledger_every_n_steps=1), *after, **options)
    for (name, a), (_, b) in zip(plain.named_parameters(), recorded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    return open_trace(path)


def closes(trace: Trace) -> bool:
    """Whether residuals are below 1e-5, or below what rounding leaves where a step moves the weights very little."""
    limit = trace.steps["rounding"].fillna(0.0).clip(lower=1e-5)  # NaN in a step that moves nothing
    return bool((trace.steps["residual"] < limit).all()) and bool((limit < 1e-3).all())


def adamw(module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), **{"lr": 0.03, "weight_decay": 0.1, **options})


def two_groups(module: nn.Module) -> torch.optim.Optimizer:
    plain = [p for p in module.parameters() if p.dim() < 2]
    matrices = [p for p in module.parameters() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": 0.3, "betas": (0.5, 0.9)}, {"params": plain, "lr": 0.1}]
    return torch.optim.NAdam(groups, lr=0.03)


def one_cycle(module: nn.Module) -> dict[str, Any]:
    """Learning rate and momentum change at every step."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=30)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warm_up(module: nn.Module) -> dict[str, Any]:
    """The learning rate of the first step is 0."""
    optimizer = torch.optim.RMSprop(module.parameters(), lr=0.02, momentum=0.5)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def by_epoch(module: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.1)
    return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.StepLR(optimizer, 1, 0.5)}


@pytest.mark.parametrize(
    ("configure", "options"),
    [
        (adamw, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
        (two_groups, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        (one_cycle, {}),
        (warm_up, {"gradient_clip_val": None}),
        (by_epoch, {"accumulate_grad_batches": 2}),
        (lambda m: torch.optim.Adafactor(m.parameters(), lr=0.1), {}),
        (lambda m: torch.optim.RAdam(m.parameters(), lr=0.1, weight_decay=0.1), {"gradient_clip_val": None}),
        (lambda m: torch.optim.Rprop(m.parameters(), lr=0.01), {}),
        (lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, nesterov=True, foreach=True), {}),
    ],
    ids=["adamw", "two groups", "one cycle", "warm-up", "by epoch", "adafactor", "radam", "rprop", "nesterov, foreach"],
)
def test_the_ledger_closes_in_a_training_that_is_the_same_bit_for_bit(configure, options, tmp_path: Path) -> None:
    trace = traced(tmp_path / "a.zarr", lambda: model_with(configure), **options)
    assert len(trace.steps) in (6, 10)
    assert closes(trace)
    assert trace.verify().ok, str(trace.verify())


def test_momentum_is_stored_as_it_changes(tmp_path: Path) -> None:
    steps = traced(tmp_path / "a.zarr", lambda: model_with(one_cycle)).steps
    assert steps["momentum"].iloc[0] == pytest.approx(0.95)
    assert (steps["momentum"].diff().dropna().abs() > 0).sum() >= 8


@pytest.mark.parametrize("average", [StochasticWeightAveraging, EMAWeightAveraging])
def test_the_weights_that_train_are_traced_beside_their_average(average: type, tmp_path: Path) -> None:
    options = {"swa_lrs": 0.1, "swa_epoch_start": 1} if average is StochasticWeightAveraging else {}

    def run(path: Path | None) -> Model:
        model = model_with(lambda m: torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9))
        trace = [] if path is None else [GradTrace(path, TopK(5), ledger_every_n_steps=1)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's remarks on its own averages
            fit(model, average(**options), *trace, max_epochs=3, val_check_interval=2)
        return model

    plain, recorded = run(None), run(tmp_path / "a.zarr")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), recorded.parameters(), strict=True))
    assert (open_trace(tmp_path / "a.zarr").steps["residual"] < 1e-5).all()


# --- hooks that change gradients --------------------------------------------------------------------------------------


class AfterBackward(Model):
    def on_after_backward(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.2)


class BeforeStep(Model):
    def on_before_optimizer_step(self, optimizer) -> None:
        nn.utils.clip_grad_value_(self.parameters(), 0.01)


class OwnClipping(Model):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        for p in self.parameters():
            p.grad /= p.grad.norm() + 1e-6  # every layer to the same length


class ByRows(Model):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        for p in self.parameters():
            if p.dim() == 2:
                p.grad *= 3.0 / (p.grad.norm(dim=1, keepdim=True) + 1e-6)


class Halving(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        for p in pl_module.parameters():
            p.grad *= 0.5


@pytest.mark.parametrize("base", [AfterBackward, BeforeStep, OwnClipping, ByRows])
@pytest.mark.parametrize("configure", [adamw, lambda m: torch.optim.SGD(m.parameters(), lr=0.3)], ids=["adamw", "sgd"])
def test_what_hooks_do_to_gradients_is_measured(base: type[Model], configure: Callable, tmp_path: Path) -> None:
    trace = traced(tmp_path / "a.zarr", lambda: model_with(configure, base), Halving(), gradient_clip_val=0.3)
    assert closes(trace)
    assert (trace.steps["sum_error"] < 1e-5).all()


class Noisy(Model):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        for p in self.parameters():
            p.grad += 0.1 * p.grad.norm() * torch.randn_like(p.grad)


def test_noise_added_to_gradients_is_said_and_shown(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"were changed by more than a factor: something was added to them \(noise,"):
        trace = traced(tmp_path / "a.zarr", lambda: model_with(lambda m: torch.optim.SGD(m.parameters(), 0.3), Noisy))
    assert (trace.steps["residual"] > 0.1).all()
    assert (trace.steps["sum_error"] < 1e-5).all()
    assert "something that is added to gradients before the step (noise, a penalty" in str(trace.verify())


def test_an_optimizer_without_a_rule_is_recorded_with_its_residual(tmp_path: Path) -> None:
    class Heavy(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            loss = super().step(closure)
            for p in self.param_groups[0]["params"]:
                p.mul_(0.99)
            return loss

    with pytest.warns(UserWarning, match="no rule for the optimizer `Heavy`"):
        trace = traced(tmp_path / "a.zarr", lambda: model_with(lambda m: Heavy(m.parameters(), lr=0.3)))
    assert (trace.steps["residual"] > 0.05).all()
    assert trace.attrs["optimizer"][0]["rule"] is None
    assert "`Heavy` has no rule" in str(trace.verify())


def test_an_optimizer_without_a_rule_may_write_into_the_gradients(tmp_path: Path) -> None:
    """What it does to them after clipping is its own step, no clipping: the shifts are of the clipped gradient."""

    class Scribbling(torch.optim.Optimizer):
        def __init__(self, parameters) -> None:
            super().__init__(parameters, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            loss = closure() if closure is not None else None
            for p in self.param_groups[0]["params"]:
                p.add_(p.grad.mul_(3.0), alpha=-0.1)
            return loss

    with pytest.warns(UserWarning, match="no rule for the optimizer `Scribbling`"):
        trace = traced(tmp_path / "a.zarr", lambda: model_with(lambda m: Scribbling(m.parameters())))
    assert trace.steps["clip_factor"].to_numpy() == pytest.approx(
        (0.3 / trace.steps["grad_norm"]).clip(upper=1), rel=1e-4
    )
    assert trace.steps["residual"].to_numpy() == pytest.approx(2 / 3, rel=1e-5)  # of three thirds one is explained


def test_lbfgs_is_refused(tmp_path: Path) -> None:
    model = model_with(lambda m: torch.optim.LBFGS(m.parameters()))
    with pytest.raises(ValueError, match="can't divide the steps of `LBFGS`"):
        fit(model, GradTrace(tmp_path / "a.zarr", TopK(5)), gradient_clip_val=None)


def test_an_optimizer_that_holds_a_parameter_twice_is_refused(tmp_path: Path) -> None:
    def twice(module: pl.LightningModule) -> torch.optim.Optimizer:
        with pytest.warns(UserWarning, match="duplicate"):
            return torch.optim.SGD([*module.parameters(), next(module.parameters())], lr=0.1)

    with pytest.raises(ValueError, match=r"holds 1 of its parameters more than once.*Give it every parameter once"):
        fit(model_with(twice), GradTrace(tmp_path / "a.zarr", TopK(5)), gradient_clip_val=None)


def test_the_residual_is_in_the_progress_bar_when_asked_for(tmp_path: Path) -> None:
    seen = []

    class Watching(pl.Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            seen.append(trainer.progress_bar_metrics.get("gradtrace/residual"))

    callback = GradTrace(tmp_path / "a.zarr", TopK(5), ledger_every_n_steps=2, log_residual=True)
    plain, recorded = model_with(adamw), model_with(adamw)
    fit(plain)
    recorded = model_with(adamw)
    fit(recorded, callback, Watching())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), recorded.parameters(), strict=True))
    assert all(value is not None and 0 < value < 1e-5 for value in seen)

"""Optimizers that are no plain ones of torch's: wrappers, two-phase steps, and hooks around steps that zero or edit."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradtrace import GradTrace, TopK, open_trace
from lightning_gradtrace.capture.placing.placement import UnattributableError
from lightning_gradtrace.training.step import Step
from lightning_gradtrace.update.division import StepDivision
from tests.loops.models import WIDTH, Manual, Net, check_nothing_left, data, fit, hooks, run
from tests.loops.test_precision import scaled


def with_optimizer(make, base: type[Net] = Net) -> type[Net]:
    """Return a model with another optimizer, made of the model."""

    class Optimized(base):  # type: ignore[misc, valid-type]
        handle = None  # of a hook of the user's own

        def configure_optimizers(self):
            return make(self)

        def on_fit_end(self) -> None:
            if self.handle is not None:
                self.handle.remove()

    return Optimized


# --- step hooks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_none", [True, False], ids=["to none", "in place"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adafactor, torch.optim.Rprop], ids=lambda k: k.__name__)
def test_gradients_may_be_zeroed_in_a_hook_after_the_step(kind: type, to_none: bool, tmp_path: Path) -> None:
    """What the optimizer saw of them is read off before such hooks run."""

    def zeroing(model):
        optimizer = kind(model.parameters(), lr=0.02)
        model.handle = optimizer.register_step_post_hook(lambda self, *_: self.zero_grad(set_to_none=to_none))
        return optimizer

    trace, _ = run(with_optimizer(zeroing), tmp_path / "a.zarr", bound=1e-4, gradient_clip_val=0.1)
    assert (trace.steps["residual"] < 1e-4).all()
    clipped = (0.1 / trace.steps["grad_norm"]).clip(upper=1)
    np.testing.assert_allclose(trace.steps["clip_factor"], clipped, rtol=1e-4)


@pytest.mark.parametrize("base", [Net, Manual], ids=lambda k: k.__name__)
def test_a_hook_before_the_step_that_was_registered_late_is_seen(base: type, tmp_path: Path) -> None:
    """Also where the gradients are copied before the step, because it may write into them."""

    class Halving(pl.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            trainer.optimizers[0].register_step_pre_hook(lambda *_: self.halve(pl_module))

        def halve(self, module) -> None:
            for p in module.parameters():
                p.grad.mul_(0.5)

    def nesterov(model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, nesterov=True, foreach=True)

    pl.seed_everything(3, verbose=False)
    traced = GradTrace(tmp_path / "a.zarr", TopK(5), ledger_every_n_steps=1)
    fit(with_optimizer(nesterov, base)(), traced, Halving(), plugins=scaled())
    steps = open_trace(tmp_path / "a.zarr").steps
    assert (steps["residual"] < 5e-3).all()
    np.testing.assert_allclose(steps["clip_factor"], 0.5, rtol=1e-3)


# --- optimizers around optimizers -------------------------------------------------------------------------------------


class Lookahead(torch.optim.Optimizer):
    """Does not call `Optimizer.__init__`, as its implementations do, so that torch runs no step hooks for it."""

    def __init__(self, base: torch.optim.Optimizer, hooks: bool) -> None:
        if hooks:
            self._optimizer_step_pre_hooks: OrderedDict = OrderedDict()
            self._optimizer_step_post_hooks: OrderedDict = OrderedDict()
        self.base, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state = defaultdict(dict)

    def step(self, closure=None):
        return self.base.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)


class ZeroedInPlace(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(Net.training_step(self, batch, batch_idx))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.filterwarnings("ignore:GradTrace has no rule for the optimizer `Lookahead`")
@pytest.mark.parametrize("hooks", [True, False], ids=["with hooks", "without"])
@pytest.mark.parametrize("base", [Net, ZeroedInPlace], ids=lambda k: k.__name__)
@pytest.mark.parametrize("half", [False, True], ids=["single", "half"])
def test_steps_of_an_optimizer_without_step_hooks_are_seen(half: bool, base: type, hooks: bool, tmp_path: Path) -> None:
    made = with_optimizer(lambda model: Lookahead(torch.optim.SGD(model.parameters(), lr=0.2), hooks), base)
    options = {"plugins": scaled} if half else {}
    trace, _ = run(made, tmp_path / "a.zarr", bound=5e-3 if half else 1e-5, **options)
    assert len(trace.steps) == 8 and not trace.steps["skipped"].any()
    assert (trace.steps["residual"] < (5e-3 if half else 1e-5)).all()


def test_the_step_of_such_an_optimizer_is_its_own_again(tmp_path: Path) -> None:
    model = with_optimizer(lambda model: Lookahead(torch.optim.SGD(model.parameters(), lr=0.2), True))()
    with pytest.warns(UserWarning, match="no rule for the optimizer `Lookahead`"):
        trainer = fit(model, GradTrace(tmp_path / "a.zarr", TopK(5)))
    assert "step" not in vars(trainer.optimizers[0])
    check_nothing_left(model, trainer)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation in two steps, of which the second is that of an optimizer inside."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.5)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["old"]
        self.base.step()
        self.zero_grad()


class Sharpness(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(Net.training_step(self, batch, batch_idx))
        optimizer.first_step()
        self.manual_backward(Net.training_step(self, batch, batch_idx))
        optimizer.second_step()

    def forward(self, x):  # without dropout
        return self.last(self.first(x).tanh())


def test_steps_that_are_not_seen_are_said_and_not_disturbed(tmp_path: Path) -> None:
    """The permutation probe runs the training step again, and with it the methods of the optimizer."""
    weights = []
    for callbacks in ([], [GradTrace(tmp_path / "a.zarr", TopK(5))]):
        pl.seed_everything(3, verbose=False)
        model = with_optimizer(lambda model: SAM(model.parameters()), Sharpness)()
        if callbacks:
            with pytest.warns(UserWarning, match="no optimizer step was seen in the whole training"):
                fit(model, *callbacks)
        else:
            fit(model)
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*weights)


def test_an_optimizer_without_a_learning_rate_is_said(tmp_path: Path) -> None:
    class Own(torch.optim.Optimizer):
        def step(self, closure=None):
            return closure()

    model = with_optimizer(lambda model: Own(model.parameters(), {"lr": None}))()
    with pytest.warns(UserWarning, match="Its `lr` is no number, so that shifts are NaN"):
        fit(model, GradTrace(tmp_path / "a.zarr", TopK(5)))
    assert (open_trace(tmp_path / "a.zarr").steps["nonfinite"] > 0).all()


# --- gradients that are used twice, or lie where something else does --------------------------------------------------


def test_a_gradient_that_a_second_step_uses_is_refused(tmp_path: Path) -> None:
    class Twice(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.optimizers().step()

    with pytest.raises(UnattributableError, match=r"`first.weight`.*, which an earlier step had used already"):
        fit(Twice(), GradTrace(tmp_path / "a.zarr", TopK(3), params="*"))


class Offset(Net):
    """Offsets of the shape of a single sample: autograd makes their cotangent the gradient itself."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.row = nn.Parameter(torch.zeros(1, 7)), nn.Parameter(torch.zeros(7))

    def forward(self, x):
        return self.last((self.first(x) + self.whole).tanh() + self.row.unsqueeze(0))


class Rows(Net):
    """An embedding with sparse gradients, of which the same holds for batches of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, WIDTH, sparse=True)

    def forward(self, x):
        return self.last(self.first(x + self.embedding((x[:, 0] > 0).long())).tanh())


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["one", "accumulated"])
@pytest.mark.parametrize("half", [False, True], ids=["single", "half"])
@pytest.mark.parametrize(("kind", "size"), [(Offset, 1), (Rows, 4)], ids=["offset", "rows"])
def test_shares_are_not_written_to_with_the_gradients(
    kind: type, size: int, half: bool, options: dict, tmp_path: Path
) -> None:
    class Halved(kind):
        def on_before_optimizer_step(self, optimizer) -> None:
            for p in self.parameters():
                p.grad.mul_(0.5)

    if half:
        options = {**options, "plugins": scaled}
    bound = 5e-3 if half else 1e-5
    loader = DataLoader(data(), batch_size=size, shuffle=True)
    trace, _ = run(Halved, tmp_path / "a.zarr", loader=lambda: loader, bound=bound, max_epochs=1, **options)
    assert (trace.steps["residual"] < bound).all()
    np.testing.assert_allclose(trace.steps["clip_factor"], 0.5, rtol=1e-3)


def failing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function, and fail at its second call."""
    n = 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal n
        n += 1
        if n == 2:
            raise RuntimeError("out of luck")
        return function(*args, **kwargs)

    return fails


@pytest.mark.parametrize("registers", [False, True], ids=["alone", "among hooks"])
@pytest.mark.parametrize("bare", [False, True], ids=["announced", "bare optimizer"])
@pytest.mark.parametrize("moment", ["begin", "keep_gradients", "complete", "shifts"])
def test_a_failure_in_a_hook_of_a_step_ends_the_trace_and_not_the_training(
    moment: str, bare: bool, registers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bare(Manual):
        """Steps an optimizer that Lightning does not wrap, which has hooks of its own that come after ours."""

        def on_train_batch_start(self, batch, batch_idx) -> None:
            if registers and (self.current_epoch, batch_idx) == (0, 0):
                optimizer = self.optimizers(use_pl_optimizer=False)
                optimizer.register_step_pre_hook(lambda *args: called.append("before"))
                optimizer.register_step_post_hook(lambda *args: called.append("after"))

        def optimizers(self, use_pl_optimizer: bool = True) -> Any:
            return super().optimizers(use_pl_optimizer=not bare and use_pl_optimizer)

    owner: Any = Step if moment == "shifts" else StepDivision
    weights, calls = [], []
    for path in (None, tmp_path / "a.zarr"):
        called: list[str] = []
        pl.seed_everything(3, verbose=False)
        model = Bare()
        if path is None:
            fit(model)
        else:
            monkeypatch.setattr(owner, moment, failing(getattr(owner, moment)))
            with pytest.warns(UserWarning, match="GradTrace stopped recording, training goes on: .*out of luck"):
                trainer = fit(model, GradTrace(path, TopK(3), on_error="disable"))
            assert hooks(model) == [] and len(trainer.optimizers[0]._optimizer_step_pre_hooks) == registers
            assert len(trainer.optimizers[0]._optimizer_step_post_hooks) == registers
        weights.append(model.state_dict())
        calls.append(called)
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items()) and calls[0] == calls[1]
    assert open_trace(tmp_path / "a.zarr").steps.index.tolist() == [0]

"""What a sample did in the end equals a rerun of the optimizer without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_gradtrace import GradTrace, TopK, open_trace
from lightning_gradtrace.analysis import eventual_shift
from lightning_gradtrace.record import Gains
from lightning_gradtrace.store import Trace
from tests.synthetic import write_trace
from tests.test_callback import Model, fit

PARAM = "encoder.layers.1.linear1.weight"
HORIZON = 4


class Watched(Model):
    """Keeps the weight before every step, its gradients, and the settings of every step."""

    configure: Callable[[nn.Module], Any]

    def __init__(self) -> None:
        super().__init__()
        self.gradients: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.groups: list[dict[str, Any]] = []
        self.states: list[dict[str, Tensor]] = []

    def configure_optimizers(self):
        return self.configure(self)

    def on_before_optimizer_step(self, optimizer) -> None:
        weight = self.get_parameter(PARAM)
        self.gradients.append(weight.grad.clone())
        self.weights.append(weight.detach().clone())
        (group,) = (g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
        self.groups.append({k: v for k, v in group.items() if k != "params"})

    def on_train_batch_end(self, *_) -> None:
        state = self.trainer.optimizers[0].state[self.get_parameter(PARAM)]
        self.states.append({key: value.clone() for key, value in state.items() if value is not None})


def watched(configure: Callable[[nn.Module], Any]) -> Watched:
    model = Watched()
    model.configure = configure
    return model


def record(path: Path, configure: Callable[[nn.Module], Any], **options: Any) -> tuple[Watched, Trace]:
    pl.seed_everything(3, verbose=False)
    model = watched(configure)
    settings = {"params": [PARAM, "encoder.layers.0.linear1.weight"], "weights_every_n_steps": None, **options}
    fit(model, GradTrace(path, [TopK(192), Gains()], **settings), precision="64-true", gradient_clip_val=None)
    return model, open_trace(path)


def gradient_of(path: Path, configure: Callable[[nn.Module], Any], occurrence: int) -> Tensor:
    """Per-sample gradient of an occurrence, from a second recording of the same training."""
    _, trace = record(path, configure, quantity="gradient")
    frame = trace.topk.frame()
    part = frame[(frame["occurrence"] == occurrence) & (frame["param"] == PARAM)].sort_values("index")
    return torch.as_tensor(part["shift"].to_numpy(float)).view(12, 8)


def rerun(model: Watched, gradients: list[Tensor], step_of: Callable, stop: int) -> Tensor:
    """Take the steps of the training again with other gradients; returns the weight before step `stop`."""
    weight = model.weights[0].clone()
    step = step_of(weight)
    for t in range(stop):
        step(t, gradients[t])
    return weight


def real_optimizer(model: Watched) -> Callable:
    def make(weight: Tensor) -> Callable:
        cls = type(model.configure(model)) if not isinstance(model.configure(model), dict) else torch.optim.SGD
        parameter = nn.Parameter(weight)
        optimizer = cls([parameter], lr=0.1)

        def step(t: int, gradient: Tensor) -> None:
            optimizer.param_groups[0].update(model.groups[t])
            parameter.grad = gradient.clone()
            optimizer.step()
            weight.copy_(parameter.detach())

        return step

    return make


def adam(model: Watched, t: int, moment: Tensor, gradient: Tensor) -> Tensor:
    group, (b1, b2) = model.groups[t], model.groups[t]["betas"]
    den = (model.states[t]["exp_avg_sq"] / (1 - b2 ** (t + 1))).sqrt() + group["eps"]
    moment.mul_(b1).add_(gradient, alpha=1 - b1)
    return moment / (1 - b1 ** (t + 1)) / den


def nadam(model: Watched, t: int, moment: Tensor, gradient: Tensor) -> Tensor:
    group, (b1, b2) = model.groups[t], model.groups[t]["betas"]
    den = (model.states[t]["exp_avg_sq"] / (1 - b2 ** (t + 1))).sqrt() + group["eps"]
    now, following = (b1 * (1 - 0.5 * 0.96 ** (n * group["momentum_decay"])) for n in (t + 1, t + 2))
    product = model.states[t]["mu_product"].double()
    moment.mul_(b1).add_(gradient, alpha=1 - b1)
    return ((1 - now) / (1 - product) * gradient + following / (1 - product * following) * moment) / den


def radam(model: Watched, t: int, moment: Tensor, gradient: Tensor) -> Tensor:
    group, (b1, b2) = model.groups[t], model.groups[t]["betas"]
    longest = 2 / (1 - b2) - 1
    rho = longest - 2 * (t + 1) * b2 ** (t + 1) / (1 - b2 ** (t + 1))
    moment.mul_(b1).add_(gradient, alpha=1 - b1)
    step = moment / (1 - b1 ** (t + 1))
    if rho <= 5:
        return step
    rectified = ((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)) ** 0.5
    return step * rectified * (1 - b2 ** (t + 1)) ** 0.5 / (model.states[t]["exp_avg_sq"].sqrt() + group["eps"])


def adamax(model: Watched, t: int, moment: Tensor, gradient: Tensor) -> Tensor:
    b1 = model.groups[t]["betas"][0]
    moment.mul_(b1).add_(gradient, alpha=1 - b1)
    return moment / (1 - b1 ** (t + 1)) / model.states[t]["exp_inf"]


def rmsprop(model: Watched, t: int, moment: Tensor, gradient: Tensor) -> Tensor:
    variance = model.states[t]["square_avg"]
    if model.groups[t]["centered"]:
        variance = variance - model.states[t]["grad_avg"].square()
    return moment.mul_(model.groups[t]["momentum"]).add_(gradient / (variance.sqrt() + model.groups[t]["eps"]))


def with_the_denominators_of_the_training(direction: Callable[..., Tensor]) -> Callable:
    """Take the optimizer's own formula, but the averages of squares that the training had."""

    def of(model: Watched) -> Callable:
        def make(weight: Tensor) -> Callable:
            moment = torch.zeros_like(weight)

            def step(t: int, gradient: Tensor) -> None:
                group = model.groups[t]
                if group.get("decoupled_weight_decay", False):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                else:
                    gradient = gradient + group["weight_decay"] * weight
                weight.sub_(group["lr"] * direction(model, t, moment, gradient))

            return step

        return make

    return of


def cycle(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Change learning rate and momentum at every step."""
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=30)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """Put the parameter into the second group."""
    mine = module.get_parameter(PARAM)
    return [{"params": [p for p in module.parameters() if p is not mine], "lr": 0.3}, {"params": [mine]}]


def sgd(module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups_of(module), lr=0.1, **options)


def optim(cls: type, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda module: cls(groups_of(module), lr=0.01, **options)


held = with_the_denominators_of_the_training
CASES = {
    "sgd": (lambda m: sgd(m), real_optimizer),
    "sgd, momentum, decay": (lambda m: sgd(m, momentum=0.9, weight_decay=0.5), real_optimizer),
    "sgd, dampening": (lambda m: sgd(m, momentum=0.9, dampening=0.4), real_optimizer),
    "sgd, nesterov, decay": (lambda m: sgd(m, momentum=0.8, nesterov=True, weight_decay=0.5), real_optimizer),
    "sgd, maximize": (lambda m: sgd(m, momentum=0.5, weight_decay=0.5, maximize=True), real_optimizer),
    "sgd, one cycle": (lambda m: cycle(sgd(m, momentum=0.9, nesterov=True)), real_optimizer),
    "adam": (optim(torch.optim.Adam), held(adam)),
    "adam, decay": (optim(torch.optim.Adam, weight_decay=0.5), held(adam)),
    "adamw": (optim(torch.optim.AdamW, weight_decay=0.5), held(adam)),
    "adamw, one cycle": (lambda m: cycle(optim(torch.optim.AdamW)(m)), held(adam)),
    "nadam": (optim(torch.optim.NAdam), held(nadam)),
    "nadam, decay": (optim(torch.optim.NAdam, weight_decay=0.5, betas=(0.7, 0.99)), held(nadam)),
    "nadam, decoupled": (optim(torch.optim.NAdam, weight_decay=0.5, decoupled_weight_decay=True), held(nadam)),
    "radam, decay": (optim(torch.optim.RAdam, weight_decay=0.5), held(radam)),
    "radam, decoupled": (optim(torch.optim.RAdam, weight_decay=0.5, decoupled_weight_decay=True), held(radam)),
    "adamax, decay": (optim(torch.optim.Adamax, weight_decay=0.5), held(adamax)),
    "rmsprop": (optim(torch.optim.RMSprop, momentum=0.9), held(rmsprop)),
    "rmsprop, centered, decay": (
        optim(torch.optim.RMSprop, momentum=0.9, centered=True, weight_decay=0.5),
        held(rmsprop),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("occurrence", [2, 17])
def test_the_eventual_shift_is_what_the_optimizer_makes_of_the_sample(case: str, occurrence: int, tmp_path) -> None:
    configure, optimizer = CASES[case]
    model, trace = record(tmp_path / "shift.zarr", configure)
    gradient = gradient_of(tmp_path / "gradient.zarr", configure, occurrence)
    start = int(trace.occurrences["step"].iloc[occurrence])
    without = [g - gradient if t == start else g for t, g in enumerate(model.gradients)]
    stop = start + HORIZON + 1
    expected = rerun(model, model.gradients, optimizer(model), stop) - rerun(model, without, optimizer(model), stop)
    for path in ("shift.zarr", "gradient.zarr"):
        table = eventual_shift(open_trace(tmp_path / path), occurrence, HORIZON)
        part = table[table["param"] == PARAM].sort_values("index")
        assert len(table) == 192 and (table["steps"] == HORIZON).all()
        np.testing.assert_allclose(part["eventual"], expected.flatten(), rtol=1e-5, atol=1e-7 * expected.abs().max())
    none = eventual_shift(trace, occurrence, 0)
    np.testing.assert_allclose(none["eventual"], none["shift"], rtol=1e-6)


def test_the_end_of_the_trace_ends_the_horizon(tmp_path: Path) -> None:
    _, trace = record(tmp_path / "a.zarr", lambda m: sgd(m, momentum=0.9))
    last = trace.n_occurrences - 1
    table = eventual_shift(trace, [last, 0], 1000)
    steps = table.groupby("occurrence")["steps"].unique()
    assert steps[last] == [0] and steps[0] == [len(trace.steps) - 1]


def test_what_can_not_be_followed_is_said(tmp_path: Path) -> None:
    def fails(message: str, configure: Callable, horizon: int = 2, **options: Any) -> None:
        path = tmp_path / "a.zarr"
        pl.seed_everything(3, verbose=False)
        settings = {"params": PARAM, "overwrite": True, **options}
        fit(watched(configure), GradTrace(path, **{"record": TopK(5), **settings}), gradient_clip_val=None)
        with pytest.raises(ValueError, match=message):
            eventual_shift(open_trace(path), 0, horizon)

    fails("memory of `ASGD` can't be followed", optim(torch.optim.ASGD))
    fails(
        r"depends on its denominators.*`GradTrace\(record=\[TopK\(...\), Gains\(\)\]\)`",
        optim(torch.optim.Adam),
    )
    fails("the trace lacks steps between 0 and", lambda m: sgd(m, momentum=0.9), every_n_steps=2)
    fails("`horizon` is -1, expected a whole number", lambda m: sgd(m), horizon=-1)

    def warm_up(m: nn.Module) -> dict[str, Any]:
        optimizer = sgd(m, momentum=0.9)
        schedule = lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    fails("the learning rate was 0 at the step of an occurrence, so that its shift is 0", warm_up)
    synthetic = write_trace(tmp_path / "b.zarr")
    with pytest.raises(ValueError, match="this trace describes 0 optimizers, expected exactly one"):
        eventual_shift(synthetic, 0, 1)
    with pytest.raises(ValueError, match=r"`occurrence` names \[36\]; this trace holds 0 to 35"):
        eventual_shift(synthetic, 36, 1)

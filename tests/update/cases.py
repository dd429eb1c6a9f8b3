"""Optimizers x settings, and recorded gradients to feed them: what the tests of the update stage share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.capture.shares import Share
from lightning_gradtrace.update.division import StepDivision, explain
from lightning_gradtrace.update.ledger import Balance
from tests.cases import NoProbe

VOCAB, LENGTH, BATCH = 11, 5, 7


def product(cls: type[Optimizer], **choices: tuple) -> list[tuple[type[Optimizer], dict[str, Any]]]:
    """List an optimizer with every combination of settings."""
    return [(cls, dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]


_decays, _signs = (0.0, 0.1), (False, True)
SETTINGS = [
    *product(optim.SGD, weight_decay=_decays, maximize=_signs),
    *product(optim.SGD, momentum=(0.9,), dampening=(0.0, 0.3), weight_decay=_decays),
    *product(optim.SGD, momentum=(0.9,), nesterov=(True,), weight_decay=_decays, maximize=_signs),
    (optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),  # writes into the gradients
    (optim.SGD, {"momentum": 0.9, "dampening": 0.3, "fused": True}),
    *product(optim.Adam, amsgrad=_signs, weight_decay=_decays),
    *product(optim.AdamW, amsgrad=_signs, maximize=_signs),
    (optim.AdamW, {"fused": True}),
    (optim.Adam, {"fused": True, "capturable": True}),
    (optim.AdamW, {"foreach": True}),
    *product(optim.NAdam, weight_decay=_decays, decoupled_weight_decay=_signs),
    (optim.NAdam, {"maximize": True, "weight_decay": 0.1, "foreach": True}),
    *product(optim.RAdam, weight_decay=_decays, decoupled_weight_decay=_signs),
    (optim.RAdam, {"maximize": True, "foreach": True}),
    *product(optim.Adamax, weight_decay=_decays),
    (optim.Adamax, {"maximize": True, "foreach": True}),
    *product(optim.RMSprop, centered=_signs, momentum=(0.0, 0.9)),
    (optim.RMSprop, {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "maximize": True, "foreach": True}),
    (optim.Adagrad, {}),
    (optim.Adagrad, {"lr_decay": 0.3, "initial_accumulator_value": 0.5, "weight_decay": 0.1}),
    (optim.Adagrad, {"maximize": True, "fused": True}),
    (optim.Adadelta, {"lr": 50.0}),
    (optim.Adadelta, {"lr": 50.0, "weight_decay": 0.1, "maximize": True}),
    (optim.ASGD, {}),
    (optim.ASGD, {"lambd": 0.1, "weight_decay": 0.1, "t0": 5, "maximize": True}),
    (optim.Rprop, {}),
    (optim.Rprop, {"maximize": True, "etas": (0.3, 1.4)}),
    (optim.Adafactor, {}),
    (optim.Adafactor, {"weight_decay": 0.1, "maximize": True, "d": 1.5, "eps": (1e-6, 1e-2)}),
]
"""Optimizers whose ledger closes up to rounding."""


def setting_name(setting: tuple[type[Optimizer], dict[str, Any]]) -> str:
    """Name a setting in the output of pytest."""
    cls, options = setting
    return "-".join([cls.__name__, *(f"{k}={v}" for k, v in options.items() if v is not False)])


class Mixed(nn.Module):
    """Embedding, convolution, norm and linear layers, one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embedding(tokens).mT).mT
        x = self.norm(x)
        return self.head(x + self.twice(torch.tanh(self.twice(x))))


@dataclass
class Gradients:
    """Gradients of one optimizer step, and the shares they are the sum of.

    Attributes:
        summed: `.grad` by parameter.
        shares: shares by parameter, one per micro-batch.
    """

    summed: dict[str, Tensor]
    shares: dict[str, list[Share]] = field(default_factory=dict)


def record_gradients(dtype: torch.dtype, autocast: bool, micro_batches: int, n_steps: int) -> list[Gradients]:
    """Train a `Mixed` model for some steps and return what its optimizer saw."""
    torch.manual_seed(0)
    model, steps, engine = Mixed().to(dtype), [], TapeEngine()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(n_steps):
        optimizer.zero_grad()
        step = Gradients({})
        for _ in range(micro_batches):
            tokens, targets = torch.randint(VOCAB, (2, BATCH, LENGTH))
            tape = engine.tape(dict(model.named_parameters()))
            with tape, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(tokens).float().flatten(0, 1).to(dtype), targets.flatten())
            (loss / micro_batches).backward()
            for name, share in engine.collect(tape, BATCH, NoProbe()).shares.items():
                step.shares.setdefault(name, []).append(share)
        step.summed = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        steps.append(step)
    return steps


def parameters_like(gradients: Gradients) -> dict[str, nn.Parameter]:
    """Return random weights of the shapes of gradients."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g.dtype) * 0.3)
        for name, g in gradients.summed.items()
    }


def clip(how: str | None) -> Callable[[list[nn.Parameter]], None]:
    """Return what clips gradients: by norm, by value, or not at all."""
    return {
        None: lambda parameters: None,
        "norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.3) and None,
        "value": lambda parameters: nn.utils.clip_grad_value_(parameters, 0.02),
    }[how]


def ledger(
    optimizer: Optimizer,
    parameters: dict[str, nn.Parameter],
    steps: list[Gradients],
    how: str | None = None,
) -> list[Balance]:
    """Feed recorded gradients to an optimizer and return the ledger of each of its steps."""
    rule, outcomes = explain(optimizer), []
    for step in steps:
        for name, p in parameters.items():
            p.grad = step.summed[name].clone()
        division = StepDivision.begin(optimizer, rule, parameters, ledger=True)
        clip(how)(list(parameters.values()))
        division.keep_gradients()
        optimizer.step()
        division.complete()

        def total(name: str, step: Gradients = step, division: StepDivision = division) -> Tensor:
            shifts = [division.share(name, share).total() * division.scale(name) for share in step.shares[name]]
            return torch.stack(shifts).sum(0)

        outcomes.append(division.balance(total))
    return outcomes

"""Shifts, carry and decay add up to the optimizer's real step; clipping is measured."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lightning_gradtrace.update.clipping import clip_factors, copy_gradients
from lightning_gradtrace.update.division import StepDivision, explain, gradient_norm

SETTINGS = [
    {"momentum": m, "dampening": t, "nesterov": n, "weight_decay": w, "maximize": x}
    for m, t, n, w, x in itertools.product((0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.1), (False, True))
    if not (n and (t or not m)) and not (t and not m)
]


ADAM_SETTINGS = [
    {"cls": cls, "amsgrad": a, "weight_decay": w, "maximize": x}
    for cls, a, w, x in itertools.product(
        (torch.optim.Adam, torch.optim.AdamW), (False, True), (0.0, 0.1), (False, True)
    )
] + [{"cls": torch.optim.AdamW, "weight_decay": 0.1, how: True} for how in ("fused", "foreach")]


def clip(parameters, how: str | None) -> None:
    if how == "norm":
        nn.utils.clip_grad_norm_(parameters, 0.5)
    elif how == "value":
        nn.utils.clip_grad_value_(parameters, 0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("how", [None, "norm", "value"])
@pytest.mark.parametrize("setting", SETTINGS + ADAM_SETTINGS, ids=str)
def test_the_ledger_closes(setting: dict, how: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    first, rest = list(model[0].parameters()), [p for layer in model[1:] for p in layer.parameters()]
    setting = dict(setting)
    cls = setting.pop("cls", torch.optim.SGD)
    optimizer = cls([{"params": first, "lr": 0.3}, {"params": rest}], lr=0.1, **setting)
    rule = explain(optimizer)
    named = dict(model.named_parameters())
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(9, 5, dtype=dtype)), torch.randint(3, (9,))).backward()
        division = StepDivision.begin(optimizer, rule, named, ledger=True)
        gradients = {name: g.clone() for name, g in division.gradients.items()}
        clip(model.parameters(), how)
        optimizer.step()
        division.complete()
        totals = {name: gradients[name] * division.scale(name) for name in named}
        assert division.residual(totals) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("setting", [{}, {"momentum": 0.9}], ids=str)
def test_the_ledger_notices_a_wrong_factor(setting: dict) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **setting)
    model(torch.randn(5, 4)).sum().backward()
    division = StepDivision.begin(optimizer, explain(optimizer), dict(model.named_parameters()), ledger=True)
    totals = {name: g * -0.09 for name, g in division.gradients.items()}
    optimizer.step()
    division.complete()
    assert division.residual(totals) == pytest.approx(0.1, rel=1e-4)


def test_an_optimizer_without_a_rule_is_warned_about_and_its_residual_is_honest() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Rprop(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"no rule for the optimizer `Rprop`: shifts are taken as -lr \* clipped"):
        rule = explain(optimizer)
    model(torch.randn(5, 4)).sum().backward()
    division = StepDivision.begin(optimizer, rule, dict(model.named_parameters()), ledger=True)
    totals = {name: g * -0.1 for name, g in division.gradients.items()}
    optimizer.step()
    division.complete()
    assert division.residual(totals) > 0.1


def test_norm_clipping_is_one_number_and_value_clipping_one_per_entry() -> None:
    torch.manual_seed(0)
    before = [torch.randn(4, 3), torch.randn(5)]
    assert clip_factors(before, [g * 0.25 for g in before]) == pytest.approx([0.25, 0.25])
    factors = clip_factors(before, [g.clamp(-0.1, 0.1) for g in before])
    for g, factor in zip(before, factors, strict=True):
        torch.testing.assert_close(g * factor, g.clamp(-0.1, 0.1))


def test_parameters_may_be_clipped_by_different_factors() -> None:
    before = [torch.randn(4, 3), torch.randn(5)]
    assert clip_factors(before, [before[0] * 0.5, before[1]]) == pytest.approx([0.5, 1.0])


def test_gradients_that_are_not_finite_leave_the_factors_of_the_others_alone() -> None:
    before = [torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([3.0])]
    unclipped = clip_factors(before, [g.clone() for g in before])
    torch.testing.assert_close(torch.as_tensor(unclipped[0]) * torch.ones(3), torch.ones(3))
    assert unclipped[1] == pytest.approx(1.0)


def test_copies_are_copies() -> None:
    gradients = [torch.randn(3, 2), torch.randn(4, dtype=torch.float64), torch.randn(5)]
    copies = copy_gradients(gradients)
    for gradient, copy in zip(gradients, copies, strict=True):
        torch.testing.assert_close(gradient, copy, rtol=0, atol=0)
        gradient.zero_()
        assert copy.any()


def test_the_gradient_norm_is_that_of_clipping() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, 4)).sum().backward()
    norm = gradient_norm(optimizer)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)), rel=1e-6)

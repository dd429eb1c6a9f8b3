"""The worked example of docs/concepts.md, number by number, and what the page says about the residual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.record import ParameterInfo, ParameterShifts, StepShifts, TopK
from lightning_gradtrace.update.division import StepDivision, explain
from tests.cases import NoProbe
from tests.docs.pages import between, table_rows

PAGE = "docs/concepts.md"


Example = tuple[StepDivision, StepShifts, dict[str, list[float]]]


def with_sgd(weight: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01)
    optimizer.state[weight]["momentum_buffer"] = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    return optimizer


def with_adamw(weight: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([weight], lr=0.225, betas=(0.5, 0.6), eps=0, weight_decay=0.04)
    moments = {"exp_avg": [[1.0, 0.0]], "exp_avg_sq": [[0.9, 1.6]]}
    state = {name: torch.tensor(value, dtype=torch.float64) for name, value in moments.items()}
    optimizer.state[weight] = {"step": torch.tensor(1.0), **state}
    return optimizer


def take(make: Callable[[nn.Parameter], torch.optim.Optimizer]) -> Example:
    """Take the step of the example with the package's own parts; returns each line of the ledger too."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(model.weight)
    optimizer = make(model.weight)
    a = torch.tensor([[1.0, 2.0], [2.0, 2.0]], dtype=torch.float64)
    target = torch.tensor([[1.0], [2.0]], dtype=torch.float64)

    engine = TapeEngine()
    tape = engine.tape({"weight": model.weight})
    with tape:
        loss = ((model(a) - target) ** 2 / 2).mean()
    loss.backward()
    share = engine.collect(tape, 2, NoProbe()).shares["weight"]
    before = model.weight.detach().clone()
    division = StepDivision.begin(optimizer, explain(optimizer), {"weight": model.weight}, ledger=True)
    nn.utils.clip_grad_norm_(model.parameters(), 2.5)
    division.keep_gradients()
    optimizer.step()
    division.complete()

    shifts = ParameterShifts(ParameterInfo("weight", (1, 2), 0), division.scale("weight"), [share])
    (entry,) = division.entries(lambda name: shifts.total())
    assert entry.carry is not None and entry.decay is not None
    lines = {
        "g[0]": share.dense()[0],
        "g[1]": share.dense()[1],
        "dL/dW": share.total(),
        "s[0]": shifts.shifts(0)[0],
        "s[1]": shifts.shifts(0)[1],
        "carry": entry.carry,
        "decay": entry.decay,
        "W_after - W_before": model.weight.detach() - before,
    }
    return division, StepShifts([2], [shifts]), {name: line.flatten().tolist() for name, line in lines.items()}


@pytest.fixture(scope="module")
def step() -> Example:
    return take(with_sgd)


@pytest.mark.parametrize(("table", "make"), [("ledger", with_sgd), ("adamw", with_adamw)])
def test_every_line_of_the_worked_examples_is_what_the_package_computes(table: str, make: Callable) -> None:
    division, shifts, lines = take(make)
    header, *rows = table_rows(between(PAGE, table))
    assert header == ["line", "entry 0", "entry 1"]
    shown = {name.partition(" = ")[0]: [float(x) for x in numbers] for name, *numbers in rows}
    assert lines.keys() - shown.keys() <= {"g[0]", "g[1]", "dL/dW"}
    for name in lines.keys() & shown.keys():  # clip_grad_norm_ adds 1e-6 to the norm
        assert lines[name] == pytest.approx(shown[name], rel=2e-6, abs=1e-12), name
    if "gain" in shown:
        assert division.gain("weight").flatten().tolist() == pytest.approx(shown["gain"], rel=2e-6)
    columns = zip(*(shown[name] for name in ("s[0]", "s[1]", "carry", "decay")), strict=True)
    assert [sum(column) for column in columns] == pytest.approx(shown["W_after - W_before"])
    assert division.balance(lambda name: shifts.parameters[0].total()).residual < 1e-12


def test_clipping_residual_and_selection_of_the_worked_example(step) -> None:
    division, shifts, _ = step
    assert division.clip_factor() == pytest.approx(0.5, rel=1e-6)
    assert division.balance(lambda name: shifts.parameters[0].total()).residual < 1e-12
    infos = [p.info for p in shifts.parameters]
    per_sample, per_step = TopK(1), TopK(1, per="step")
    per_sample.specs(infos), per_step.specs(infos)
    assert per_sample.reduce(shifts, 0)["topk/index"].tolist() == [[1], [0]]
    kept = per_step.reduce(shifts, 0)
    assert (kept["topk_step/occurrence"].item(), kept["topk_step/index"].item()) == (0, 1)


@pytest.mark.parametrize("rate", [1e-3, 1e-5])
def test_the_residual_in_float32_lies_at_its_floor_and_not_above(rate: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    nn.functional.cross_entropy(model(torch.randn(9, 40)), torch.randint(30, (9,))).backward()
    named = dict(model.named_parameters())
    before = torch.cat([p.detach().flatten().clone() for p in named.values()])
    division = StepDivision.begin(optimizer, explain(optimizer), named, ledger=True)
    optimizer.step()
    division.complete()
    outcome = division.balance(lambda name: named[name].grad * division.scale(name))
    change = torch.cat([p.detach().flatten() for p in named.values()]).double() - before.double()
    floor = 6e-8 * float(before.norm() / change.norm())
    assert outcome.rounding == pytest.approx(floor, rel=0.01)
    assert 0.1 * floor < outcome.residual < floor


def test_a_wrong_factor_of_ten_percent_shows_as_a_tenth() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, 4)).sum().backward()
    division = StepDivision.begin(optimizer, explain(optimizer), dict(model.named_parameters()), ledger=True)
    optimizer.step()
    division.complete()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert division.balance(lambda name: -0.09 * gradients[name]).residual == pytest.approx(0.1, rel=1e-4)

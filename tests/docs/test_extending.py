"""The examples of docs/extending.md work, and every rule, optimizer family and record that exists is tested."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from examples import mechanisms
from examples.mechanisms.__main__ import run as run_experiment
from examples.train import CONF
from lightning_gradtrace import GradTrace, open_trace, record
from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.probing.probe import PermutationProbe
from lightning_gradtrace.capture.rules import _base
from lightning_gradtrace.record import Record, TopK
from tests.analysis.traces import random_trace
from tests.cases import CASES, Case
from tests.docs.pages import blocks
from tests.test_callback import fit, make
from tests.update.cases import ledger, parameters_like, record_gradients

PAGE = "docs/extending.md"


def example(name: str) -> dict:
    (block,) = blocks(PAGE, name=name)
    return block.run({"__name__": f"example_{name}"})


@pytest.fixture
def rule_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards what an example registers."""
    monkeypatch.setattr(_base, "_RULES", dict(_base._RULES))


@pytest.fixture
def lars() -> Iterator[type[torch.optim.Optimizer]]:
    """Explain the optimizer of the page as the page does, for one test."""
    found = example("optimizer")
    yield found["Lars"]
    found["LarsRule"].optimizers = ()  # subclasses can't be taken back


def test_every_python_block_of_the_page_is_an_example_of_this_test() -> None:
    assert [block.name for block in blocks(PAGE)] == ["rule", "optimizer", "record", "analysis", "experiment"]


# --- layer rules ------------------------------------------------------------------------------------------------------


class Powered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.exponent = nn.Parameter(torch.rand(8) + 1)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens).abs().pow(self.exponent))


def capture(case: Case, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[MicroBatch, set]:
    """Return the shares of one pass, and the rules that its uses were given."""
    engine, named = TapeEngine(), dict(model.named_parameters())
    tape = engine.tape(named)
    with tape:
        loss = case.loss(model, inputs, targets, "mean", int((targets != -100).sum()))
    loss.backward()
    used = {use.rule.function for use in tape.uses if use.rule is not None}
    look = PermutationProbe(model, named, model, inputs, case.n_samples, case.batch_axis)
    return engine.collect(tape, case.n_samples, look), used


def test_the_rule_equals_the_oracle_and_the_general_rule(rule_registry: None) -> None:
    torch.manual_seed(0)
    encoder = CASES[1]
    case = Case("power", Powered, encoder.batch, encoder.batch_axis, encoder.n_samples)
    model = case.build().double()
    inputs, targets = case.batch(True)
    general, used = capture(case, model, inputs, targets)
    assert torch.Tensor.pow not in used
    example("rule")
    model.zero_grad()
    ruled, used = capture(case, model, inputs, targets)
    assert torch.Tensor.pow in used
    contribution = case.contribution(model, inputs, targets, "mean")
    expected = per_sample_gradients(contribution, case.n_samples, dict(model.named_parameters()))
    for name, g in expected.items():
        torch.testing.assert_close(ruled.shares[name].dense(), g, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(general.shares[name].dense(), g, rtol=1e-10, atol=1e-12)


# --- optimizer families -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [None, "norm", "value"])
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}], ids=str)
def test_the_ledger_closes_for_the_example(lars: type, settings: dict, precision: str, how: str | None) -> None:
    steps = record_gradients(getattr(torch, precision), False, 1, 5)
    parameters = parameters_like(steps[0])
    outcomes = ledger(lars(parameters.values(), **settings), parameters, steps, how)
    assert max(outcome.residual for outcome in outcomes) < {"float64": 1e-12, "float32": 1e-5}[precision]


# --- records ----------------------------------------------------------------------------------------------------------


def makers() -> dict[str, type[Record]]:
    exported = [getattr(record, name) for name in dir(record)]
    classes = [c for c in exported if isinstance(c, type) and issubclass(c, Record) and c is not Record]
    return {c.__name__: c for c in classes}


@pytest.mark.parametrize("name", sorted(makers()))
def test_every_exported_record_runs_in_a_training(name: str, tmp_path: Path) -> None:
    cls = makers()[name]
    fit(make(), GradTrace(tmp_path / "a.zarr", cls(5) if cls is TopK else cls(), ledger_every_n_steps=1))
    report = open_trace(tmp_path / "a.zarr").verify()
    assert report.ok, str(report)


def test_the_record_keeps_the_norms_of_all_shifts(tmp_path: Path) -> None:
    norms = example("record")["ParameterNorms"]()
    model = make()
    names = [n for n, p in model.named_parameters() if p.dim() > 1 and "encoder" in n]
    n_entries = sum(p.numel() for n, p in model.named_parameters() if n in names)
    fit(model, GradTrace(tmp_path / "a.zarr", [TopK(n_entries), norms]), accumulate_grad_batches=2)
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.verify().ok
    assert trace.params["param"].tolist() == names
    squares = trace.topk.frame().assign(square=lambda f: f["shift"].astype(float) ** 2)
    expected = squares.pivot_table("square", "occurrence", "param", "sum", observed=True)[names].to_numpy() ** 0.5
    np.testing.assert_allclose(trace.array("parameter_norms/norm")[:], expected, rtol=1e-4)
    assert trace.to_xarray()["parameter_norms"]["norm"].dims == ("occurrence", "param")


# --- analyses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["sample", "step"])
def test_the_analysis_sums_what_the_lists_say(per: str) -> None:
    raw = random_trace(per=per)
    sums = dict.fromkeys(raw.sample_id, 0.0)
    frame = raw.trace.topk.frame()
    for sample, shift in zip(frame["sample_id"].tolist(), frame["shift"].tolist(), strict=True):
        sums[sample] += abs(shift) if math.isfinite(shift) else 0
    found = example("analysis")["heaviest_samples"](raw.trace, n_samples=100)
    assert found["sample_id"].tolist() == sorted(sums, key=lambda sample: (-sums[sample], sample))
    assert found["moved"].tolist() == pytest.approx(sorted(sums.values(), reverse=True))
    assert found["occurrences"].tolist() == [raw.sample_id.count(sample) for sample in found["sample_id"]]
    assert len(example("analysis")["heaviest_samples"](raw.trace, n_samples=3)) == 3


# --- experiments ------------------------------------------------------------------------------------------------------


def test_the_experiment_trains_with_its_control_and_finds_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("examples.mechanisms.first")
    vars(module).update(example("experiment"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(mechanisms, "first", module, raising=False)
    (settings,) = blocks(PAGE, "yaml", "experiment")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "first.yaml").write_text(settings.text)
    given = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=first", f"run_dir={tmp_path / 'run'}"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("mechanisms", [*given, "callbacks.progress.refresh_rate=0", "trainer.accelerator=cpu"])
    found = run_experiment(cfg)
    claims = pd.read_csv(tmp_path / "run" / "claims.csv")
    assert claims["holds"].all() and len(claims) == 2
    assert found.measures("small")["accuracy"].iloc[-1] < 0.9
    assert len(pd.read_csv(tmp_path / "run" / "who_moved.csv")) == 15

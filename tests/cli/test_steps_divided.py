"""Commands about how the shifts of a step divide and agree: their tables are those of the library."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from lightning_gradtrace import Dense, Division, GradTrace, Norms, analysis, open_trace
from lightning_gradtrace.cli._output import json_value
from tests.cli.conftest import Run
from tests.test_callback import Model, fit

WEIGHT = "encoder.layers.0.linear1.weight"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces") / "d.zarr"
    n_rows = len(Model().get_parameter(WEIGHT))
    records = [Dense(), Norms(), Division(bases={WEIGHT: torch.eye(n_rows)})]
    fit(Model(), GradTrace(folder, records, params="*linear1*"), max_epochs=1)
    return folder


def tables(path: Path) -> dict[str, tuple[tuple[object, ...], pd.DataFrame]]:
    trace = open_trace(path)
    some = analysis.coherence(trace).query("step >= 1 and step <= 2")
    parts = analysis.division(trace, steps=slice(1, 2))
    waves = analysis.division(trace, components_of=WEIGHT)
    return {
        "coherence": (("--steps", "1:2"), some),
        "coherence --null": (
            ("--null", WEIGHT, "--steps", 1, "--seed", 3),
            analysis.sign_null(trace, WEIGHT, [1], seed=3),
        ),
        "division": ((), analysis.divided(analysis.division(trace), "param")),
        "division --by-step": (("--by-step", "--steps", "1:2"), analysis.divided(parts, ["step", "param"])),
        "division of": (("--components-of", WEIGHT), analysis.divided(waves, "component")),
        "concentration": (("--every", 2), analysis.self_influence(trace, every=2)),
    }


@pytest.mark.parametrize(
    "name",
    ["coherence", "coherence --null", "division", "division --by-step", "division of", "concentration"],
)
def test_json_holds_the_table_of_the_library(name: str, path: Path, run: Run) -> None:
    arguments, expected = tables(path)[name]
    done = run(name.split()[0], path, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["columns"] == list(expected.columns) and len(expected)
    rows = [[json_value(v) for v in row] for row in expected.itertuples(index=False, name=None)]
    assert [list(row.values()) for row in document["rows"]] == rows


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("coherence",), "reads a `Division` and a `Norms` record, and the trace lacks division, norms"),
        (("division",), "reads a `Division` record, and the trace holds none"),
        (("concentration",), "this analysis reads norms of shifts, and the trace holds ['topk']"),
        (("concentration", "--of", "all"), "'all' is none of samples, weights, overlap"),
        (("phases", "--of", "mood"), "['mood'] are none of its series, which are ['moved', 'participation']"),
        (("phases", "--series", "--changes"), "give one of --series and --changes"),
    ],
)
def test_what_a_trace_does_not_hold_is_said(command: tuple[str, ...], message: str, trace_path: Path, run: Run) -> None:
    done = run(command[0], trace_path, *command[1:])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())

"""`gradtrace enrichment`: its tables are those of the library, and what can't be meant is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace import analysis, open_trace
from lightning_gradtrace.cli._output import json_value
from tests.analysis.traces import write_trace
from tests.cli.conftest import Run

SHAPES = {"a.W_Q": (2, 3, 2), "a.W_O": (2, 2, 3), "mlp.weight": (4, 3)}


@pytest.fixture(scope="module")
def heads_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    ids = np.arange(40).reshape(8, 5)
    index = np.stack([np.sort(rng.choice(36, 9, replace=False)) for _ in range(40)])
    text = {sample: rng.integers(0, 5, 12).tolist() for sample in range(40)}
    weights = {step: {name: rng.normal(size=shape) for name, shape in SHAPES.items()} for step in (0, 4, 8)}
    folder = tmp_path_factory.mktemp("traces") / "h.zarr"
    shift = rng.normal(size=index.shape)
    write_trace(SHAPES, ids, index, shift=shift, text=text, vocab=list("abcde"), weights=weights, to=folder)
    return folder


def same(done: Any, expected: pd.DataFrame) -> bool:
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["command"], document["columns"]) == ("enrichment", list(expected.columns))
    rows = [[json_value(v) for v in row] for row in expected.itertuples(index=False, name=None)]
    return [list(row.values()) for row in document["rows"]] == rows


def test_patterns_and_tokens_are_those_of_the_library(heads_path: Path, run: Run, tmp_path: Path) -> None:
    trace, file = open_trace(heads_path), tmp_path / "samples.csv"
    pattern = pd.Series(np.arange(40) % 3 == 0, name="third").rename_axis("sample_id")
    pattern.to_csv(file)
    change = analysis.weight_change(trace, slice(2, 5))
    moved = analysis.head_shifts(trace, steps=slice(2, 5), along=change)
    seen = trace.occurrences[trace.occurrences["step"].between(2, 5)]
    expected = analysis.pattern_enrichment(moved, pattern, amount="toward", occurrences=seen)
    arguments = ("--pattern", f"{file}:third", "--along", "--steps", "2:5", "--json")
    assert same(run("enrichment", heads_path, *arguments), expected)
    moved = analysis.head_shifts(trace)
    by, seen = ["module", "head"], trace.occurrences
    some = analysis.token_enrichment(moved, trace, [1, 3], by=by, occurrences=seen, min_count=5, seed=4)
    arguments = ("--token", "b", "--token", "d", "--whole", "--min-count", 5, "--seed", 4, "--json")
    assert same(run("enrichment", heads_path, *arguments), some)
    groups = pd.DataFrame({"third": np.arange(40) % 3}).rename_axis("sample_id")
    groups.to_csv(file)
    expected = analysis.grouped_variance(moved, groups, by=by, occurrences=seen)
    assert same(run("enrichment", heads_path, "--groups", file, "--whole", "--json"), expected)
    every = analysis.token_enrichment(moved, trace, by=by, occurrences=seen)
    assert same(run("enrichment", heads_path, "--whole", "--json"), every)
    assert set(every["word"]) == set("abcde")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pattern", "none.csv:a"), "`none.csv` can't be read"),
        (("--pattern", "none.csv"), "`none.csv` names no column; write FILE.csv:COLUMN"),
        (("--groups", "none.csv"), "`none.csv` can't be read"),
        (("--token", "b", "--loss-token", "b"), "give one of --pattern, --token, --loss-token and --groups"),
        (("--token", "z"), "['z'] are not known; give words as the vocabulary writes them"),
        (("--loss-token", "b"), "`record` is 'token_grads', and this trace holds topk"),
        (("--along", "--steps", "9:12"), "keeps no two snapshots"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: tuple[str, ...], message: str, heads_path: Path, run: Run) -> None:
    done = run("enrichment", heads_path, *arguments)
    assert done.exit_code
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_a_column_that_is_missing_is_said(heads_path: Path, run: Run, tmp_path: Path) -> None:
    pd.DataFrame({"sample_id": [0], "a": [1]}).to_csv(tmp_path / "p.csv")
    done = run("enrichment", heads_path, "--pattern", f"{tmp_path / 'p.csv'}:b")
    assert done.exit_code
    assert "expected `sample_id` and `b`" in " ".join(done.stderr.replace("│", " ").split())

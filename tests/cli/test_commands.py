"""Every command: its table equals the function behind it, as text, JSON and CSV; its help teaches."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lightning_gradtrace import analysis, open_trace
from lightning_gradtrace.cli._app import COMMANDS
from lightning_gradtrace.cli._output import json_value
from tests.cli.conftest import Run

CHAIN = ("--min-count", 5, "--entries", 20)


def tables(path: Path) -> dict[str, tuple[tuple[Any, ...], pd.DataFrame]]:
    """Return for each command its arguments and the table that the library makes."""
    trace = open_trace(path)
    entries = analysis.frequent_entries(trace, 20)
    notable = analysis.notable_tokens(trace, entries, min_count=5)
    by_neuron = analysis.notable_tokens(trace, entries, by="neuron", method="hypergeometric", min_count=5, max_q=0.5)
    moved = analysis.movement(trace, by="param")
    some = analysis.outliers(trace, "neuron", n=2, steps=slice(3, 9))
    return {
        "outliers": (("--of", "neuron", "--n", 2, "--steps", "3:9"), some.loc[:, ~some.columns.duplicated()]),
        "tokens": (CHAIN, notable),
        "tokens by neuron": (
            (*CHAIN, "--by", "neuron", "--method", "hypergeometric", "--max-q", 0.5),
            by_neuron,
        ),
        "neurons": (CHAIN, analysis.neurons(trace, entries, notable)),
        "movers": (("--by", "module", "--n", 2), analysis.movers(trace, by="module", n=2)),
        "formation": ((), analysis.formation(moved)),
        "formation --series": (("--series",), moved),
        "formation --changes": (("--changes",), analysis.change_points(moved, "moved", by=["param", "module"])),
        "weights": ((), analysis.weight_statistics(trace)),
        "weights --spectra": (
            ("--spectra", "--params", "hidden.weight"),
            analysis.weight_spectra(trace, ["hidden.weight"]),
        ),
        "weights --neurons": (("--neurons", "--axis", "out"), analysis.neuron_weights(trace, None, "out")),
        "entries": (("--entries", 9, "--steps", "2:8"), analysis.frequent_entries(trace, 9, slice(2, 8))),
        "directions": (("--param", "head.weight", "--n", 2), analysis.principal_directions(trace, "head.weight", 2)[1]),
        "directions --shifts": (
            ("--param", "head.weight", "--shifts", "--axis", "out", "--steps", "3:9"),
            analysis.direction_shifts(
                trace,
                "head.weight",
                analysis.principal_directions(trace, "head.weight", 5, "out", steps=slice(3, 9))[0],
                "out",
                steps=slice(3, 9),
            ),
        ),
        "bigrams": (
            ("--embedding", "head.weight", "--n", 3, "--summed"),
            analysis.bigram_shifts(trace, "head.weight", n=3, summed=True),
        ),
        "bigrams --alignment": (
            ("--embedding", "head.weight", "--alignment"),
            analysis.bigram_alignment(trace, "head.weight"),
        ),
        "phases": (("--window", 4), analysis.trace_phases(trace, window=4)),
        "phases --series": (
            ("--series", "--every", 2, "--of", "moved"),
            analysis.trace_series(trace, every=2).query("series == 'moved'"),
        ),
        "phases --changes": (("--changes",), analysis.series_changes(analysis.trace_series(trace))),
        "concentration weights": (
            ("--of", "weights", "--every", 5, "--steps", "5:"),
            analysis.shift_sparsity(trace, every=5, steps=slice(5, None)),
        ),
        "concentration overlap": (("--of", "overlap"), analysis.selection_overlap(trace)),
    }


NAMES = ["outliers", "tokens", "tokens by neuron", "neurons", "movers", "formation", "formation --series"]
NAMES += ["entries", "directions", "directions --shifts"]
NAMES += ["formation --changes", "weights", "weights --spectra", "weights --neurons", "bigrams"]
NAMES += ["bigrams --alignment", "phases", "phases --series", "phases --changes"]
NAMES += ["concentration weights", "concentration overlap"]


@pytest.mark.parametrize("name", NAMES)
def test_json_and_csv_hold_all_rows_of_the_table_of_the_library(
    name: str, run: Run, trace_path: Path, tmp_path: Path
) -> None:
    arguments, expected = tables(trace_path)[name]
    command = name.split()[0]
    done = run(command, trace_path, *arguments, "--json", "--output", tmp_path / "out.csv")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert list(document) == ["command", "columns", "rows"]
    assert (document["command"], document["columns"]) == (command, list(expected.columns))
    assert [list(row.values()) for row in document["rows"]] == [
        [json_value(v) for v in row] for row in expected.itertuples(index=False, name=None)
    ]
    again = pd.read_csv(tmp_path / "out.csv", keep_default_na=False, na_values=[""], lineterminator="\n")
    assert list(again.columns) == list(expected.columns) and len(again) == len(expected)
    for column in expected.select_dtypes("number"):
        np.testing.assert_allclose(again[column].to_numpy(float), expected[column].to_numpy(float), rtol=1e-6)
    assert f"{len(expected):,} rows written to" in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_table_shows_the_first_rows_and_says_how_many_more(name: str, run: Run, trace_path: Path) -> None:
    arguments, expected = tables(trace_path)[name]
    done = run(name.split()[0], trace_path, *arguments, "--rows", 1)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == list(expected.columns) if len(expected) else lines[0].startswith("no rows")
    assert len(lines) == min(len(expected), 1) + 2 * (len(expected) > 0) + (len(expected) > 1) + (len(expected) == 0)
    assert len(expected) <= 1 or lines[-1].startswith(f"({len(expected) - 1} more rows")


def test_tokens_that_read_null_or_na_survive_and_none_reaches_the_terminal(
    run: Run, trace_path: Path, tmp_path: Path
) -> None:
    done = run("tokens", trace_path, *CHAIN, "--rows", 0, "-o", tmp_path / "t.csv")
    assert done.stdout == ""
    table = pd.read_csv(tmp_path / "t.csv", keep_default_na=False, na_values=[""])
    assert {"NA", "null", "\x1b[31mred\n"} <= set(table["text"])
    shown = run("tokens", trace_path, *CHAIN, "--rows", 0).stdout
    assert "\x1b" not in shown and r"\x1b[31mred\n" in shown


def test_heads_by_number(run: Run, tmp_path: Path) -> None:
    from tests.analysis.traces import write_trace

    index = np.array([[0, 9, 13]] * 6)
    write_trace({"a.in_proj_weight": (12, 4)}, np.arange(6).reshape(2, 3), index, to=tmp_path / "h.zarr")
    done = run("heads", tmp_path / "h.zarr", "--heads", "a=2", "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [(row["head"], row["part"], row["shifts"]) for row in rows if row["shifts"]] == [
        (0, "query", 6),
        (1, "query", 12),
    ] or sum(row["shifts"] for row in rows) == 18
    assert len(rows) == 6


def test_info_names_model_records_and_parameters(run: Run, trace_path: Path) -> None:
    rows = {row["name"].strip(): row["value"] for row in json.loads(run("info", trace_path, "--json").stdout)["rows"]}
    assert rows["steps"] == "24" and rows["occurrences"] == "240" and rows["records"] == "topk"
    assert rows["weight snapshots"] == "3" and rows["samples with stored inputs"] == "20"
    assert rows["hidden.weight"] == "4 x 4"


def test_plan_equals_the_library_and_adds_a_total(run: Run, trace_path: Path, model_file: Path) -> None:
    from lightning_gradtrace.record import Norms, TopK
    from lightning_gradtrace.record.plan import plan

    shape = ("--steps", 50, "--samples", 10, "--record", "topk=4", "--record", "norms", "--json")
    document = json.loads(run("plan", "--model", f"{model_file}:build", "--params", "h*", *shape).stdout)
    torch.manual_seed(0)
    model = nn.ModuleDict({"hidden": nn.Linear(4, 4, bias=False), "head": nn.Linear(4, 12, bias=False)})
    expected = plan(model, [TopK(4), Norms()], 50, 10, params=["h*"])
    assert [row["array"] for row in document["rows"][:-1]] == expected["array"].tolist()
    assert document["rows"][-1]["bytes"] == sum(row["bytes"] for row in document["rows"][:-1])
    like = json.loads(run("plan", "--like", trace_path, *shape).stdout)
    assert [row["array"] for row in like["rows"]] == [row["array"] for row in document["rows"]]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_export_writes_every_kept_entry(form: str, run: Run, trace_path: Path, tmp_path: Path) -> None:
    done = run("export", trace_path, tmp_path / "new", "--format", form)
    assert done.exit_code == 0, done.stderr
    assert [Path(line).stem for line in done.stdout.splitlines()] == ["params", "steps", "occurrences", "topk"]
    file = tmp_path / "new" / f"topk.{form}"
    kept = pd.read_csv(file) if form == "csv" else pd.read_parquet(file)
    frame = open_trace(trace_path).topk.frame()
    assert (
        kept["index"].tolist() == frame["index"].tolist() and kept["sample_id"].tolist() == frame["sample_id"].tolist()
    )
    np.testing.assert_allclose(kept["shift"], frame["shift"], rtol=1e-6)
    again = run("export", trace_path, tmp_path / "new", "--format", form)
    assert again.exit_code in (3, 4) and "already holds" in again.stderr


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_says_what_it_does_shows_an_example_and_explains_every_option(name: str, run: Run) -> None:
    done = run(name, "--help")
    assert done.exit_code == 0
    assert f"gradtrace {name}" in done.stdout.partition("Example")[2]
    options = done.stdout.partition("Options:")[2]
    for line in options.splitlines():
        if line.strip().startswith("-"):
            assert len(line.split()) > 2, f"`gradtrace {name}` doesn't explain {line.strip()}"


def test_help_lists_the_commands_and_exit_codes(run: Run) -> None:
    text = run("--help").stdout
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert "Exit status" in text and "  3  there is no trace" in text
    assert run("--version").stdout.startswith("gradtrace ")


def test_csv_of_a_table_with_tuples_reads_back(run: Run, trace_path: Path, tmp_path: Path) -> None:
    run("neurons", trace_path, *CHAIN, "-o", tmp_path / "n.csv")
    text = (tmp_path / "n.csv").read_text(encoding="utf-8")
    table = pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""])
    assert all(isinstance(json.loads(words), list) for words in table["text"])


@pytest.mark.parametrize("suffix", ["npy", "csv"])
def test_directions_come_from_a_file(suffix: str, run: Run, trace_path: Path, tmp_path: Path) -> None:
    basis, file = np.array([[1.0, 2, 0, 0], [0, 0, 0, 3]]), tmp_path / f"basis.{suffix}"
    np.save(file, basis) if suffix == "npy" else np.savetxt(file, basis, delimiter=",")
    done = run("directions", trace_path, "--param", "hidden.weight", "--basis", file, "--json")
    assert done.exit_code == 0, done.stderr
    expected = analysis.direction_shifts(open_trace(trace_path), "hidden.weight", basis)
    rows = json.loads(done.stdout)["rows"]
    np.testing.assert_allclose([row["shift"] for row in rows], expected["shift"])
    file.write_bytes(b"no numbers")
    wrong = run("directions", trace_path, "--param", "hidden.weight", "--basis", file)
    assert wrong.exit_code == 2 and "can't be read" in " ".join(wrong.stderr.split())


def test_neurons_of_a_trace_without_texts_come_without_words(run: Run, tmp_path: Path) -> None:
    from tests.analysis.traces import write_trace

    write_trace({"a.weight": (3, 4)}, np.arange(6).reshape(3, 2), np.array([[1, 6]] * 6), to=tmp_path / "t.zarr")
    rows = json.loads(run("neurons", tmp_path / "t.zarr", "--json").stdout)["rows"]
    assert [(row["neuron"], row["n_occurrences"], row["text"]) for row in rows] == [(1, 6, []), (2, 6, [])]
    words = run("tokens", tmp_path / "t.zarr")
    assert words.exit_code == 2 and "the trace keeps no inputs" in words.stderr

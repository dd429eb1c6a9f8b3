"""`gradtrace report`: the page from a trace, from tables, and with the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_gradtrace import analysis, open_trace, overview
from lightning_gradtrace.report import write_tables
from tests.analysis.traces import write_trace
from tests.cli.conftest import VOCABULARY, Run

CHAIN = ("--min-count", 5, "--entries", 20)


def data_of(page: Path) -> dict:
    return json.loads(page.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0])


def test_the_page_holds_what_the_analyses_say(run: Run, trace_path: Path, tmp_path: Path) -> None:
    done = run("report", trace_path, "-o", tmp_path / "p.html", *CHAIN)
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'p.html'}\n"), done.stderr
    data = data_of(tmp_path / "p.html")
    trace = open_trace(trace_path)
    entries = analysis.frequent_entries(trace, 20)
    neurons = analysis.neurons(trace, entries, analysis.notable_tokens(trace, entries, min_count=5))
    assert [[data["words"][t] for t in n["t"]] for n in data["neurons"]] == [list(text) for text in neurons["text"]]
    total = analysis.movement(trace, every=1000)
    for n in data["neurons"]:
        row = total[(total["param"] == data["params"][n["p"]][0]) & (total["neuron"] == n["n"])]
        assert n["m"] == pytest.approx(row["moved"].sum(), rel=1e-4)
        assert sum(n["l"]) == pytest.approx(n["m"], rel=1e-3)
    movers = analysis.movers(trace, entries)
    first = data["neurons"][0]
    of_first = movers[(movers["param"] == data["params"][first["p"]][0]) & (movers["neuron"] == first["n"])]
    assert [sample for sample, _ in first["x"]] == of_first["sample_id"].head(10).tolist()
    sample = str(first["x"][0][0])
    assert " ".join(data["words"][w] for w in data["texts"][sample]) == trace.text(int(sample))
    q = analysis.notable_tokens(trace, entries, by="neuron", method="hypergeometric", min_count=5)
    own = q[(q["param"] == data["params"][first["p"]][0]) & (q["neuron"] == first["n"])]
    assert first["v"] == pytest.approx(-np.log10(own["q_value"].min()), rel=1e-4, abs=1e-9)


def test_with_the_model_flips_stand_beside_their_controls(
    run: Run, trace_path: Path, model_file: Path, tmp_path: Path
) -> None:
    done = run("report", trace_path, "-o", tmp_path / "p.html", *CHAIN, "--model", f"{model_file}:build", "--ablate", 1)
    assert done.exit_code == 0, done.stderr
    data = data_of(tmp_path / "p.html")
    (ablated,) = [n for n in data["neurons"] if n["f"]]
    assert set(ablated["c"]) == {"random", "neuron", "frequency", "null"}
    assert all(flips <= count for _, flips, count in ablated["f"])
    assert data["layers"] and data["pooled"]


def test_tables_of_a_folder_take_precedence_and_the_null_control_survives(
    run: Run, trace_path: Path, model_file: Path, tmp_path: Path
) -> None:
    from lightning_gradtrace.cli._model import load_model

    model, _ = load_model(f"{model_file}:build")
    tables = overview.overview_tables(open_trace(trace_path), n_entries=20, min_count=5, model=model, n_ablated=1)
    write_tables(tmp_path / "tables", tables)
    done = run("report", trace_path, "-o", tmp_path / "p.html", "--tables", tmp_path / "tables")
    assert done.exit_code == 0, done.stderr
    from lightning_gradtrace.report import page_document

    data, expected = data_of(tmp_path / "p.html"), page_document(tables, "Trace of a [b] é.zarr")
    assert data["neurons"] == json.loads(json.dumps(expected["neurons"]))
    assert any("null" in n["c"] for n in data["neurons"])
    assert data["phases"] == json.loads(json.dumps(expected["phases"]))
    assert {"first_step", "series", "expected"} <= set(tables["phases"].columns)


def test_a_trace_without_texts_has_a_page_without_words(run: Run, tmp_path: Path) -> None:
    write_trace({"a.weight": (3, 4)}, np.arange(6).reshape(2, 3), np.array([[0, 5]] * 6), to=tmp_path / "t.zarr")
    done = run("report", tmp_path / "t.zarr")
    assert done.exit_code == 0, done.stderr
    data = data_of(tmp_path / "t.html")
    assert [(n["n"], n["t"], n["v"]) for n in data["neurons"]] == [(0, [], None), (1, [], None)]


@pytest.mark.parametrize("per", ["sample", "step"])
def test_both_selections_give_a_page(per: str, run: Run, tmp_path: Path) -> None:
    text = {i: [i % 12] * 4 for i in range(6)}
    index = np.array([[0, 5]] * 6)
    write_trace(
        {"a.weight": (3, 4)},
        np.arange(6).reshape(2, 3),
        index,
        text=text,
        vocab=VOCABULARY,
        per=per,
        to=tmp_path / "t.zarr",
    )
    assert run("report", tmp_path / "t.zarr", "--min-count", 1).exit_code == 0


def test_where_the_page_goes_is_checked_first(run: Run, trace_path: Path, tmp_path: Path) -> None:
    assert "is a folder, expected a file" in run("report", trace_path, "-o", tmp_path).stderr
    assert run("report", trace_path, "-o", tmp_path / "no" / "p.html").exit_code == 2
    assert run("report", trace_path, "-o", tmp_path / "p.html", "--tables", tmp_path).exit_code == 4
    assert not (tmp_path / "p.html").exists()

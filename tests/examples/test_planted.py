"""Ground truth: what was planted comes up, and the null finds chance."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from examples.analyze import analyze
from examples.data.planted import TOPICS
from examples.ground_truth import planted_scores
from lightning_gradtrace import analysis, open_trace
from lightning_gradtrace.store.reader import Trace
from tests.examples.conftest import Run

WORDS = {topic: words.split() for topic, words in TOPICS.items()}
find_tokens = partial(analysis.notable_tokens, min_count=20, min_relative=2.0)


@pytest.fixture(scope="module")
def run(run_experiment: Run) -> Path:
    return run_experiment("planted", "data.n_documents=240", "trainer.max_epochs=4")


@pytest.fixture(scope="module")
def trace(run: Path) -> Trace:
    return open_trace(run / "trace.zarr")


@pytest.fixture(scope="module")
def entries(trace: Trace) -> pd.DataFrame:
    return analysis.frequent_entries(trace, n_entries=200)


def test_notable_tokens_are_planted_words_of_one_topic_each(trace: Trace, entries: pd.DataFrame) -> None:
    notable = find_tokens(trace, entries)
    scores = planted_scores(notable, WORDS)
    assert notable["entry"].nunique() > 100
    assert scores["planted_share"] > 0.95
    assert scores["purity"] > 0.8
    assert scores["recall"] > 0.9


@pytest.mark.parametrize("within", ["trace", "epoch", "sample"])
def test_permuted_links_find_chance(trace: Trace, entries: pd.DataFrame, within: str) -> None:
    true, links = find_tokens(trace, entries), analysis.permuted_links(trace, seed=1, within=within)
    assert len(find_tokens(trace, entries, links=links)) < 0.05 * len(true)
    # Without a smallest relative frequency something is always found: frequent words, of no topic in particular.
    anything = analysis.notable_tokens(trace, entries, n_relative=10, links=links)
    informed = analysis.notable_tokens(trace, entries, n_relative=10)
    assert anything["relative"].median() < 1.5 < 1.8 < informed["relative"].median()
    assert planted_scores(anything, WORDS)["purity"] < planted_scores(informed, WORDS)["purity"] - 0.2


def test_analysis_writes_tables_figures_and_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # How many neurons stay below the experiment's largest share of samples hangs on the rounding of the machine.
    few = {"n_neurons": 2, "n_samples": 40, "n_other_neurons": 2, "n_resamples": 99, "max_sample_share": 1.0}
    tables = analyze(run, tmp_path / "out", few)
    assert len(tables["ablation"]) == 2
    assert set(tables["controls"]["control"]) == {"random", "neuron", "frequency", "null"}
    assert set(tables["layers"]["param"]) == set(tables["ablation"]["param"])
    assert (tmp_path / "out" / "index.html").stat().st_size > 10_000
    shown = capsys.readouterr().out
    for text in ("notable tokens", "95 % interval", "Ground truth: planted share", "index.html", "trace.zarr", "*.png"):
        assert text in shown


def test_analysis_without_a_neuron_to_switch_off_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = analyze(run, tmp_path, {"min_count": 10**9, "n_resamples": 9})
    assert tables["ablation"].empty
    assert "no neuron was switched off" in capsys.readouterr().out
    assert "No neuron was switched off" in (tmp_path / "index.html").read_text(encoding="utf-8")

"""A survey asks everything of a run; one job that fails, is killed or takes too long leaves the others alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from examples.survey.__main__ import survey
from examples.survey.jobs import Job, run_jobs
from examples.survey.questions import QUESTIONS, answer, jobs_of
from examples.train import CONF
from lightning_gradtrace import analysis, open_trace
from lightning_gradtrace.report import read_tables
from tests.examples.conftest import Run

TINY = ["model.width=8", "model.hidden=8", "model.n_layers=1", "model.n_heads=2", "data.n_documents=20"]
TINY += ["data.contexts_per_document=1", "trainer.max_epochs=3", "+callbacks.gradtrace.weights_every_n_steps=2"]
TINY += ["callbacks.gradtrace.record.k=20", "analysis.n_entries=30", "analysis.min_count=2"]
SMALL = ["n_samples=8", "n_control_samples=8", "n_null_neurons=2", "n_neurons=4", "n_permutations=1", "n_texts=6"]
SMALL += ["n_entries=2", "n_best=2", "n_resamples=19", "n_other_neurons=1", "batch_size=4", "device=cpu"]
# All in one process; the chain is asked before.
QUICK = [name for name in QUESTIONS if name != "chain"]


def leave(path: Path, text: str) -> None:
    path.write_text(text)


def fail() -> None:
    raise ValueError("no such thing")


def vanish() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def linger(seconds: float) -> None:
    time.sleep(seconds)


def settings(run: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("survey", [f"run={run}", *SMALL, *overrides])


def test_jobs_that_fail_or_are_killed_leave_the_others_alone(tmp_path: Path) -> None:
    jobs = [
        Job("failing", fail),
        Job("vanishing", vanish),
        Job("well", leave, (tmp_path / "a", "here")),
        Job("next", leave, (tmp_path / "b", "too"), after="well"),
        Job("orphan", leave, (tmp_path / "c", "never"), after="failing"),
    ]
    done = run_jobs(jobs, tmp_path / "jobs", workers=2, preload=[__name__]).set_index("job")
    assert done["state"].to_dict() == {
        "failing": "failed",
        "vanishing": "failed",
        "well": "done",
        "next": "done",
        "orphan": "not begun",
    }
    assert done.loc["failing", "error"] == "ValueError: no such thing"
    assert done.loc["vanishing", "error"] == "the process ended with exit code -9"
    assert "no such thing" in (tmp_path / "jobs" / "failing.log").read_text()
    assert (tmp_path / "a").read_text() == "here" and (tmp_path / "b").exists() and not (tmp_path / "c").exists()


def test_what_runs_at_the_deadline_is_stopped(tmp_path: Path) -> None:
    jobs = [Job("long", linger, (60.0,)), Job("late", leave, (tmp_path / "a", "never"))]
    started = time.monotonic()
    done = run_jobs(jobs, tmp_path / "jobs", workers=1, deadline=started + 1.0, preload=[__name__])
    assert done["state"].tolist() == ["stopped", "not begun"]
    assert time.monotonic() - started < 50


@pytest.fixture(scope="module")
def planted(run_experiment: Run) -> Path:
    return run_experiment("planted", *TINY, "seed=5")


@pytest.fixture(scope="module")
def asked(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("survey")
    survey(settings(planted, f"output={output}", "workers=2", "only=[chain,facts,neurons]"))
    return output


def test_tables_are_those_of_the_analyses_and_parts_are_joined(planted: Path, asked: Path) -> None:
    assert (pd.read_csv(asked / "jobs.csv")["state"] == "done").all()
    trace, tables = open_trace(planted / "trace.zarr"), read_tables(asked / "tables")
    entries = analysis.frequent_entries(trace, 30)
    assert tables["entries"]["entry"].tolist() == entries["entry"].tolist()
    found = tables["neurons"].query("n_notable > 0").head(4)
    keys = ["param", "axis", "neuron"]
    ablation = pd.read_csv(asked / "tables" / "ablation.csv")
    assert sorted(map(tuple, ablation[keys].to_numpy())) == sorted(map(tuple, found[keys].to_numpy()))
    assert len(pd.read_csv(asked / "tables" / "control_peers.csv")) >= len(found)
    summary = (asked / "summary.md").read_text()
    assert "Layer table, all neurons" in summary and "validation_perplexity" in summary


@pytest.mark.parametrize("name", QUICK)
def test_every_question_is_answered(name: str, planted: Path, asked: Path) -> None:
    cfg = settings(planted, f"output={asked}")
    answer(cfg, name, 0, 1)
    assert any(file.stat().st_size for file in (asked / "tables").glob("*.csv"))


def test_unknown_questions_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`only` names the questions \['why'\], expected some of \['chain', "):
        jobs_of(settings(tmp_path, "only=[why]"))

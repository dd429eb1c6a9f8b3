"""No rank waits for another one for ever, and what all have recorded is never lost."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from lightning_gradtrace import open_trace
from tests.ranks import failures
from tests.ranks.failures import FAILS_AT
from tests.ranks.launch import Job, Outcome, launch, values
from tests.store.test_resuming import assert_same_arrays

pytestmark = pytest.mark.thorough

PLACES = ["batch", "backward", "before the step", "after the step", "sum", "comparison", "record", "append"]
TOKEN_PLACES = ["tokens: batch", "tokens: beginning", "tokens: choice", "tokens: shares"]
SHARDED_PLACES = ["backward", "sum", "record", *TOKEN_PLACES]
JOBS = {
    "plain": Job(failures.plain),
    **{f"disable {where}": Job(failures.fail, (where, "disable")) for where in PLACES},
    "raise record": Job(failures.fail, ("record", "raise")),
    "no place": Job(failures.no_place),
    "taken": Job(failures.taken),
    "killed": Job(failures.killed),
    "resumed": Job(failures.resumed),
    "resumed alone": Job(failures.resumed_alone, size=1),
    **{kind: Job(failures.forked, (kind,), size=1) for kind in ("ddp_fork", "ddp_notebook")},
    "plain sharded": Job(failures.plain, (True,)),
    **{f"disable {where} sharded": Job(failures.fail, (where, "disable", True)) for where in SHARDED_PLACES},
    "raise tokens: shares sharded": Job(failures.fail, ("tokens: shares", "raise", True)),
    "interrupted": Job(failures.interrupted),
    "raise record sharded": Job(failures.fail, ("record", "raise", True)),
    "killed sharded": Job(failures.killed, (True,)),
    "whole sharded": Job(failures.whole),
    "resumed sharded": Job(failures.resumed, (True,)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failures")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, list[Outcome]]:
    return dict(zip(JOBS, launch(folder, list(JOBS.values())), strict=True))


@pytest.mark.parametrize(
    ("where", "kind"), [*((where, "") for where in PLACES), *((where, " sharded") for where in SHARDED_PLACES)]
)
def test_an_error_on_one_rank_ends_all_parts_at_one_step_and_the_training_goes_on(where, kind, folder, outcomes):
    ranks = values(outcomes[f"disable {where}{kind}"])
    expected = values(outcomes[f"plain{kind}"])[0]
    for found in ranks:
        assert "error" not in found and len(found["warnings"]) == 1
        assert all(np.array_equal(weight, expected[name]) for name, weight in found["weights"].items())
    trace = open_trace(folder / f"{where}-disable{kind.replace(' ', '-')}.zarr")
    reasons = [part.attrs["end_reason"] for part in trace.parts]
    assert reasons[1] == "RuntimeError: out of luck"
    assert reasons[0] == "RankError: rank 1 (RuntimeError: out of luck) can't go on recording, so that rank 0 stops too"
    assert not trace.attrs["complete"] and "rank 1: RuntimeError: out of luck" in trace.attrs["end_reason"]
    # What fails when the row of a step is made is told in the next step, when rank 0 has its row already.
    late = where in ("record", "append", "comparison")
    assert [part.n_steps for part in trace.parts] == [FAILS_AT + late, FAILS_AT]
    assert trace.n_steps == FAILS_AT and trace.verify().ok, str(trace.verify())


@pytest.mark.parametrize(("where", "kind"), [("record", ""), ("record", " sharded"), ("tokens: shares", " sharded")])
def test_an_error_that_is_raised_is_raised_on_all_ranks(where, kind, folder, outcomes):
    ranks = values(outcomes[f"raise {where}{kind}"])
    assert ranks[1]["error"] == "RuntimeError: out of luck"
    assert ranks[0]["error"].startswith("RankError: rank 1 (RuntimeError: out of luck) can't go on recording")
    assert open_trace(folder / f"{where}-raise{kind.replace(' ', '-')}.zarr").n_steps == FAILS_AT


def test_a_pass_that_breaks_off_in_the_middle_leaves_the_training_as_it_was(folder, outcomes):
    expected = values(outcomes["plain sharded"])[0]
    for weights, warned in values(outcomes["interrupted"]):
        assert len(warned) == 1 and warned[0].endswith("training goes on: RuntimeError: out of luck")
        assert all(np.array_equal(weight, expected[name]) for name, weight in weights.items())
    assert open_trace(folder / "interrupted.zarr").n_steps == FAILS_AT


def test_no_rank_begins_if_one_can_not_write(folder, outcomes):
    zero, one = values(outcomes["no place"])
    assert one.startswith("StoreError: ") and "can't be written" in one
    assert zero.startswith("RankError: rank 1 (StoreError: ") and "so that rank 0 stops too" in zero
    trace = open_trace(folder / "no-place.zarr")
    assert trace.n_steps == 0 and not trace.attrs["complete"]
    assert trace.params["param"].tolist() and len(trace.occurrences) == 0 and trace.verify().ok
    assert any("parts of its 2 ranks were being created" in note for note in trace.verify().notes)


def test_what_is_no_trace_is_left_alone(folder, outcomes):
    zero, one = values(outcomes["taken"])
    assert zero.startswith("StoreError: ") and "holds files that are not a trace" in zero
    assert one.startswith("RankError: rank 0 (StoreError: ")
    assert [p.name for p in (folder / "taken.zarr").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(("kind", "complete"), [("", "ddp_fork"), ("-sharded", "whole-sharded-run")])
def test_a_killed_rank_loses_what_it_had_not_committed_and_no_more(kind, complete, folder, outcomes):
    zero, one = outcomes[f"killed{kind.replace('-', ' ')}"]
    assert one.exitcode == -signal.SIGKILL and zero.error is not None
    trace = open_trace(folder / f"killed{kind}.zarr")
    assert [part.n_steps for part in trace.parts] == [4, 2] and trace.n_steps == 2
    report = trace.verify()
    assert report.ok, str(report)
    assert "ranks committed different numbers of steps (rank 0 4, rank 1 2)" in str(report)
    whole = open_trace(folder / f"{complete}.zarr")
    n = trace.n_occurrences
    assert trace.occurrences.equals(whole.occurrences.iloc[:n])
    assert trace.topk.frame().equals(whole.topk.frame(steps=slice(0, trace.n_steps - 1)))
    assert trace.topk_step.frame().equals(whole.topk_step.frame(steps=slice(0, trace.n_steps - 1)))
    name = trace.params["param"][0]
    assert np.array_equal(trace.dense[name][:], whole.dense[name][:n])


@pytest.mark.parametrize("kind", ["", "sharded"])
def test_a_resumed_training_ends_with_the_same_parts(kind, folder, outcomes):
    values(outcomes[f"resumed {kind}".strip()])
    trace, whole = open_trace(folder / kind / "resumed.zarr"), open_trace(folder / kind / "whole.zarr")
    assert trace.attrs["complete"] and trace.n_steps == whole.n_steps == 9
    for found, expected in zip(trace.parts, whole.parts, strict=True):
        assert_same_arrays(found, expected)
        assert found.attrs["resumed"][0]["steps"] == 4
    assert trace.topk.frame().equals(whole.topk.frame()) and trace.verify().ok


def test_another_number_of_processes_does_not_resume(outcomes):
    (error,) = values(outcomes["resumed alone"])
    assert error.startswith("ValueError: GradTrace: the checkpoint belongs to a trace that 2 processes recorded")
    assert "this run has one process" in error


@pytest.mark.parametrize("kind", ["ddp_fork", "ddp_notebook"])
def test_processes_that_lightning_forks(kind, folder, outcomes):
    """For those that it starts anew see `test_started.py`."""
    values(outcomes[kind])
    trace = open_trace(folder / f"{kind}.zarr")
    assert trace.attrs["complete"] and trace.n_steps == 6 and trace.verify().ok

"""Records are kept when their schedules say so, and the trace says which rows they have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradtrace import GradTrace, open_trace
from lightning_gradtrace.record import (
    Dense,
    EveryNSteps,
    Factored,
    LogSpaced,
    Norms,
    Predicate,
    Schedule,
    Sketch,
    StepRanges,
    TopK,
)
from tests.record.steps import dense_shifts, make_step, record_steps
from tests.test_callback import fit, make


def is_even(step: int) -> bool:
    return step % 2 == 0


SCHEDULES = [
    EveryNSteps(3, first=1),
    EveryNSteps(4, first=1, width=2),
    StepRanges([(0, 2), (4, None)]),
    LogSpaced(2),
    Predicate(is_even),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("record", [TopK, Dense, Factored, Sketch, Norms])
def test_a_record_with_a_schedule_equals_the_same_steps_of_one_without(tmp_path: Path, record, schedule) -> None:
    arguments = {"k": 5} if record is TopK else {}
    steps = [make_step(number, [2, 1], [3, 2]) for number in range(7)]
    every = record_steps(tmp_path / "a.zarr", [record(**arguments), TopK(3, per="step")], steps)
    some = record_steps(tmp_path / "b.zarr", [record(**arguments, schedule=schedule), TopK(3, per="step")], steps)
    assert some.verify().ok, str(some.verify())
    due = [number for number in range(7) if schedule.due(number)]
    assert 0 < len(due) < 7 and schedule.count(7) == len(due)
    occurrences = np.flatnonzero(np.isin(some.occurrences["step"], due))
    group = record.__name__.lower()
    if record is TopK:
        found, expected = some.topk.frame(), every.topk.frame(steps=due)
        assert found.equals(expected)
        assert some.topk.frame(steps=[n for n in range(7) if n not in due]).empty
        assert some.topk.n_rows == len(occurrences)
    elif record is Norms:
        assert some.norms.frame().equals(every.norms.frame(occurrences))
    else:
        name = "outer"
        for i in occurrences[:4]:
            a, b = (getattr(trace, group)[name] for trace in (some, every))
            if record is Sketch:
                np.testing.assert_array_equal(some.sketch.vectors(i, name), every.sketch.vectors(i, name))
            else:
                np.testing.assert_array_equal(a.shifts(i), b.shifts(i))
        with pytest.raises(KeyError):
            missing = np.setdiff1d(np.arange(21), occurrences)[0]
            some.sketch.vectors(missing) if record is Sketch else getattr(some, group)[name].shifts(missing)
    assert dense_shifts(steps)["outer"].shape[0] == some.n_occurrences


def test_topk_per_step_with_a_schedule_names_its_steps(tmp_path: Path) -> None:
    steps = [make_step(number, [2], [3]) for number in range(6)]
    trace = record_steps(tmp_path / "a.zarr", [TopK(4, per="step", schedule=4), TopK(2)], steps)
    assert trace.verify().ok, str(trace.verify())
    assert trace.array("topk_step/step")[:].tolist() == [0, 4]
    assert sorted(set(trace.topk_step.frame()["step"])) == [0, 4]
    assert trace.to_xarray()["topk_step"]["step"].values.tolist() == [0, 4]
    assert [len(block) for block in trace.topk_step.blocks()] == [8]


def test_damaged_rows_of_a_record_are_found(tmp_path: Path) -> None:
    import zarr

    steps = [make_step(number, [2], [3]) for number in range(4)]
    record_steps(tmp_path / "a.zarr", [Norms(schedule=2)], steps)
    array = zarr.open_array(tmp_path / "a.zarr" / "norms" / "occurrence", mode="r+")
    array[1] = 99
    report = str(open_trace(tmp_path / "a.zarr").verify())
    assert "`norms/occurrence` does not rise" in report
    assert "`norms/occurrence` names rows that the trace doesn't hold" in report


def test_a_training_captures_only_steps_that_a_record_wants(tmp_path: Path) -> None:
    records = [TopK(5, schedule=EveryNSteps(4)), Norms(schedule=StepRanges([(3, 5)]))]
    fit(make(), GradTrace(tmp_path / "a.zarr", records))
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.verify().ok
    assert trace.steps.index.tolist() == [0, 3, 4, 8]
    assert sorted(set(trace.topk.frame()["step"])) == [0, 4, 8]
    assert sorted(set(trace.occurrences["step"].iloc[trace.norms.occurrence])) == [3, 4]
    described = trace.attrs["records"]
    assert described["topk"]["schedule"] == {"kind": "every_n_steps", "n": 4, "first": 0, "width": 1}
    assert described["topk"]["arguments"] == {"k": 5, "per": "sample", "prune": True}
    assert described["norms"] == {
        "record": "Norms",
        "arguments": {},
        "schedule": {"kind": "step_ranges", "ranges": [[3, 5]]},
    }


@given(st.integers(1, 7), st.integers(0, 5000))
def test_log_spaced_steps_do_not_depend_on_the_order_of_questions(per_decade: int, step: int) -> None:
    fresh = LogSpaced(per_decade)
    asked = LogSpaced(per_decade)
    assert [asked.due(n) for n in (step + 9, 3)] == [LogSpaced(per_decade).due(n) for n in (step + 9, 3)]
    assert asked.due(step) == fresh.due(step)


@pytest.mark.parametrize(
    ("make_schedule", "message"),
    [
        (lambda: EveryNSteps(0), r"`EveryNSteps\(n=0\)`: expected a whole number of steps, at least 1"),
        (lambda: EveryNSteps(2, width=3), r"`EveryNSteps\(n=2, width=3\)`: expected a width of at most n steps"),
        (lambda: EveryNSteps(2, first=-1), r"`EveryNSteps\(first=-1\)`"),
        (lambda: StepRanges([]), "expected at least one pair"),
        (lambda: StepRanges([(3, 3)]), "start below stop, that rise and don't overlap"),
        (lambda: StepRanges([(3, None), (5, 6)]), "that rise and don't overlap"),
        (lambda: LogSpaced(1.5), r"`LogSpaced\(per_decade=1.5\)`"),
        (lambda: Predicate(3), r"`Predicate\(3\)`: expected a function of the number of a step"),
        (lambda: Norms(schedule=0), r"`Norms\(schedule=0\)`: expected a Schedule, a whole number n"),
    ],
)
def test_schedules_out_of_range_are_refused(make_schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule()


def test_a_predicate_is_described_by_its_name() -> None:
    assert Predicate(is_even).describe() == {"kind": "predicate", "name": f"{__name__}.is_even"}
    assert isinstance(TopK(5, schedule=is_even).schedule, Schedule)

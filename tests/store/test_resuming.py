"""A trace that is cut back to a checkpoint and continued equals one that was never interrupted, array for array."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

from lightning_gradtrace.store import StoreError, Trace, TraceWriter, open_trace
from lightning_gradtrace.store.cursor import Cursor
from tests.store.faults import Killed, StoppingStore
from tests.store.test_crash import assert_prefix
from tests.synthetic import Synthetic

N_STEPS = 9
OPTIONS: dict[str, Any] = {"per": "both", "batch": 4, "n_samples": 18, "n_steps": N_STEPS}
ATTRS = {"run_id": "a", "quantity": "shift", "model": {"class": "M"}, "config": {"gradtrace": {"every_n_steps": 1}}}


def assert_same_arrays(trace: Trace, expected: Trace) -> None:
    """Every array of one trace is there in the other, with the same metadata and numbers."""
    groups = [zarr.open_group(t.store, mode="r") for t in (trace, expected)]
    found, wanted = ({p: a for p, a in g.members(max_depth=None) if isinstance(a, zarr.Array)} for g in groups)
    assert found.keys() == wanted.keys()
    assert trace.committed == expected.committed
    for path, array in wanted.items():
        assert repr(found[path].metadata.to_dict()) == repr(array.metadata.to_dict()), path
        np.testing.assert_array_equal(found[path][:], array[:], err_msg=path)
    assert trace.verify().ok, str(trace.verify())


class Run:
    """Writes steps of the synthetic run, and what comes with them, from a step on.

    Texts come with the step that shows them first, and get longer; weights are kept every third step.
    """

    def __init__(self, target: Any, content: Synthetic | None = None, **options: Any) -> None:
        self.content = Synthetic(**OPTIONS) if content is None else content
        settings: dict[str, Any] = {
            "params": self.content.params,
            "specs": self.content.specs(chunk_rows=5),
            "attrs": ATTRS,
            "vocab": self.content.vocab,
            "commit_bytes": 1500,
            "commit_share": 1,
        }
        self.writer = TraceWriter(target, **(settings | options))
        self.seen = set(self.writer.stored_samples.tolist())
        self.steps = list(self.content.steps())

    def go(self, first: int, last: int) -> Run:
        for number in range(first, last):
            step = self.steps[number]
            new = [i for i in step.occurrences["sample_id"].tolist() if i not in self.seen]
            if new:
                width = 7 if number < 3 else 100
                tokens = np.full((len(new), width), -1, np.int32)
                tokens[:, :3] = np.arange(3)
                tokens[-1] = 2
                length = (tokens >= 0).sum(1).astype(np.int32)
                self.writer.append_samples(np.array(new), tokens, length)
                self.seen.update(new)
            if number % 3 == 0:
                self.writer.append_weights(number, self.content.weights(number))
            self.writer.append_step(step.step, step.occurrences, step.records)
        return self

    def end(self) -> None:
        self.writer.append_weights(N_STEPS, self.content.weights(N_STEPS))
        self.writer.close(complete=True)


@pytest.fixture(scope="module")
def uninterrupted() -> Trace:
    store = MemoryStore()
    Run(store).go(0, N_STEPS).end()
    return open_trace(store)


@pytest.mark.parametrize("checkpoint, killed", [(0, 5), (1, 1), (2, 9), (3, 4), (4, 8), (7, 9), (9, 9)])
@pytest.mark.parametrize("place", ["memory", "directory"])
def test_resumed_trace_equals_the_uninterrupted_one(checkpoint, killed, place, uninterrupted, tmp_path):
    target = MemoryStore() if place == "memory" else tmp_path / "a.zarr"
    run = Run(target).go(0, checkpoint)
    cursor = Cursor.from_state(run.writer.cursor().state())
    run.go(checkpoint, killed)
    run.writer.close(complete=killed == N_STEPS)
    second = Run(target, resume=cursor)
    trace = open_trace(target)
    assert trace.n_steps == checkpoint and not trace.attrs["complete"] and trace.attrs["end_reason"] is None
    second.go(checkpoint, N_STEPS).end()
    assert_same_arrays(open_trace(target), uninterrupted)
    assert open_trace(target).attrs["resumed"] == [{"steps": checkpoint, "versions": None}]


def test_a_trace_may_be_resumed_again_and_again(uninterrupted):
    store = MemoryStore()
    writer = Run(store).go(0, 1).writer
    for step in range(1, N_STEPS):
        cursor = writer.cursor()
        writer.close(complete=False)
        writer = Run(store, resume=cursor).go(step, step + 1).writer
    writer.append_weights(N_STEPS, Synthetic(**OPTIONS).weights(N_STEPS))
    writer.close(complete=True)
    assert_same_arrays(open_trace(store), uninterrupted)
    assert [entry["steps"] for entry in open_trace(store).attrs["resumed"]] == list(range(1, N_STEPS))


def test_other_texts_after_the_cut_leave_no_rest_of_the_old_ones():
    """The old run had widened the array of tokens; its columns must not come back when a wider text follows."""
    store = MemoryStore()
    run = Run(store).go(0, 2)
    cursor = run.writer.cursor()
    run.go(2, 9).writer.close(complete=False)
    writer = Run(store, resume=cursor).writer
    new = np.arange(50, 55)
    tokens = np.full((5, 90), 1, np.int32)
    tokens[:4, 5:] = -1
    writer.append_samples(new, tokens, np.array([5, 5, 5, 5, 90], np.int32))
    writer.close(complete=False)
    trace = open_trace(store)
    assert trace.verify().ok
    np.testing.assert_array_equal(trace.inputs(new), tokens)


@pytest.mark.thorough
@pytest.mark.parametrize("checkpoint", [0, 2, 5])
def test_killed_at_any_change_while_being_cut_it_can_be_read_and_cut_again(checkpoint, uninterrupted, record_property):
    base = MemoryStore()
    run = Run(base).go(0, checkpoint)
    cursor = run.writer.cursor()
    run.go(checkpoint, 8).writer.close(complete=False, end_reason="killed")
    before = dict(base._store_dict)
    counting = StoppingStore(dict(before))
    Run(counting, resume=cursor).writer.close(complete=False)
    assert counting.n_changes > 20
    found = set()
    for changes in range(counting.n_changes):
        store = StoppingStore(dict(before), changes)
        with contextlib.suppress(Killed, StoreError):
            Run(store, resume=cursor).writer.close(complete=False)
        left = MemoryStore(store.objects)
        trace = open_trace(left)
        assert_prefix(trace, run.steps)
        found.add(trace.n_steps)
        if changes % 7 == 0:
            Run(left, resume=cursor).go(checkpoint, N_STEPS).end()
            assert_same_arrays(open_trace(left), uninterrupted)
    record_property("faults", counting.n_changes)
    assert found == {checkpoint, 8}


def cut(store: Any, steps: int = 4) -> Cursor:
    run = Run(store).go(0, steps)
    cursor = run.writer.cursor()
    run.go(steps, steps + 2).writer.close(complete=False)
    return cursor


def test_differences_are_listed_and_nothing_is_changed():
    store = MemoryStore()
    cursor = cut(store)
    before = dict(store._store_dict)
    shapes = {"layers.0.linear1.weight": (6, 5), "layers.0.linear2.weight": (5, 7), "new": (2, 2)}
    content = Synthetic(**(OPTIONS | {"shapes": tuple(shapes.items()), "k": 7}))
    attrs = {**ATTRS, "model": {"class": "N"}, "config": {"gradtrace": {"every_n_steps": 2}}}
    with pytest.raises(StoreError) as caught:
        Run(store, content, resume=cursor, attrs=attrs)
    for text in (
        "can't be resumed, this run differs from the one that began it:",
        "`every_n_steps` was 1, is 2",
        "model was {'class': 'M'}, is {'class': 'N'}",
        "parameter `layers.0.linear2.weight` was tracked with shape (5, 6), is tracked with shape (5, 7)",
        "parameter `layers.0.out_proj.weight` was tracked with shape (5, 5), is not tracked",
        "parameter `new` was not tracked, is tracked with shape (2, 2)",
        "row shape of `topk/index` was [6], is [7]",
        "give `GradTrace` a new path to begin a new trace",
    ):
        assert text in str(caught.value)
    for options, text in (
        ({"vocab": None}, "array `inputs/vocab` is missing"),
        ({"specs": content.specs()[:2]}, "array `topk_step/index` is missing"),
        ({"n_groups": 2}, "row shape of `steps/lr` was [1], is [2]"),
    ):
        with pytest.raises(StoreError, match=re.escape(text)):
            Run(store, resume=cursor, **options)
    assert store._store_dict == before


def test_addresses_of_functions_are_no_difference():
    store = MemoryStore()
    attrs = [{**ATTRS, "config": {"gradtrace": {"inputs": f"<function f at 0x{i}>", "params": i}}} for i in (1, 2)]
    cursor = Run(store, attrs=attrs[0]).go(0, 2).writer.cursor()
    with pytest.raises(StoreError):
        Run(store, attrs={**attrs[1], "quantity": "gradient"}, resume=cursor)
    Run(store, attrs=attrs[1], resume=cursor).writer.close(complete=False)


def test_missing_foreign_and_older_traces_are_told_apart():
    store = MemoryStore()
    cursor = cut(store)
    with pytest.raises(StoreError, match="holds no trace, but the checkpoint belongs to one of 4 recorded steps: rest"):
        Run(MemoryStore(), resume=cursor)
    other = MemoryStore()
    Run(other, attrs={**ATTRS, "run_id": "b"}).go(0, 6).writer.close(complete=True)
    with pytest.raises(StoreError, match=r"holds the trace of another run \(b\), the checkpoint belongs to run a: res"):
        Run(other, resume=cursor)
    older = MemoryStore()
    Run(older).go(0, 2).writer.close(complete=False)
    with pytest.raises(StoreError, match="ends before the checkpoint, which expects rows: 4 along `step`, found 2; 16"):
        Run(older, resume=cursor)
    with pytest.raises(StoreError, match="the checkpoint holds no place of a trace to go on from"):
        Cursor.from_state({"rows": 3})


def test_a_trace_of_format_1_1_is_read_but_not_gone_on_with(tmp_path):
    path = tmp_path / "a.zarr"
    cursor = cut(path)
    expected = open_trace(path).topk.frame()
    for file in sorted(path.rglob("c.*")):
        old = file.with_name("c").joinpath(*file.name.split(".")[1:])
        old.parent.mkdir(parents=True, exist_ok=True)
        file.rename(old)
    for file in path.rglob("zarr.json"):
        text = file.read_text().replace('"separator":"."', '"separator":"/"')
        file.write_text(text.replace('"encoding-version":"1.3"', '"encoding-version":"1.1"'))
    trace = open_trace(path)
    assert trace.verify().ok and trace.topk.frame().equals(expected)
    root = (path / "zarr.json").read_bytes()
    with pytest.raises(StoreError, match=r"  - the files of chunks have the names of format 1\.1, this package writes"):
        Run(path, resume=cursor)
    assert (path / "zarr.json").read_bytes() == root


def test_damage_in_the_last_chunk_is_said_before_anything_is_cut(tmp_path):
    path = tmp_path / "a.zarr"
    cursor = cut(path)
    chunk = path / "topk" / "shift" / "c.3.0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    root = (path / "zarr.json").read_bytes()
    with pytest.raises(StoreError, match=r"`topk/shift` chunk 3/0 \(occurrence 15 to 19, steps 3 to 5\) can't be read"):
        Run(path, resume=cursor)
    assert (path / "zarr.json").read_bytes() == root

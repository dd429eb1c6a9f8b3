"""What the writer refuses, and how failures of its thread come back to the training."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from zarr.storage import MemoryStore

from lightning_gradtrace.store import ArraySpec, StoreError, TraceWriter, open_trace
from lightning_gradtrace.store.background import BackgroundThread
from lightning_gradtrace.store.commit import Committer
from tests.synthetic import Synthetic


def start(store=None, **options):
    content = Synthetic()
    arguments = {"params": content.params, "specs": content.specs(), "attrs": {}} | options
    return TraceWriter(MemoryStore() if store is None else store, **arguments), list(content.steps())


def append(writer, given, **changes):
    writer.append_step(
        given.step | changes.get("step", {}),
        given.occurrences | changes.get("occurrences", {}),
        given.records | changes.get("records", {}),
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"step": {"lost": 1}}, r"`step` has \['lost'\]; expected names out of \['step', 'epoch', 'optimizer', 'loss'"),
        ({"step": {"lr": [1.0, 2.0]}}, r"`steps/lr` got shape \(2,\); expected \(1,\)"),
        ({"step": {"loss": np.ones(3)}}, r"`steps/loss` got shape \(3,\); expected \(\)"),
        ({"occurrences": {"slot": np.zeros(3)}}, r"`occurrences/slot` of step 0 has shape \(3,\); expected \(4,\)"),
        ({"occurrences": {"slit": np.zeros(4)}}, r"`occurrences` of step 0 has .*'slit'\]; expected \['micro_batch', "),
        (
            {"records": {"topk/index": np.zeros((4, 5), np.uint32)}},
            r"`topk/index` of step 0 has shape \(4, 5\) and dty",
        ),
        ({"records": {"topk/index": np.zeros((4, 6), np.int64)}}, r"and dtype int64; expected \(4, 6\) and uint32"),
        ({"records": {"norms/x": np.zeros(4)}}, r"`records` of step 0 has .*; expected \['topk/index', 'topk/shift'\]"),
    ],
)
def test_step_that_does_not_fit_is_refused_where_it_is_made(changes, message):
    writer, steps = start()
    with pytest.raises(ValueError, match=message):
        append(writer, steps[0], **changes)
    assert writer.n_occurrences == 0
    append(writer, steps[0])
    assert writer.n_occurrences == 4
    writer.close(complete=True)


def test_steps_must_rise():
    writer, steps = start()
    append(writer, steps[1])
    with pytest.raises(ValueError, match="step 1 was appended after step 1; expected rising numbers"):
        append(writer, steps[1])
    with pytest.raises(ValueError, match=r"`step` has \['loss'\]; expected at least `step`"):
        writer.append_step({"loss": 1.0}, steps[0].occurrences, steps[0].records)
    writer.close(complete=True)


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            ArraySpec("topk/x", ("sample",), (), "float32", "x"),
            "`topk/x` grows along `sample`; expected `occurrence` or `s",
        ),
        (ArraySpec("steps/loss", ("step",), (), "float32", "x"), "`steps/loss` is declared twice; expected one record"),
        (ArraySpec("x", ("step",), (), "float32", "x"), r"`x` of shape_tail \(\); expected a path `group/name`"),
    ],
)
def test_record_arrays_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        start(specs=[spec])


def test_samples_and_weights_that_do_not_fit_are_refused():
    writer, _ = start()
    with pytest.raises(
        ValueError, match=r"got sample_id \(2,\), tokens \(3, 4\), length \(3,\); expected \(n,\), \(n, pos"
    ):
        writer.append_samples(np.arange(2), np.zeros((3, 4)), np.zeros(3))
    writer.append_weights(0, {"a": np.zeros(3), "b": np.zeros(2)})
    with pytest.raises(
        ValueError, match=r"snapshot of step 5 differs from the first one in \['a', 'b'\]; expected the same"
    ):
        writer.append_weights(5, {"a": np.zeros(4)})
    writer.close(complete=True)


def test_close_is_idempotent_and_ends_the_appending():
    store = MemoryStore()
    writer, steps = start(store)
    append(writer, steps[0])
    writer.close(complete=False, end_reason="KeyboardInterrupt")
    writer.close(complete=True)
    attrs = open_trace(store).attrs
    assert attrs["complete"] is False and attrs["end_reason"] == "KeyboardInterrupt"
    for call in (lambda: append(writer, steps[1]), writer.flush, lambda: writer.append_weights(0, {})):
        with pytest.raises(StoreError, match="is closed; nothing can be appended to it"):
            call()


def test_flush_makes_everything_visible():
    store = MemoryStore()
    writer, steps = start(store)
    for number, step in enumerate(steps[:3]):
        assert open_trace(store).n_steps == number
        append(writer, step)
        writer.flush()
    trace = open_trace(store)
    assert trace.n_steps == 3 and trace.verify().ok and not trace.attrs["complete"]
    assert "it was killed or still runs" in str(trace.verify())
    writer.close(complete=True)


def test_little_is_committed_after_a_while_without_further_calls():
    store = MemoryStore()
    writer, steps = start(store, commit_seconds=0.05)
    append(writer, steps[0])
    for _ in range(100):
        if open_trace(store).n_steps:
            break
        time.sleep(0.05)
    assert open_trace(store).n_steps == 1
    writer.close(complete=True)


class FullStore(MemoryStore):
    """Fails like a full disk after some puts; from then on always, unless `room` is set again."""

    room = 10**9

    async def set(self, key, value, byte_range=None):
        if self.room <= 0:
            raise OSError(28, "No space left on device")
        self.room -= 1
        await super().set(key, value)


@pytest.mark.parametrize("call", ["append", "flush", "close"])
def test_failure_of_the_thread_reaches_the_next_call_once(call):
    store = FullStore()
    writer, steps = start(store, commit_bytes=10**9)
    append(writer, steps[0])
    writer.flush()
    store.room = 0
    append(writer, steps[1])
    message = (
        r"writing the trace `.*` failed: OSError: .*No space left on device; its first 1 steps are on disk and readable"
    )
    with pytest.raises(StoreError, match=message) as caught:
        if call == "append":
            with pytest.raises(StoreError):
                writer.flush()
            append(writer, steps[2])
        elif call == "flush":
            writer.flush()
        else:
            writer.close(complete=True)
    assert isinstance(caught.value.__cause__, OSError)
    store.room = 10**9
    writer.close(complete=True)
    trace = open_trace(store)
    assert trace.n_steps == 1 and trace.verify().ok and not trace.attrs["complete"]


def test_trace_ends_with_the_reason_where_the_store_lets_it():
    store = FullStore()
    writer, steps = start(store)
    append(writer, steps[0])
    store.room = 3
    with pytest.raises(StoreError):
        writer.flush()
    store.room = 10**9
    writer.close(complete=False, end_reason="disabled: disk full")
    assert open_trace(store).attrs["end_reason"] == "disabled: disk full"


def test_appending_waits_for_a_slow_store_and_memory_stays_bounded(monkeypatch):
    released, most = threading.Event(), []
    original = Committer.append

    def slow(self, rows):
        released.wait(0.02)
        original(self, rows)

    writer, steps = start(queue_bytes=3000)
    monkeypatch.setattr(Committer, "append", slow)
    for step in steps:
        append(writer, step)
        most.append(writer._thread.queued_bytes)
    assert max(most) <= 3000 and writer.blocked_seconds > 0.02
    released.set()
    writer.close(complete=True)


def test_task_larger_than_the_queue_still_passes():
    thread = BackgroundThread(max_bytes=10)
    done: list[int] = []
    for i in range(3):
        thread.put(lambda i=i: done.append(i), nbytes=100)
    thread.join()
    thread.stop()
    assert done == [0, 1, 2] and thread.queued_bytes == 0


def test_blocked_call_is_woken_by_a_failure():
    started, fail = threading.Event(), threading.Event()

    def task():
        started.set()
        fail.wait(5)
        raise RuntimeError("broken")

    thread = BackgroundThread(max_bytes=10)
    thread.put(task, nbytes=10)
    started.wait(5)
    threading.Timer(0.05, fail.set).start()
    with pytest.raises(RuntimeError, match="broken"):
        thread.put(lambda: None, nbytes=10)
    thread.stop()
    assert thread.queued_bytes == 0

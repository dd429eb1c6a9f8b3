"""Killed at any point, a trace opens, holds whole steps, and the steps it holds are the first ones."""

from __future__ import annotations

import random

import numpy as np
import pytest
from zarr.storage import MemoryStore

from lightning_gradtrace.store import Trace, open_trace
from tests.synthetic import Step, Synthetic, write_trace

OPTIONS = {"per": "both", "batch": 3, "n_samples": 7}


def assert_prefix(trace: Trace, steps: list[Step]) -> None:
    """The trace holds the first steps, all of them whole."""
    report = trace.verify()
    assert report.ok, str(report)
    kept = steps[: trace.n_steps]
    assert trace.steps.index.tolist() == [step.step["step"] for step in kept]
    np.testing.assert_array_equal(trace.steps["loss"], [step.step["loss"] for step in kept])
    for path in ("topk/index", "topk/shift", "topk_step/index", "topk_step/shift", "topk_step/occurrence"):
        if kept:
            np.testing.assert_array_equal(trace.array(path)[:], np.concatenate([step.records[path] for step in kept]))
        assert len(trace.array(path)[:]) == (trace.n_steps if "step/" in path else trace.n_occurrences)
    if kept:
        ids = np.concatenate([step.occurrences["sample_id"] for step in kept])
        np.testing.assert_array_equal(trace.occurrences["sample_id"], ids)


class Journal(MemoryStore):
    """Remembers every put, in order."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.puts: list[tuple[str, object]] = []

    async def set(self, key, value, byte_range=None):
        self.puts.append((key, value))
        await super().set(key, value)


@pytest.mark.parametrize("order", ["as written", "shuffled between root documents"])
def test_trace_cut_off_after_any_put_holds_whole_steps(order, record_property):
    journal = Journal()
    options = {**OPTIONS, "n_steps": 4}
    write_trace(journal, chunk_rows=4, weight_steps=(0, 3), writer={"commit_bytes": 800, "commit_share": 1}, **options)
    steps = list(Synthetic(**options).steps())
    puts = journal.puts
    if order != "as written":
        # Puts between two root documents may reach an object store in any order.
        parts: list[list[tuple[str, object]]] = [[]]
        for put in puts:
            parts[-1].append(put)
            if put[0] == "zarr.json":
                parts.append([])
        rng = random.Random(0)
        puts = [put for part in parts for put in (*rng.sample(part[:-1], len(part[:-1])), *part[-1:])]
    roots = [number for number, (key, _) in enumerate(puts) if key == "zarr.json"]
    assert len(roots) >= 5
    objects: dict[str, object] = {}
    found = []
    for number, (key, value) in enumerate(puts):
        objects[key] = value
        # Every put is a place to stop; looking is cheap only at some of them.
        if number >= roots[0] and (number % 20 == 0 or number in roots):
            trace = open_trace(MemoryStore(dict(objects)))
            assert_prefix(trace, steps)
            found.append(trace.n_steps)
    record_property("faults", len(found))
    assert found == sorted(found) and found[0] == 0 and found[-1] == 4 and len(set(found)) > 2


def test_killed_run_leaves_a_trace_of_whole_steps(tmp_path):
    """`python -m tests.store.kills` does the same 200 times."""
    from tests.store.kills import kill

    found = kill(tmp_path, 10)
    print(f"steps kept by killed runs: {[one.found for one in found]}")
    assert len({one.found for one in found}) > 2
    assert sum(one.lost_bytes for one in found) == 0


def test_reader_of_a_running_trace_keeps_what_it_opened(tmp_path):
    journal = Journal()
    write_trace(journal, **OPTIONS, n_steps=6, chunk_rows=50, writer={"commit_bytes": 600, "commit_share": 1})
    steps = list(Synthetic(**OPTIONS, n_steps=6).steps())
    live = MemoryStore()
    traces = []
    for key, value in journal.puts:
        live._store_dict[key] = value
        if key == "zarr.json":
            traces.append(open_trace(live))
    for trace in traces[1:]:
        assert_prefix(trace, steps)

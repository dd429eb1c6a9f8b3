"""Full disks, closed directories, two runs, clocks: nothing committed is lost, and the error says what."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_gradtrace.store import StoreError, TraceWriter, open_trace
from lightning_gradtrace.store.durable import DurableLocalStore
from lightning_gradtrace.store.lock import DirectoryLock
from tests.store.faults import Killed, StoppingStore
from tests.store.test_crash import assert_prefix
from tests.store.test_resuming import N_STEPS, Run
from tests.synthetic import Synthetic, write_trace

ROOT = Path(__file__).parents[2]


def test_killed_at_any_put_a_trace_holds_whole_steps():
    """Every place inside every commit, one after the other."""
    counting = StoppingStore({})
    run = Run(counting)
    run.go(0, N_STEPS).end()
    found = []
    for changes in range(1, counting.n_changes):
        store = StoppingStore({}, changes)
        with contextlib.suppress(Killed, StoreError):
            Run(store).go(0, N_STEPS).end()
        objects = store.objects
        assert len(objects) >= 1
        trace = open_trace(StoppingStore(objects))
        if changes % 3 == 0:
            assert_prefix(trace, run.steps)
        found.append(trace.n_steps)
    assert found == sorted(found) and found[0] == 0 and found[-1] >= N_STEPS - 2 and len(set(found)) > 2


def test_a_disk_that_fills_up_keeps_what_was_committed(tmp_path, monkeypatch):
    write, room = DurableLocalStore.write, [0]

    def limited(self, key, parts):
        room[0] -= sum(map(len, parts))
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        write(self, key, parts)

    monkeypatch.setattr(DurableLocalStore, "write", limited)
    kept = []
    for number, size in enumerate((40_000, 80_000, 120_000, 200_000)):
        room[0] = size
        path = tmp_path / f"{number}.zarr"
        with pytest.raises(StoreError, match=r"(failed: OSError|can't be written: OSError): .*No space left on device"):
            Run(path, commit_bytes=500).go(0, N_STEPS).end()
        if (path / "zarr.json").exists():
            trace = open_trace(path)
            assert_prefix(trace, list(Run(StoppingStore({})).steps))
            kept.append(trace.n_steps)
    assert kept


LIMITED = """
import resource, sys
from tests.synthetic import write_trace
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
write_trace(sys.argv[1], n_steps=2000, writer={"commit_bytes": 2000, "commit_share": 1})
"""

UNPRIVILEGED = """
import os, sys
from tests.synthetic import write_trace
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
write_trace(sys.argv[1])
"""


def child(script: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stderr


def test_a_file_that_may_not_grow_further_ends_the_writing_with_a_readable_trace(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    error = child(LIMITED, tmp_path / "a.zarr")
    assert re.search(r"StoreError: (writing the trace|`.*` can't be written).*File too large", error), error[-500:]


def test_a_read_only_directory_is_named(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    folder.chmod(0o555)
    error = child(UNPRIVILEGED, folder / "a.zarr")
    assert re.search(r"StoreError: `.*a\.zarr` can't be written: PermissionError", error), error[-500:]
    assert not list(folder.iterdir())


def test_two_runs_into_one_directory_the_second_is_refused(tmp_path):
    content = Synthetic()
    options = {"params": content.params, "specs": content.specs(), "attrs": {}}
    first = TraceWriter(tmp_path / "a.zarr", **options)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=r"a\.zarr` is being written by another run; expected one run for each"):
            TraceWriter(tmp_path / "a.zarr", overwrite=overwrite, **options)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    first.close(complete=True)
    TraceWriter(tmp_path / "a.zarr", overwrite=True, **options).close(complete=True)


HOLDER = """
import os, sys, time
from lightning_gradtrace.store.lock import DirectoryLock
from pathlib import Path
lock = DirectoryLock(Path(sys.argv[1]))
if os.fork() == 0:
    time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_run_frees_its_lock_although_its_workers_live_on(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(StoreError, match="is being written by another run"):
        DirectoryLock(tmp_path)
    process.kill()
    process.wait(20)
    try:
        DirectoryLock(tmp_path).release()
    finally:
        os.killpg(process.pid, 9)
        process.stdout.close()


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    """Only monotonic clocks are asked."""

    def refuse() -> float:
        raise AssertionError("the time of day was asked for")

    monkeypatch.setattr(time, "time", refuse)
    assert write_trace(tmp_path / "a.zarr", writer={"commit_seconds": 0.0}).verify().ok

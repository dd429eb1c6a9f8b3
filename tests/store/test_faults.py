"""Full disks, closed directories, two runs, clocks: nothing committed is lost, and the error says what."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_gradtrace.store import StoreError, TraceWriter, open_trace
from lightning_gradtrace.store.durable import DurableLocalStore
from lightning_gradtrace.store.lock import DirectoryLock
from tests.store.faults import FullOnceStore, Killed, StoppingStore
from tests.store.kills import forker, lost_bytes
from tests.store.test_crash import OPTIONS, assert_prefix
from tests.store.test_resuming import N_STEPS, Run
from tests.synthetic import Synthetic, write_trace

ROOT = Path(__file__).parents[2]


@pytest.mark.thorough
def test_killed_at_any_put_a_trace_holds_whole_steps(record_property):
    """Every place inside every commit, one after the other."""
    counting = StoppingStore({})
    run = Run(counting)
    run.go(0, N_STEPS).end()
    found, lost = [], 0
    for changes in range(1, counting.n_changes):
        store, writer = StoppingStore({}, changes), None
        with contextlib.suppress(Killed, StoreError):
            writer = Run(store)
            writer.go(0, N_STEPS).end()
        objects = store.objects
        assert len(objects) >= 1
        trace = open_trace(StoppingStore(objects))
        if changes % 3 == 0:
            assert_prefix(trace, run.steps)
        found.append(trace.n_steps)
        lost += lost_bytes(run.steps, _committed_by(writer), trace.n_steps)
    record_property("faults", len(found))
    record_property("lost_bytes", lost)
    assert found == sorted(found) and found[0] == 0 and found[-1] >= N_STEPS - 2 and len(set(found)) > 2
    assert lost == 0


def _committed_by(run: Run | None) -> int:
    """Steps that a writer takes for committed."""
    return 0 if run is None else run.writer._committer.committed["step"]


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


def test_a_disk_that_is_full_at_any_moment_costs_no_committed_step(record_property):
    """Inside every commit, at the commit mark itself, and while the trace is being closed."""
    counting = StoppingStore({})
    run = Run(counting)
    run.go(0, N_STEPS).end()
    found, lost = [], 0
    for changes in range(1, counting.n_changes, 5):
        store = FullOnceStore({}, changes)
        with pytest.raises(StoreError, match="No space left on device"):
            writer = None
            try:
                writer = Run(store)
                writer.go(0, N_STEPS).end()
            finally:
                if writer is not None:
                    writer.writer.close(complete=False, end_reason="full")
        trace = open_trace(StoppingStore(store.objects))
        assert_prefix(trace, run.steps)
        assert not trace.attrs["complete"]
        found.append(trace.n_steps)
        lost += lost_bytes(run.steps, _committed_by(writer), trace.n_steps)
    record_property("faults", len(found))
    record_property("lost_bytes", lost)
    assert found == sorted(found) and found[0] == 0 and found[-1] >= N_STEPS - 2
    assert lost == 0


CLOSED_ON_THE_WAY = """
import os, sys, pathlib
from tests.store.test_resuming import Run
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
run = Run(sys.argv[1]).go(0, 4)
run.writer.flush()
for folder in [pathlib.Path(sys.argv[1]), *pathlib.Path(sys.argv[1]).rglob("*")]:
    if folder.is_dir():
        folder.chmod(0o555)
run.go(4, 9).end()
"""


def test_permissions_that_are_taken_away_leave_what_was_committed(tmp_path):
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    error = child(CLOSED_ON_THE_WAY, folder / "a.zarr")
    assert re.search(r"StoreError: writing the trace `.*` failed: PermissionError.*its first 4 steps are on", error)
    trace = open_trace(folder / "a.zarr")
    assert_prefix(trace, Run(StoppingStore({})).steps)
    assert trace.n_steps == 4


def test_a_chunk_in_whose_place_something_else_stands_is_named(tmp_path):
    path = tmp_path / "a.zarr"
    write_trace(path, per="both", chunk_rows=5)
    chunk, other = path / "topk/shift/c.1.0", path / "topk_step/shift/c.0.0"
    chunk.write_bytes(other.read_bytes())
    message = (
        r"`topk/shift` chunk 1/0 \(occurrence 5 to 9, steps 1 to 2\) can't be read: ValueError: its header promises"
    )
    with pytest.raises(StoreError, match=message):
        open_trace(path).topk.frame()
    assert len(open_trace(path).verify().problems) == 1
    chunk.unlink()
    chunk.mkdir()
    with pytest.raises(StoreError, match=r"`topk/shift/c\.1\.0` of `.*` can't be read: IsADirectoryError"):
        open_trace(path).topk.frame()
    (problem,) = open_trace(path).verify().problems
    assert "IsADirectoryError" in problem and len(open_trace(path).using("topk_step").topk.frame()) == 90


def test_a_root_document_that_is_cut_off_is_said(tmp_path):
    write_trace(tmp_path / "a.zarr")
    root = tmp_path / "a.zarr" / "zarr.json"
    whole = root.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        root.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"a\.zarr` is not a trace: found a `zarr.json` that can't be read"):
            open_trace(tmp_path / "a.zarr")
    root.write_bytes(whole)
    assert open_trace(tmp_path / "a.zarr").verify().ok


def test_a_trace_that_is_moved_away_while_it_is_read_is_an_error_and_no_padding(tmp_path):
    trace = write_trace(tmp_path / "a.zarr")
    (tmp_path / "a.zarr").rename(tmp_path / "b.zarr")
    with pytest.raises(StoreError, match="is missing"):
        trace.topk.frame()
    assert open_trace(tmp_path / "b.zarr").verify().ok


def test_a_trace_can_be_read_and_packed_while_another_process_writes_it(tmp_path):
    path, steps = tmp_path / "a.zarr", list(Synthetic(**OPTIONS, n_steps=3000).steps())
    found = []
    with forker() as process:
        assert process.stdin is not None and process.stdout is not None
        print(path, file=process.stdin, flush=True)
        writer = int(process.stdout.readline())
        deadline = time.monotonic() + 60
        while len(set(found)) < 4 and time.monotonic() < deadline:
            if (path / "zarr.json").exists():
                trace = open_trace(path)
                packed = open_trace(trace.to_zip(tmp_path / "a.zip", overwrite=True))
                for one in (trace, packed):
                    assert_prefix(one, steps)
                packed.store.close()
                found.append(trace.n_steps)
        os.kill(writer, signal.SIGKILL)
        process.stdout.readline()
    assert found == sorted(found) and len(set(found)) >= 4


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


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_trace_that_is_taken_away_while_it_is_written_is_an_error(what, tmp_path):
    """Going on would leave a trace without its first chunks."""
    path = tmp_path / "a.zarr"
    run = Run(path, commit_bytes=10**9).go(0, 4)
    run.writer.flush()
    path.rename(tmp_path / "moved.zarr")
    if what == "replaced":
        write_trace(path, n_steps=2)
    run.go(4, 7)
    with pytest.raises(StoreError, match=rf"another run, or somebody, has {what} the trace .* while this run was"):
        run.writer.flush()
    run.writer.close(complete=False)
    assert_prefix(open_trace(tmp_path / "moved.zarr"), run.steps)
    assert open_trace(tmp_path / "moved.zarr").n_steps == 4
    if what == "replaced":
        assert open_trace(path).n_steps == 2 and open_trace(path).verify().ok


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

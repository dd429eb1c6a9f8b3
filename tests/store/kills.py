"""Kills a writer at random moments and checks what is left.

python -m tests.store.kills --kills 200
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_gradtrace.store import open_trace
from tests.store.test_crash import OPTIONS, assert_prefix
from tests.synthetic import Step, Synthetic

WRITER = """
import os, sys, types
# The store alone needs neither torch nor Lightning, which take long to import.
package = types.ModuleType("lightning_gradtrace")
package.__path__ = ["lightning_gradtrace"]
sys.modules["lightning_gradtrace"] = package
from tests.synthetic import write_trace

os.fsync = lambda descriptor: None  # only a power loss tells the difference; this way there are more commits
for line in sys.stdin:
    path = line.strip()
    child = os.fork()
    if child == 0:
        options = {"per": "both", "batch": 3, "n_samples": 7, "n_steps": 100_000}
        write_trace(path, chunk_rows=16, writer={"commit_bytes": 2000, "commit_share": 1}, **options)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@contextlib.contextmanager
def forker() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything and writes a trace in a child for every path it reads."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    yield process
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.wait(20)
    process.stdout.close()


def _committed(path: Path) -> int:
    """Steps that a reader sees by now, -1 as long as there is no trace."""
    return open_trace(path).n_steps if (path / "zarr.json").exists() else -1


@dataclass(frozen=True)
class Kill:
    """What a reader saw just before a writer was killed, and afterwards.

    Attributes:
        seen: committed steps before.
        found: whole steps afterwards, each equal to what was written.
        lost_bytes: raw bytes of steps that were seen and not found.
    """

    seen: int
    found: int
    lost_bytes: int


def lost_bytes(steps: Sequence[Step], seen: int, found: int) -> int:
    """Raw bytes of the records of steps that were committed and are not there any more."""
    return sum(array.nbytes for step in steps[found : max(found, seen)] for array in step.records.values())


def kill(folder: Path, n_kills: int, seed: int = 0) -> list[Kill]:
    """Kill a writer again and again, each time in a new trace, and check that what is left is whole steps.

    Args:
        folder: where the traces go.
        n_kills: how often.
        seed: of the moments.

    Returns:
        What each trace held.
    """
    rng = random.Random(seed)
    steps = list(Synthetic(**OPTIONS, n_steps=3000).steps())
    found = []
    with forker() as process:
        assert process.stdin is not None and process.stdout is not None
        for number in range(n_kills):
            path = folder / f"{number}.zarr"
            print(path, file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            # Wait for progress, not for time: a loaded machine may take seconds to its first commit.
            deadline = time.monotonic() + 30
            while _committed(path) < 4 * (number % 20) and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            seen = max(0, _committed(path))
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "gone\n"
            trace = open_trace(path)
            assert not trace.attrs["complete"]
            assert_prefix(trace, steps)
            found.append(Kill(seen, trace.n_steps, lost_bytes(steps, seen, trace.n_steps)))
    return found


def main() -> None:
    """Kill and print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill(Path(folder), arguments.kills)
    held, lost = [one.found for one in found], sum(one.lost_bytes for one in found)
    print(
        f"{len(found)} kills: every trace opened and was verified; they held {min(held)} to {max(held)} whole steps; "
        f"bytes of committed steps lost: {lost}"
    )


if __name__ == "__main__":
    main()

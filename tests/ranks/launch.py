"""Runs functions in two processes that train together, from one fresh process, and brings back what they return.

Importing torch and Lightning takes seconds; a process that has imported them and done nothing else forks quickly. So a
launch runs a list of functions one after the other, each in processes of its own. One that doesn't end is killed, and
says so.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 180
"""Time after which a function counts as hanging; on a machine with nothing else to do it takes a few seconds."""


@dataclass
class Outcome:
    """What became of one function on one rank.

    Attributes:
        value: what it returned.
        error: the text of its exception, with where it came from; None for none.
        exitcode: of the process; negative for a signal, None if it had to be killed because it did not end.
    """

    value: Any = None
    error: str | None = None
    exitcode: int | None = None


@dataclass(frozen=True)
class Job:
    """A function to run on every rank.

    Attributes:
        function: of module level; called with the folder and `arguments`.
        arguments: for the function.
        size: number of processes.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    size: int = 2


def launch(folder: Path, jobs: Sequence[Job]) -> list[list[Outcome]]:
    """Run jobs one after the other in one fresh process; the outcome of each on every rank."""
    request, reply = folder / "jobs.pickle", folder / "outcomes.pickle"
    request.write_bytes(pickle.dumps(list(jobs)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ranks.launch", str(folder)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS * (1 + len(jobs)), check=False
    )
    assert done.returncode == 0 and reply.exists(), (done.stdout + done.stderr)[-4000:]
    outcomes: list[list[Outcome]] = pickle.loads(reply.read_bytes())
    return outcomes


def values(outcomes: Sequence[Outcome]) -> list[Any]:
    """What all ranks returned; none may have failed."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None and outcome.exitcode == 0, (
            f"rank {rank} ({outcome.exitcode}): {(outcome.error or '')[-4000:]}"
        )
    return [outcome.value for outcome in outcomes]


def run(folder: Path, job: Job) -> list[Outcome]:
    """Run one job: fork the ranks and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(job.size)]
    processes = [
        context.Process(target=_rank, args=(folder, job, rank, port, pipe[1])) for rank, pipe in enumerate(pipes)
    ]
    for process, pipe in zip(processes, pipes, strict=True):
        process.start()
        pipe[1].close()
    outcomes, deadline = [], time.monotonic() + SECONDS
    for process, (pipe, _) in zip(processes, pipes, strict=True):
        outcome = Outcome(error="it ended without a word")
        if pipe.poll(max(0.0, deadline - time.monotonic())):
            with contextlib.suppress(EOFError):
                outcome = pipe.recv()
        else:
            outcome.error = f"it did not end within {SECONDS} s"
        process.join(max(1.0, deadline - time.monotonic()))
        outcome.exitcode = process.exitcode
        outcomes.append(outcome)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return outcomes


def _rank(folder: Path, job: Job, rank: int, port: int, pipe: Any) -> None:
    # Lightning takes the processes as those that torchrun has started.
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": job.size, "LOCAL_WORLD_SIZE": job.size}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    if job.size > 1:
        os.environ.update({name: str(value) for name, value in names.items()})
    outcome = Outcome()
    try:
        outcome.value = job.function(folder, *job.arguments)
    except BaseException:
        outcome.error = traceback.format_exc()
    pipe.send(outcome)
    pipe.close()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Run the jobs that lie in a folder."""
    folder = Path(sys.argv[1])
    jobs = pickle.loads((folder / "jobs.pickle").read_bytes())
    import tests.ranks.training  # noqa: F401  (imported once, before the ranks are forked)

    outcomes = [run(folder, job) for job in jobs]
    (folder / "outcomes.pickle").write_bytes(pickle.dumps(outcomes))


if __name__ == "__main__":
    # Under its own name, so that what it pickles is known elsewhere.
    from tests.ranks.launch import main as run_jobs

    run_jobs()

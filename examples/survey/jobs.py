"""Jobs in processes of their own: one that fails, is killed or takes too long leaves the others alone."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pandas as pd

COLUMNS = ["job", "state", "seconds", "cpu_seconds", "error"]


@dataclass(frozen=True)
class Job:
    """Something to do.

    Attributes:
        name: of the job, unique.
        do: called with `arguments` in another process, so that all of them must be pickled.
        arguments: for `do`.
        after: name of a job that must have ended well before this one begins.
    """

    name: str
    do: Callable[..., None]
    arguments: tuple[Any, ...] = ()
    after: str | None = None


def run_jobs(
    jobs: Sequence[Job], folder: Path, *, workers: int, deadline: float | None = None, preload: Sequence[str] = ()
) -> pd.DataFrame:
    """Run jobs, the first ones first, as many at once as there are workers.

    Args:
        jobs: what to do.
        folder: each job writes ``<name>.json`` there at its end, and prints what it has to say into ``<name>.log``.
        workers: processes at once.
        deadline: value of `time.monotonic` at which all that still runs is stopped; None for never.
        preload: modules that are imported once for all processes.

    Returns:
        One row per job: `job`, `state` ("done", "failed", "stopped" at the deadline, "not begun"), `seconds`,
        `cpu_seconds`, `error` (the last line of it).
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    waiting, running, ended = list(jobs), dict[str, ForkServerProcess](), dict[str, dict[str, Any]]()
    while waiting or running:
        late = deadline is not None and time.monotonic() >= deadline
        for job in [] if late else _ready(waiting, ended)[: workers - len(running)]:
            waiting.remove(job)
            running[job.name] = context.Process(target=_run, args=(job, folder))
            running[job.name].start()
        if late or not running:
            break
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        connection.wait([process.sentinel for process in running.values()], left)
        for name in [name for name, process in running.items() if not process.is_alive()]:
            ended[name] = _outcome(name, folder, running.pop(name).exitcode)
    for name, process in running.items():
        process.terminate()
        process.join()
        ended[name] = {"state": "stopped"}
    rows = [{"job": job.name, **ended.get(job.name, {"state": "not begun"})} for job in jobs]
    return pd.DataFrame(rows, columns=COLUMNS)


def _ready(waiting: Sequence[Job], ended: dict[str, dict[str, Any]]) -> list[Job]:
    done = {name for name, outcome in ended.items() if outcome["state"] == "done"}
    return [job for job in waiting if job.after is None or job.after in done]


def _run(job: Job, folder: Path) -> None:
    started, outcome = time.monotonic(), {"state": "done", "error": ""}
    try:
        job.do(*job.arguments)
    except Exception as error:
        (folder / f"{job.name}.log").write_text(traceback.format_exc(), encoding="utf-8")
        outcome = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
    took = {"seconds": round(time.monotonic() - started, 2), "cpu_seconds": round(time.process_time(), 2)}
    (folder / f"{job.name}.json").write_text(json.dumps(outcome | took), encoding="utf-8")


def _outcome(name: str, folder: Path, exitcode: int | None) -> dict[str, Any]:
    file = folder / f"{name}.json"
    if exitcode == 0 and file.exists():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    return {"state": "failed", "error": f"the process ended with exit code {exitcode}"}

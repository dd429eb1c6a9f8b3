"""`--scheduler`: a cluster of two workers gives the same output, and one that is not there is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run

COMMANDS = {
    "entries": (),
    "outliers": ("--of", "neuron"),
    "tokens": ("--min-count", 5),
    "neurons": ("--min-count", 5),
    "movers": (),
    "formation": ("--series",),
    "directions": ("--param", "hidden.weight", "--shifts"),
}


@pytest.fixture(scope="module")
def address():
    from dask.distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster:
        yield cluster.scheduler_address


@pytest.mark.parametrize("command", COMMANDS)
def test_a_cluster_gives_the_same_output(command: str, address: str, run: Run, trace_path: Path) -> None:
    alone = run(command, trace_path, *COMMANDS[command])
    shared = run(command, trace_path, *COMMANDS[command], "--scheduler", address)
    assert shared.exit_code == 0, shared.stderr
    assert shared.stdout == alone.stdout


def test_a_scheduler_that_is_not_there_is_named(run: Run, trace_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(address: str, timeout: float) -> None:
        raise OSError("timed out")

    monkeypatch.setattr("dask.distributed.Client", refuses)
    done = run("entries", trace_path, "--scheduler", "tcp://127.0.0.1:1")
    assert done.exit_code == 2
    assert "no dask scheduler answers at `tcp://127.0.0.1:1` (timed out)" in " ".join(done.stderr.split())

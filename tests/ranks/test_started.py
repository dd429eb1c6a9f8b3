"""Strategies by which Lightning starts the processes itself: the callback travels, the trace is read in the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gradtrace import open_trace


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_processes_that_lightning_starts_write_one_trace(strategy: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.ranks.started", strategy, str(tmp_path / "a.zarr")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "steps 6, complete True, ranks 2" in done.stdout
    trace = open_trace(tmp_path / "a.zarr")
    assert set(trace.occurrences["rank"]) == {0, 1}

"""Progress: on stderr, to a terminal only, and without any change to the result."""

from __future__ import annotations

import os
import pickle
import pty
import subprocess
import sys
from pathlib import Path

import pandas as pd

from lightning_gradtrace import analysis, open_trace
from lightning_gradtrace.cli._trace import watched
from tests.docs.pages import ROOT


def test_a_watched_trace_gives_the_same_table_and_tells_how_far_it_is(trace_path: Path) -> None:
    trace, reached = open_trace(trace_path), []
    table = analysis.outliers(watched(trace, reached.append), "neuron")
    pd.testing.assert_frame_equal(table, analysis.outliers(trace, "neuron"))
    assert reached == sorted(reached) and reached[-1] == trace.n_occurrences


def test_a_worker_elsewhere_gets_the_trace_itself(trace_path: Path) -> None:
    trace = open_trace(trace_path)
    sent = pickle.loads(pickle.dumps(watched(trace, print)))
    assert type(sent) is type(trace)
    pd.testing.assert_frame_equal(analysis.count_entries(sent), analysis.count_entries(trace))


def test_the_bar_goes_to_stderr_if_that_is_a_terminal(trace_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_gradtrace", "outliers", str(trace_path), "--json"]
    quiet = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert quiet.stderr == b""
    ours, theirs = pty.openpty()
    try:
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        shown = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, env=environment, check=True)
        said = os.read(ours, 100_000)
    finally:
        os.close(theirs)
        os.close(ours)
    assert b"largest shifts" in said
    assert shown.stdout == quiet.stdout

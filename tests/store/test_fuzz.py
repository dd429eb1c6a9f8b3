"""A shortened form of `python -m tests.store.fuzz`, in a process of its own: it limits its memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.thorough
def test_mutated_stores_are_read_or_refused():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.store.fuzz", "--stores", "250", "--seed", "7"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused, read = map(int, re.findall(r"(\d+) (?:refused|read)", done.stdout))
    assert refused + read == 250 and refused > 100 and read > 10

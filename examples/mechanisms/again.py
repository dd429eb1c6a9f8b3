"""Study trained runs once more, without training them again: `python -m examples.mechanisms.again RUN_DIR...`.

Only controls that are missing, because the run was broken off or has new ones, are trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples.mechanisms.__main__ import train_controls, write_seconds
from examples.mechanisms.study import Run, conclude
from examples.train import quietly


def main(arguments: Sequence[str] | None = None) -> None:
    """Renew claims, tables and figures of the runs that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m examples.mechanisms.again", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    quietly()
    for run in parser.parse_args(arguments).runs:
        write_seconds(run, train_controls(Run.read(run).cfg, run, missing=True))
        conclude(run)


if __name__ == "__main__":
    main()

"""Study trained runs once more, without training them again: `python -m examples.mechanisms.again RUN_DIR...`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples.mechanisms.study import conclude


def main(arguments: Sequence[str] | None = None) -> None:
    """Renew claims, tables and figures of the runs that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m examples.mechanisms.again", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    for run in parser.parse_args(arguments).runs:
        conclude(run)


if __name__ == "__main__":
    main()

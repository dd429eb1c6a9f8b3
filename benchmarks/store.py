"""Throughput into the store, and codecs, both on real shifts.

    python -m benchmarks.store --rounds 5 --megabytes 500

The shifts are those of the beginning of `experiment=english`, which is trained first (a minute or two); `--trace` takes
those of a trace that is there, with Dense and TopK.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.codecs import compare
from benchmarks.shifts import record_shifts
from benchmarks.throughput import throughput
from lightning_gradtrace import open_trace


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=500, help="raw size that every way writes")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--trace", type=Path, help="a trace with Dense and TopK(per='sample'), instead of training one")
    parser.add_argument("--only", choices=("throughput", "codecs"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder)
        trace = record_shifts(path / "shifts.zarr") if arguments.trace is None else open_trace(arguments.trace)
        if arguments.only != "codecs":
            print(throughput(trace, path, arguments.rounds, arguments.megabytes).round(2).to_string())
        if arguments.only != "throughput":
            print(compare(trace).round(3).to_string(index=False))


if __name__ == "__main__":
    main()

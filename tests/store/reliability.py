"""Kills, faults and hostile traces in full, and the table that stands in docs/reliability.md.

    python -m tests.store.reliability --write docs/reliability.md

Every number is counted in this run: kills and mutated stores by their own programs, faults by the tests that inject
them (one each, or as many as a test notes as `faults`). Lost are raw bytes of steps that a reader or the writer had
seen committed and that the trace does not hold, unchanged, afterwards.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

FAULTS = {
    "writer or resumed run stopped at a put": (
        "killed_at or cut_off_after",
        "store/test_crash.py store/test_resuming.py store/test_faults.py",
    ),
    "disk full, quotas, permissions, two runs, clocks": (
        "fills_up or full or permissions or grow or read_only or runs or lock",
        "store/test_faults.py store/test_opening.py",
    ),
    "chunks and documents lost, damaged, replaced": (
        "damage or missing_chunk or flipped or numbers or place or is_cut_off or zip_file or not_be_read or shorter",
        "store/test_verify.py store/test_hostile_places.py store/test_faults.py store/test_resuming.py",
    ),
    "object store: dropped, slow, gone, two runs": ("dropped or away or first", "store/test_places.py"),
    "training: exceptions, signals, full disk, resumed": (
        "resumed or signal or middle or disk or error",
        "test_resume.py",
    ),
    "several ranks: errors, kills, S3, resumed": (
        "an_error or one_can_not or left_alone or killed or dropped or resumed or not_share",
        "ranks/test_failures.py ranks/test_places.py",
    ),
}
"""Tests that inject faults: what their names hold, and their files."""


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        what: what was done.
        tried: how often.
        survived: how often it ended as it should: readable and whole, or, for hostile stores, refused or read.
        lost: committed bytes lost.
        note: what else was counted.
    """

    what: str
    tried: int
    survived: int
    lost: int
    note: str = ""

    def __str__(self) -> str:
        """A row of a Markdown table."""
        return f"| {self.what} | {self.tried:,} | {self.survived:,} | {self.lost:,} | {self.note} |"


def _run(*command: str) -> str:
    """Run a module in a process of its own and pass on what it says."""
    print(f"$ python -m {' '.join(command)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    process.wait()
    return "".join(lines)


def kills(n: int) -> Line:
    """Kill a writer n times."""
    said = _run("tests.store.kills", "--kills", str(n))
    found = re.search(r"(\d+) kills: .* held (\d+ to \d+) whole steps; bytes of committed steps lost: (\d+)", said)
    if found is None:
        return Line("writer killed (`kill -9`) at a random moment", n, 0, 0, "**failed**, see the output")
    survived, held, lost = int(found[1]), found[2], int(found[3])
    return Line("writer killed (`kill -9`) at a random moment", n, survived, lost, f"traces held {held} steps")


def mutated(n: int, seed: int) -> Line:
    """Open n mutated stores."""
    said = _run("tests.store.fuzz", "--stores", str(n), "--seed", str(seed))
    counts = re.findall(r"(\d+) mutated stores: (\d+) refused, (\d+) read, 0 others", said)
    if not counts:
        return Line("mutated stores opened and read", n, 0, 0, "**failed**, see the output")
    tried, refused, read = map(int, counts[-1])
    return Line("mutated stores opened and read", tried, refused + read, 0, f"{refused:,} refused, {read:,} read")


def faults(what: str, names: str, files: str) -> Line:
    """Run tests that inject faults and count these."""
    with tempfile.TemporaryDirectory() as folder:
        report, paths = Path(folder) / "report.xml", [f"tests/{file}" for file in files.split()]
        _run(
            "pytest",
            "-q",
            "-o",
            "junit_family=xunit1",
            f"--junitxml={report}",
            "-k",
            names,
            "-m",
            "not gpu and not pretend",
            *paths,
        )
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    tried = survived = lost = failed = 0
    for case in cases:
        noted = {one.get("name"): int(one.get("value") or 0) for one in case.iter("property")}
        n = noted.get("faults", 1)
        passed = not any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        tried, survived, lost = tried + n, survived + n * passed, lost + noted.get("lost_bytes", 0)
        failed += not passed
    note = f"{len(cases)} tests" if cases and not failed else f"**{failed} of {len(cases)} tests failed**"
    return Line(what, tried, survived, lost, note)


def table(lines: list[Line], commit: str, command: str, minutes: float) -> str:
    """Put the lines together as Markdown."""
    head = ["| what | tried | survived | committed bytes lost | |", "|---|---|---|---|---|"]
    total = Line("**all**", *(sum(getattr(one, n) for one in lines) for n in ("tried", "survived", "lost")))
    where = f"Python {platform.python_version()}, {platform.system()}"
    said = f"`{command}` at commit `{commit}` ({where}), in {minutes:.0f} minutes:"
    return "\n".join([said, "", *head, *map(str, [*lines, total])])


def main() -> None:
    """Run everything, print the table, and fail if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--stores", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the mutated stores")
    parser.add_argument("--write", type=Path, help="page whose results are replaced by the table")
    arguments = parser.parse_args()
    begun = time.monotonic()
    lines = [kills(arguments.kills), *(faults(what, *tests) for what, tests in FAULTS.items())]
    lines.append(mutated(arguments.stores, arguments.seed))
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    options = f"--kills {arguments.kills} --stores {arguments.stores} --seed {arguments.seed}"
    command = f"python -m tests.store.reliability {options}"
    text = table(lines, git.stdout.strip() or "unknown", command, (time.monotonic() - begun) / 60)
    print(f"\n{text}")
    if arguments.write is not None:
        page = arguments.write.read_text()
        before, _, rest = page.partition(BEGIN)
        after = rest.partition(END)[2]
        arguments.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    bad = [line.what for line in lines if line.survived < line.tried or line.lost or not line.tried]
    if bad:
        sys.exit(f"not everything survived: {'; '.join(bad)}")


if __name__ == "__main__":
    main()

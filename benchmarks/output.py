"""What a benchmark prints: the machine, and tables that can be pasted into the documentation."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch

CPU_FACTS = Path("/proc/cpuinfo")


def machine(device: str) -> dict[str, Any]:
    """Return what the figures depend on: processor, threads, torch, and the card if one is used."""
    facts: dict[str, Any] = {"cpu": _processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device == "cuda":
        facts["card"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    if CPU_FACTS.is_file():
        for line in CPU_FACTS.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown(frame: pd.DataFrame, digits: int = 3) -> str:
    """Return a table in Markdown; the index is its first column, unless it is a plain number of the rows.

    Example::

        >>> print(markdown(pd.DataFrame({"x plain": [1.0, 1.25]}, index=["plain", "GradTrace"]), digits=2))
        | | x plain |
        |---|---|
        | plain | 1.00 |
        | GradTrace | 1.25 |
    """
    numbered = isinstance(frame.index, pd.RangeIndex)
    heads = [*([] if numbered else [""]), *map(str, frame.columns)]
    lines = ["|".join(["", *(f" {head} " if head else " " for head in heads), ""]), "|" + "---|" * len(heads)]
    for name, row in zip(frame.index, frame.itertuples(index=False), strict=True):
        cells = [*([] if numbered else [str(name)]), *(_cell(value, digits) for value in row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, float):
        return "not available" if value != value else f"{value:.{digits}f}"
    return str(value)


def write_json(path: Path, facts: dict[str, Any], results: dict[str, Any]) -> None:
    """Write the facts of the machine and the results to a file."""
    path.write_text(json.dumps({"machine": facts, **results}, indent=2) + "\n", encoding="utf-8")

"""The short tables of a survey in Markdown, as `docs/results/` shows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from examples.summarize import markdown
from lightning_gradtrace import analysis
from lightning_gradtrace.report.summary import shorten

LONG = 15
# Parameters show by their short names.
_NAMES = ("param", "module")


def summarize(folder: Path, jobs: pd.DataFrame, run: Path) -> str:
    """Return the summary: what ran, then a section for every table, cut after a few rows.

    Args:
        folder: of the tables.
        jobs: from `run_jobs`.
        run: the run directory, for its metrics.
    """
    tables = {file.stem: _read(file) for file in sorted(folder.glob("*.csv"))}
    names = shorten(sorted({str(n) for t in tables.values() for c in _NAMES if c in t for n in t[c].dropna()}))
    metrics = run / "metrics.yaml"
    parts = [f"# Survey of {run.name}", metrics.read_text(encoding="utf-8") if metrics.exists() else ""]
    parts.append("## What ran\n\n" + markdown(jobs, 1))
    for title, table in [*_derived(tables), *tables.items()]:
        shown = table.head(LONG).copy()
        for column in _NAMES:
            if column in shown:
                shown[column] = [names.get(str(name), name) for name in shown[column]]
        more = f"\n\n{len(table)} rows" if len(table) > LONG else ""
        parts.append(f"## {title}\n\n{markdown(shown)}{more}")
    return "\n\n".join(parts) + "\n"


def _read(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, keep_default_na=False, na_values=[""])


def _derived(tables: dict[str, pd.DataFrame]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Tables of tables: the layer table, and controls pooled over neurons."""
    if "ablation" in tables:
        yield "Layer table, all neurons", analysis.layer_table(tables["ablation"])
    every = ["control_random", "control_frequency", "control_peers", "control_null"]
    for title, names in (
        ("Controls, pooled over all neurons", every),
        ("Controls, pooled over selective neurons", ["selective_controls"]),
    ):
        found = [tables[name] for name in names if name in tables]
        if found:
            together = pd.concat(found, ignore_index=True)
            yield title, analysis.pool_controls(together)
            yield f"{title}, by matrix", analysis.pool_controls(together, "param")

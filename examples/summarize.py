"""Summarise an analysed run as Markdown tables: `python -m examples.summarize runs/wikitext2`.

Reads the trace and the tables that `examples/analyze.py` wrote; prints what `docs/results/` shows. Where the trace
holds both selections, per sample and per step, their most frequent entries and notable tokens are compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from lightning_gradtrace import analysis, open_trace
from lightning_gradtrace.store import Trace


def _load(file: Path) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def markdown(table: pd.DataFrame, digits: int = 4) -> str:
    """Return a table in Markdown.

    Args:
        table: any table; floats are rounded.
        digits: number of decimals of floats.
    """
    shown = table.copy()
    for column in shown.select_dtypes("float"):
        shown[column] = [f"{value:.{digits}f}" for value in shown[column]]
    rows = [list(shown.columns), ["---"] * len(shown.columns), *shown.to_numpy(dtype=object).tolist()]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def size_table(trace: Trace, path: Path) -> pd.DataFrame:
    """Return bytes on disk, and bytes per kept entry, of every group of a trace on a local disk."""
    rows = []
    for group in sorted(p for p in path.iterdir() if p.is_dir()):
        size = sum(f.stat().st_size for f in group.rglob("*") if f.is_file())
        view = trace.using(group.name).topk if group.name in ("topk", "topk_step") else None
        kept = view.n_rows * view.k if view is not None else 0
        rows.append((group.name, f"{size:,}", f"{kept:,}", f"{size / kept:.2f}" if kept else ""))
    return pd.DataFrame(rows, columns=["group", "bytes", "kept entries", "bytes per entry"])


def per_parameter(neurons: pd.DataFrame, entries: pd.DataFrame) -> pd.DataFrame:
    """Count frequent entries, neurons, and neurons with notable tokens, parameter by parameter."""
    table = pd.DataFrame(
        {
            "frequent entries": entries.groupby("param", observed=True).size(),
            "neurons": neurons.groupby("param", observed=True).size(),
            "with notable tokens": neurons[neurons["n_notable"] > 0].groupby("param", observed=True).size(),
        }
    )
    return table.fillna(0).astype(int).rename_axis("param").reset_index()


def compare_selections(trace: Trace, thresholds: dict[str, Any], n_entries: int, axis: str) -> pd.DataFrame:
    """Compare what the selection per sample and the one per step find."""
    found = {}
    for record in ("topk", "topk_step"):
        chosen = trace.using(record)
        entries = analysis.frequent_entries(chosen, n_entries)
        notable = analysis.notable_tokens(chosen, entries, **thresholds)
        neurons = analysis.neurons(chosen, entries, notable, axis)
        with_tokens = neurons[neurons["n_notable"] > 0]
        found[record] = (
            set(entries["entry"]),
            set(zip(with_tokens["param"], with_tokens["neuron"], strict=True)),
            set(notable["token"]),
        )
    rows = []
    for number, what in enumerate(("frequent entries", "neurons with notable tokens", "notable tokens")):
        a, b = found["topk"][number], found["topk_step"][number]
        rows.append((what, len(a), len(b), len(a & b), len(a & b) / max(len(a | b), 1)))
    return pd.DataFrame(rows, columns=["", "per sample", "per step", "both", "Jaccard"])


def sections(run: Path) -> Iterator[tuple[str, str]]:
    """Yield title and text of every section."""
    trace, cfg = open_trace(run / "trace.zarr"), _load(run / "config.yaml")["analysis"]
    tables = {
        file.stem: pd.read_csv(file, keep_default_na=False, na_values=[""])
        for file in sorted((run / "analysis").rglob("*.csv"))
    }
    metrics = _load(run / "metrics.yaml")
    yield "Run", "\n".join(f"- {name.replace('_', ' ')}: {value:.2f}" for name, value in metrics.items())
    steps = trace.steps
    ledger = steps["residual"].dropna()
    yield (
        "Ledger",
        f"{len(steps):,} steps, {trace.n_occurrences:,} occurrences; residual at {len(ledger)} steps: median "
        f"{ledger.median():.1e}, largest {ledger.max():.1e}; gradients clipped at "
        f"{(steps['clip_factor'] < 1).mean():.1%} of the steps, by {steps['clip_factor'].median():.3f} in the median.",
    )
    yield "Size", markdown(size_table(trace, run / "trace.zarr"))
    yield "Entries and neurons per parameter", markdown(per_parameter(tables["neurons"], tables["entries"]))
    yield "Layers", markdown(tables["layers"])
    best = tables["ablation"].sort_values("notable_flip_rate", ascending=False)
    named = best.merge(tables["neurons"][["param", "neuron", "axis", "text"]], on=["param", "neuron", "axis"])
    named["text"] = [", ".join(json.loads(text)) for text in named["text"]]
    columns = ["param", "neuron", "n_samples", "flip_rate", "notable_flip_rate", "flipped_tokens", "share", "text"]
    yield "Ten neurons with the largest flip rate of their notable tokens", markdown(named[columns].head(10))
    yield "Controls, pooled over the neurons", markdown(tables["pooled"])
    if {"topk", "topk_step"} <= set(trace.records):
        thresholds = {name: cfg[name] for name in ("min_count", "n_relative", "n_notable", "min_relative")}
        yield (
            "Selection per sample and per step",
            markdown(compare_selections(trace, thresholds, cfg["n_entries"], cfg["axis"])),
        )


def main() -> None:
    """Print the summary of the run named on the command line."""
    for title, text in sections(Path(sys.argv[1])):
        print(f"## {title}\n\n{text}\n", flush=True)


if __name__ == "__main__":
    main()

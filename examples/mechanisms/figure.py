"""The figures of a head's study: when the mechanism formed, and whose shifts made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from examples.mechanisms.study import Run

GREY = "0.85"


def draw_formation(
    run: Run,
    measures: Mapping[str, str],
    steps: slice,
    moved: Mapping[str, pd.DataFrame],
    heads: pd.DataFrame | None = None,
) -> None:
    """Draw measures by step, the enrichment of patterns in the parts of a head, and what moved each head.

    Into ``formation.png``.

    Args:
        run: a finished run.
        measures: columns of its measures by what they are called, drawn from 0 to 1 on the left.
        steps: the window in which shifts were counted, shaded.
        moved: tables of `heads_study.who_moved` by what the pattern is called.
        heads: table of `heads_study.moved_by_loss_tokens`, drawn on the right.
    """
    figure = Figure(figsize=(9 if heads is None else 12, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if heads is None else 3, width_ratios=[2, 1.4] if heads is None else [2, 1.4, 1.2])
    table = run.measures()
    for name, column in measures.items():
        axes[0].plot(table.index, table[column], label=name)
    axes[0].axvspan(steps.start, steps.stop, color=GREY, zorder=0, label="shifts counted")
    axes[0].set(xlabel="step", ylim=(0, 1))
    axes[0].legend(frameon=False, fontsize=8)
    _enrichment(axes[1], moved)
    if heads is not None:
        _heads(axes[2], heads)
    figure.savefig(run.path / "formation.png", dpi=120)


def _enrichment(axes: Any, moved: Mapping[str, pd.DataFrame]) -> None:
    """Draw enrichment with its interval and its null, by part."""
    parts = list(next(iter(moved.values())).index)
    for number, (name, table) in enumerate(moved.items()):
        for place, part in enumerate(parts):
            row, x = table.loc[part], place + 0.3 * number
            axes.fill_between([x - 0.12, x + 0.12], row["null_low"], row["null_high"], color=GREY, lw=0)
            interval = [[row["enrichment"] - row["low"]], [row["high"] - row["enrichment"]]]
            axes.errorbar(
                x,
                row["enrichment"],
                interval,
                fmt="o",
                color=f"C{number}",
                capsize=3,
                label=name if not place else None,
            )
    axes.axhline(1, color="0.4", lw=0.8)
    # Intervals that say nothing run out of the frame.
    inside = pd.concat([table[["enrichment", "null_low", "null_high"]].stack() for table in moved.values()])
    axes.set(ylim=(inside.min() - 0.5, inside.max() + 0.5))
    axes.set(xticks=range(len(parts)), xticklabels=parts, ylabel="enrichment along the change")
    axes.set_title("grey: 95 % of permutations", fontsize=8)
    axes.legend(frameon=False, fontsize=8)


def _heads(axes: Any, heads: pd.DataFrame) -> None:
    """Draw by head how much loss tokens moved it and what switching it off costs."""
    heads = heads.dropna(subset=["moved"])
    axes.scatter(heads["moved"], heads["ablation"].abs(), color="C0")
    for name, row in heads.iterrows():
        axes.annotate(
            str(name), (row["moved"], abs(row["ablation"])), xytext=(4, 2), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="share moved by closing brackets", ylabel="what switching it off costs")

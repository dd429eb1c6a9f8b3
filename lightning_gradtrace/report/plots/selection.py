"""What was selected, and the words of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.report.plots._shared import MOST, axes_for, bars, plain
from lightning_gradtrace.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_outliers(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `outliers`: value of each outlier over the step in which it happened."""
    ax = axes_for(table, {"step", "value", "rank"}, ax)
    ax.scatter(table["step"], table["value"], s=6, color=LIGHT.faint)
    first = table[table["rank"] == 1]
    ax.scatter(first["step"], first["value"], s=9, color=LIGHT.accent, label="largest of its group")
    ax.set(title="Largest shifts", xlabel="step", ylabel="value")
    if len(first):
        ax.legend(loc="upper right")
    return ax


def plot_entries(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `count_entries` or `frequent_entries`: how often each entry was selected, by rank."""
    ax = axes_for(table, {"param", "count"}, ax)
    ranked = table.sort_values("count", ascending=False, kind="stable").reset_index(drop=True)
    ax.plot(ranked.index + 1, ranked["count"], color=LIGHT.accent, linewidth=1.5)
    if len(ranked):
        ax.set_xscale("log")
        ax.set_yscale("log")
    ax.set(title="How often entries were selected", xlabel="rank of the entry", ylabel="occurrences")
    return ax


def plot_tokens(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `notable_tokens`: relative frequency over count; the `n` of largest score have names.

    Names that would lie on others are left out.
    """
    ax = axes_for(table, {"count", "relative", "score", "text"}, ax)
    ax.scatter(table["count"], table["relative"], s=6, color=LIGHT.faint)
    if (table["count"] > 0).any():
        ax.set_xscale("log")
        ax.set_yscale("log")
    _name_points(ax, table.nlargest(n, "score").drop_duplicates("text"), "count", "relative")
    ax.set(title="Notable tokens", xlabel="count", ylabel="relative frequency")
    return ax


def plot_bigrams(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `bigram_shifts`: the `n` pairs that changed most."""
    ax = axes_for(table, {"text", "next_text", "shift"}, ax)
    part = table.reindex(table["shift"].abs().sort_values(ascending=False).index).head(n)
    part = part.assign(label=part["text"].astype(str) + " " + part["next_text"].astype(str))
    return bars(ax, part, "label", "shift", "Pairs of tokens", "shift of their score")


def _name_points(ax: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """Write the text of each point beside it, the first ones first, unless another one is in its way."""
    ax.autoscale_view()
    to_axes = (ax.transData + ax.transAxes.inverted()).transform
    taken = np.empty((0, 2))
    for one in table.to_dict("records"):
        at = to_axes((one[x], one[y]))
        if (np.abs(taken - at) < (0.1, 0.04)).all(axis=1).any():
            continue
        taken = np.vstack([taken, at])
        ax.annotate(plain(one["text"]), (one[x], one[y]), fontsize=7, color=LIGHT.accent, parse_math=False)

"""What was selected, and the words of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.report.plots._shared import MOST, axes_for, bars, labels_of, plain
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


def plot_neurons(table: pd.DataFrame, ax: Axes | None = None, *, value: str = "n_occurrences") -> Axes:
    """Draw the table of `neurons` (or of `components` by head) as a map: a row per weight, a cell per neuron.

    Neurons that the table doesn't hold are left white.

    Args:
        table: of `neurons`, or of `components` with `by` "head" or "head_part".
        ax: the Axes to draw in; None makes a figure.
        value: column that the colour stands for.

    Raises:
        ValueError: a column is missing.
    """
    number = "neuron" if "neuron" in table else "head"
    ax = axes_for(table, {number, value}, ax)
    keys = [name for name in ("param", "module", "part", "axis") if name in table]
    rows = table[keys].drop_duplicates().sort_values(keys, kind="stable", ignore_index=True)
    if len(rows):
        cells = np.full((len(rows), int(table[number].max()) + 1), np.nan)
        place = table[keys].merge(rows.assign(place=rows.index), on=keys, how="left")["place"]
        cells[place.to_numpy(int), table[number].to_numpy(int)] = table[value]
        image = ax.imshow(cells, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
        ax.figure.colorbar(image, ax=ax, label=value.replace("_", " "))
    ax.set_yticks(np.arange(len(rows)), labels_of(rows, keys), parse_math=False)
    ax.set(title=f"{number.capitalize()}s", xlabel=number)
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

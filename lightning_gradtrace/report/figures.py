"""The figures of a report, each a function of tables that returns a matplotlib Figure. Call them inside `theme`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.report.summary import MEASURES, neuron_summary, short_names
from lightning_gradtrace.report.tables import Tables
from lightning_gradtrace.report.theme import Colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NEURONS = 25


def training(tables: Tables, colours: Colours) -> Figure:
    """Loss of every step, and the ledger's residual where it was computed."""
    steps = tables["steps"]
    figure = _figure(8.5, 2.9)
    left, right = figure.subplots(1, 2)
    left.plot(steps["step"], steps["loss"], color=colours.faint, linewidth=0.6)
    smooth = steps["loss"].rolling(max(1, len(steps) // 50), min_periods=1, center=True).mean()
    left.plot(steps["step"], smooth, color=colours.accent, linewidth=1.5)
    left.set(title="Training loss", xlabel="step", ylabel="loss")
    plot_ledger(right, steps, colours)
    return figure


def plot_ledger(axes: Axes, steps: pd.DataFrame, colours: Colours) -> None:
    """Draw the ledger's residual of every step where it was computed, above what rounding of the weights can leave.

    Args:
        axes: where to.
        steps: columns step, residual and, in newer traces, rounding: `trace.steps.reset_index()`.
        colours: of the theme.
    """
    checked = steps[steps["residual"].notna()]
    positive = checked["residual"][checked["residual"].between(0, np.inf, inclusive="neither")]
    if "rounding" in checked and checked["rounding"].notna().any():
        axes.plot(checked["step"], checked["rounding"], color=colours.faint, linewidth=1.2, label="rounding of weights")
    axes.plot(checked["step"], checked["residual"], "o", color=colours.accent, markersize=3, label="residual")
    axes.axhline(1e-5, color=colours.contrast, linewidth=1, linestyle="--", label="1e-5")
    if len(positive):
        axes.set_yscale("log")
        axes.set_ylim(min(positive.min(), 1e-7) / 3, None)
    axes.set(title="Ledger residual", xlabel="step", ylabel="relative residual")
    axes.legend(loc="upper right", fontsize="small")


def entry_frequency(tables: Tables, colours: Colours) -> Figure:
    """How often entries were selected, by rank, and where the most frequent ones lie."""
    counts, kept = tables["frequencies"].sort_values("count", ascending=False), tables["entries"]
    figure = _figure(8.5, 3.2)
    left, right = figure.subplots(1, 2)
    rank = counts["entries"].cumsum()
    left.step(rank, counts["count"], where="pre", color=colours.accent)
    if len(kept):
        left.axvline(len(kept), color=colours.contrast, linewidth=1, linestyle="--")
        top = left.get_xaxis_transform()
        left.text(len(kept), 1.0, f" {len(kept):,} kept", color=colours.contrast, va="top", transform=top)
    left.set(title="Selected entries", xlabel="rank of the entry", ylabel="occurrences that selected it")
    if len(counts):
        left.set_xscale("log")
        left.set_yscale("log")
    number = kept.sort_values("entry")["param"].astype(str).value_counts(sort=False)  # in the order of the model
    names = short_names(tables)
    _bars(right, [names[n] for n in number.index], number.to_numpy(), colours)
    right.set(title="Where the kept ones lie", xlabel="entries")
    return figure


def flip_proportions(tables: Tables, colours: Colours) -> Figure:
    """Flip proportion of each neuron's notable tokens on attributed and on random samples, and the difference."""
    table = neuron_summary(tables["neurons"], tables["controls"], n_tokens=3)
    table = table[table["random_effect"].notna()].head(_MOST_NEURONS).iloc[::-1]
    figure = _figure(8.5, 1.3 + 0.26 * max(len(table), 1))
    left, right = figure.subplots(1, 2, sharey=True)
    if table.empty:
        _nothing([left, right], "no neuron has this control", colours)
        return figure
    names = short_names(tables)
    place = np.arange(len(table))
    labels = [
        f"{names[p]} {'column' if a == 'in' else 'row'} {n}: {_clip(t)}"
        for p, a, n, t in zip(table["param"], table["axis"], table["neuron"], table["tokens_shown"], strict=True)
    ]
    left.hlines(place, table["random_control"], table["random_value"], color=colours.faint)
    left.plot(table["random_control"], place, "o", color=colours.contrast, markersize=5, label="random samples")
    left.plot(table["random_value"], place, "o", color=colours.accent, markersize=5, label="attributed samples")
    # A token is shown as it is: a dollar sign in it does not start a formula.
    left.set_yticks(place, labels, parse_math=False)
    left.set(title="Flip proportion")
    left.set_xlim(0, None)
    figure.legend(loc="outside lower left", ncols=2)
    _intervals(right, place, table, "random", colours)
    right.set(title="Difference")
    return figure


def pooled_controls(tables: Tables, colours: Colours) -> Figure:
    """Effect against each control with its interval, mean over all neurons that were switched off."""
    pooled = tables["pooled"]
    rows = pd.concat(
        [pooled[(pooled["control"] == control) & (pooled["measure"] == m)] for control, m in MEASURES.items()]
    ).iloc[::-1]
    figure = _figure(8.5, 1.2 + 0.3 * max(len(rows), 1))
    axes = figure.subplots()
    if rows.empty:
        _nothing([axes], "no neuron was ablated", colours)
        return figure
    place = np.arange(len(rows))
    table = rows.rename(columns={c: f"pooled_{c}" for c in ("effect", "low", "high")})
    _intervals(axes, place, table, "pooled", colours)
    labels = [f"{c}: {_words(m)} ({n} neurons)" for c, m, n in rows[["control", "measure", "neurons"]].to_numpy()]
    axes.set_yticks(place, labels)
    axes.set(title="Value minus control")
    return figure


FIGURES: dict[str, Callable[[Tables, Colours], Figure]] = {
    "flip_proportions": flip_proportions,
    "pooled_controls": pooled_controls,
    "entry_frequency": entry_frequency,
    "training": training,
}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _bars(axes: Axes, names: list[str], values: np.ndarray, colours: Colours) -> None:
    place = np.arange(len(names))[::-1]
    axes.barh(place, values, color=colours.accent, height=0.7)
    axes.set_yticks(place, names)


def _intervals(axes: Axes, place: np.ndarray, table: pd.DataFrame, prefix: str, colours: Colours) -> None:
    axes.axvline(0, color=colours.faint, linewidth=1)
    axes.hlines(place, table[f"{prefix}_low"], table[f"{prefix}_high"], color=colours.ink, linewidth=1.2)
    axes.plot(table[f"{prefix}_effect"], place, "D", color=colours.ink, markersize=4)
    axes.set_ylim(-0.7, len(place) - 0.3)


def _nothing(axes: list[Axes], text: str, colours: Colours) -> None:
    for one in axes:
        one.set_axis_off()
    axes[0].text(0.5, 0.5, text, ha="center", va="center", color=colours.ink)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _clip(text: str, most: int = 24) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"

"""Plots over the steps of a training: when something moved, in which order, and who moved it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.report.plots._drawing import MOST, axes_of, draw_bars, group_labels, keys_before
from lightning_gradtrace.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_movement(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `movement`: when the `n` groups that moved most did so, each in shares of its movement."""
    ax = axes_of(table, {"step", "moved"}, ax)
    keys = [c for c in table.columns if c not in ("step", "shifts", "moved", "net")]
    wide = table.pivot_table(index=keys, columns="step", values="moved", aggfunc="sum", sort=False, observed=True)
    wide = wide.loc[wide.sum(axis=1).sort_values(ascending=False, kind="stable").index].head(n)
    share = wide.div(wide.sum(axis=1).where(lambda s: s > 0), axis=0).to_numpy()
    if share.size:
        steps = wide.columns.to_numpy(float)
        width = steps[1] - steps[0] if len(steps) > 1 else 1.0
        ax.imshow(
            share,
            aspect="auto",
            extent=(steps[0], steps[-1] + width, len(wide) - 0.5, -0.5),
            cmap="Blues",
            interpolation="nearest",
        )
    ax.set_yticks(np.arange(len(wide)), group_labels(wide.index.to_frame(index=False), keys), parse_math=False)
    ax.set(title="When did it move", xlabel="step")
    return ax


def plot_formation(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `formation`: the span of steps in which each of the first `n` groups moved."""
    columns = [c for c in table.columns if c.startswith("step_")]
    ax = axes_of(table, {"moved", "order"}, ax)
    keys = [c for c in table.columns if c not in ("moved", "order", *columns)]
    part, place = table.head(n), np.arange(min(n, len(table)))
    ax.hlines(place, part[columns[0]], part[columns[-1]], color=LIGHT.faint, linewidth=3)
    ax.plot(part[columns[len(columns) // 2]], place, "o", color=LIGHT.accent, markersize=4)
    ax.set_yticks(place, group_labels(part, keys), parse_math=False)
    ax.invert_yaxis()
    ax.set(title="In which order they formed", xlabel="step")
    return ax


def plot_movers(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `movers`: how much of each group's movement its listed samples explain together."""
    ax = axes_of(table, {"sample_id", "share", "rank"}, ax)
    keys = keys_before(table, "rank")
    part = table.groupby(keys, sort=False, observed=True)["share"].sum().nlargest(n).reset_index()
    part["label"] = group_labels(part, keys)
    return draw_bars(ax, part, "label", "share", "Who moved it", "share of the movement by the listed samples")


def plot_changes(
    series: pd.DataFrame, changes: pd.DataFrame, ax: Axes | None = None, *, value: str, at: str = "step"
) -> Axes:
    """Draw one series and its change points.

    Args:
        series: one series of the table that `change_points` was given.
        changes: from `change_points`, of the same series.
        ax: the Axes to draw in; None makes a figure.
        value: column of the series.
        at: column that orders it.

    Raises:
        ValueError: a column is missing.
    """
    ax = axes_of(series, {at, value}, ax)
    ordered = series.sort_values(at)
    ax.plot(ordered[at], ordered[value], color=LIGHT.accent, linewidth=1)
    for point in changes[at]:
        ax.axvline(point, color=LIGHT.contrast, linestyle="--", linewidth=1)
    ax.set(title="Change points", xlabel=at, ylabel=value.replace("_", " "))
    return ax


def plot_enrichment(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `pattern_enrichment`: enrichment with its interval over that of the null, the first `n` rows.

    Intervals that are much wider than the null's run out of the frame.
    """
    ax = axes_of(table, {"n_samples", "enrichment", "low", "high", "null_low", "null_high"}, ax)
    part = table.head(n).iloc[::-1]
    place = np.arange(len(part))
    ax.axvline(1, color=LIGHT.faint, linewidth=1)
    ax.hlines(place, part["null_low"], part["null_high"], color=LIGHT.faint, linewidth=7, alpha=0.5)
    ax.hlines(place, part["low"], part["high"], color=LIGHT.ink, linewidth=1.2)
    ax.plot(part["enrichment"], place, "D", color=LIGHT.accent, markersize=4)
    ax.set_yticks(place, group_labels(part, keys_before(table, "n_samples")), parse_math=False)
    drawn = part[["enrichment", "null_low", "null_high"]].to_numpy(float)
    if np.isfinite(drawn).any():
        ax.set_xlim(np.nanmin(drawn) - 0.5, np.nanmax(drawn) + 0.5)
    ax.set(title="Enrichment (band: null)", xlabel="times the share in the data")
    return ax


def plot_heads(table: pd.DataFrame, ax: Axes | None = None, *, value: str = "size", n: int = MOST) -> Axes:
    """Draw the table of `head_shifts`: when the `n` parts of heads that moved most did so, in shares of each.

    Args:
        table: of `head_shifts`.
        ax: the Axes to draw in; None makes a figure.
        value: "size", "square" or, of shifts along a direction, "toward".
        n: at most so many parts.

    Raises:
        ValueError: a column is missing.
    """
    ax = axes_of(table, {"module", "head", "part", "step", value}, ax)
    keys = ["module", "head", "part", "step"]
    sums = table.groupby(keys, sort=False, observed=True)[value].sum().reset_index()
    return plot_movement(sums.rename(columns={value: "moved"}), ax, n=n)


def plot_phases(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `phases`: at each boundary how many series change together, against chance (dashed)."""
    ax = axes_of(table, {"first_step", "last_step", "series", "expected"}, ax)
    middle = (table["first_step"] + table["last_step"]) / 2
    ax.vlines(middle, 0, table["series"], color=LIGHT.faint, linewidth=1.2)
    ax.hlines(table["series"], table["first_step"], table["last_step"], color=LIGHT.accent, linewidth=2)
    ax.plot(middle, table["series"], "o", color=LIGHT.accent, markersize=4)
    if len(table):
        ax.axhline(table["expected"].iloc[0], color=LIGHT.contrast, linestyle="--", linewidth=1)
    ax.set(title="Where series change together", xlabel="step", ylabel="series with a change")
    ax.set_ylim(0, None)
    return ax

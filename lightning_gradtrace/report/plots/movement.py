"""When the weights moved, in which order, and who moved them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.report.plots._shared import MOST, axes_for, bars, labels_of
from lightning_gradtrace.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_movement(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `movement`: when the `n` groups that moved most did so, each in shares of its movement."""
    ax = axes_for(table, {"step", "moved"}, ax)
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
    ax.set_yticks(np.arange(len(wide)), labels_of(wide.index.to_frame(index=False), keys), parse_math=False)
    ax.set(title="When did it move", xlabel="step")
    return ax


def plot_formation(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `formation`: the span of steps in which each of the first `n` groups moved."""
    columns = [c for c in table.columns if c.startswith("step_")]
    ax = axes_for(table, {"moved", "order"}, ax)
    keys = [c for c in table.columns if c not in ("moved", "order", *columns)]
    part, place = table.head(n), np.arange(min(n, len(table)))
    ax.hlines(place, part[columns[0]], part[columns[-1]], color=LIGHT.faint, linewidth=3)
    ax.plot(part[columns[len(columns) // 2]], place, "o", color=LIGHT.accent, markersize=4)
    ax.set_yticks(place, labels_of(part, keys), parse_math=False)
    ax.invert_yaxis()
    ax.set(title="In which order they formed", xlabel="step")
    return ax


def plot_movers(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `movers`: how much of each group's movement its listed samples explain together."""
    ax = axes_for(table, {"sample_id", "share", "rank"}, ax)
    keys = list(table.columns[: list(table.columns).index("rank")])
    part = table.groupby(keys, sort=False, observed=True)["share"].sum().nlargest(n).reset_index()
    part["label"] = labels_of(part, keys)
    return bars(ax, part, "label", "share", "Who moved it", "share of the movement by the listed samples")


def plot_directions(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `direction_shifts`: shift of every occurrence along each direction, over steps."""
    ax = axes_for(table, {"direction", "step", "shift"}, ax)
    for number, part in table.groupby("direction"):
        ax.plot(part["step"], part["shift"], ".", markersize=3, label=f"direction {number}")
    ax.set(title="Shifts along directions", xlabel="step", ylabel="shift")
    if 0 < table["direction"].nunique() <= 8:
        ax.legend(fontsize=7)
    return ax


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
    ax = axes_for(series, {at, value}, ax)
    ordered = series.sort_values(at)
    ax.plot(ordered[at], ordered[value], color=LIGHT.accent, linewidth=1)
    for point in changes[at]:
        ax.axvline(point, color=LIGHT.contrast, linestyle="--", linewidth=1)
    ax.set(title="Change points", xlabel=at, ylabel=value.replace("_", " "))
    return ax

"""How a training changes as it goes on: phases, and the series in which they show."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.report.plots._shared import MOST, axes_for, labels_of
from lightning_gradtrace.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 300
_MOST_BOUNDARIES = 8


def plot_phases(series: pd.DataFrame, phases: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw every series as a row, from its lowest value (white) to its highest (dark), and the phase boundaries.

    Args:
        series: from `trace_series`; the first `n` are drawn.
        phases: from `phase_boundaries` or `trace_phases`; of the 8 at which most series change, the number of these
            stands above.
        ax: the Axes to draw in; None makes a figure.
        n: at most so many series.

    Raises:
        ValueError: a column is missing.
    """
    keys = ["series", "param"]
    ax = axes_for(series, {*keys, "step", "value"}, ax)
    groups = list(series.groupby(keys, sort=False, observed=True))[:n]
    if groups:
        first, last = series["step"].min(), series["step"].max()
        grid = np.linspace(first, last, _POINTS)
        ax.imshow(
            np.stack([_from_0_to_1(np.interp(grid, part["step"], part["value"])) for _, part in groups]),
            aspect="auto",
            extent=(float(first), float(max(last, first + 1)), len(groups) - 0.5, -0.5),
            cmap="Blues",
            interpolation="nearest",
        )
    for row in phases.nlargest(_MOST_BOUNDARIES, "series").to_dict("records"):
        middle = (row["first_step"] + row["last_step"]) / 2
        ax.axvline(middle, color=LIGHT.contrast, linewidth=1)
        place = ax.get_xaxis_transform()
        ax.text(middle, 1.01, row["series"], ha="center", fontsize=7, color=LIGHT.contrast, transform=place)
    names = pd.DataFrame([key for key, _ in groups], columns=keys)
    ax.set_yticks(np.arange(len(groups)), labels_of(names, keys), parse_math=False, fontsize=7)
    ax.set_title("Phases: steps at which several series change", pad=14)
    ax.set(xlabel="step")
    return ax


def plot_self_influence(table: pd.DataFrame, ax: Axes | None = None, *, value: str = "gini") -> Axes:
    """Draw a column of `self_influence` over steps: of the whole model, and of each parameter in grey."""
    ax = _whole_and_parts(table, ax, value)
    ax.set(title="How unevenly the samples of a step share its movement")
    return ax


def plot_shift_sparsity(table: pd.DataFrame, ax: Axes | None = None, *, value: str = "participation") -> Axes:
    """Draw a column of `shift_sparsity` over steps: of the whole model, and of each parameter in grey."""
    ax = _whole_and_parts(table, ax, value)
    ax.set(title="On how many weights a sample's kept shifts are spread")
    return ax


def plot_selection_overlap(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `selection_overlap` over steps: 1 if all samples of a step keep the same entries."""
    ax = axes_for(table, {"step", "overlap"}, ax)
    ax.plot(table["step"], table["overlap"], color=LIGHT.accent, linewidth=1.5)
    ax.set(title="Do the samples of a step move the same weights?", xlabel="step", ylabel="overlap", ylim=(0, 1.02))
    return ax


def plot_bigram_alignment(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `bigram_alignment` over steps, and two standard deviations of its null around its mean."""
    ax = axes_for(table, {"first_step", "pearson", "null_mean", "null_std"}, ax)
    low, high = (table["null_mean"] + sign * 2 * table["null_std"] for sign in (-1, 1))
    ax.fill_between(table["first_step"], low, high, color=LIGHT.faint, alpha=0.5, linewidth=0, label="permuted pairs")
    ax.plot(
        table["first_step"], table["pearson"], "o-", color=LIGHT.accent, markersize=3, linewidth=1, label="the text"
    )
    if len(table):
        ax.legend(fontsize=7)
    ax.set(title="Does a step bring together the bigrams of its texts?", xlabel="step", ylabel="correlation")
    return ax


def _whole_and_parts(table: pd.DataFrame, ax: Axes | None, value: str) -> Axes:
    ax = axes_for(table, {"param", "step", value}, ax)
    for _, part in table[table["param"] != ""].groupby("param", sort=False, observed=True):
        ax.plot(part["step"], part[value], color=LIGHT.faint, linewidth=0.8)
    whole = table[table["param"] == ""]
    ax.plot(whole["step"], whole[value], color=LIGHT.accent, linewidth=1.8, label="all weights")
    if len(table):
        ax.legend(fontsize=7)
    ax.set(xlabel="step", ylabel=value.replace("_", " "))
    return ax


def _from_0_to_1(values: np.ndarray) -> np.ndarray:
    """Scale a row; the outer 2 % on both sides are cut off, as one spike would make all the rest white."""
    low, high = np.quantile(values, [0.02, 0.98])
    scaled: np.ndarray = np.clip((values - low) / (high - low if high > low else 1.0), 0, 1)
    return scaled

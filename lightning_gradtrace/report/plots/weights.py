"""Plots of weights, directions and pairs of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from lightning_gradtrace.report.plots._drawing import MOST, axes_of, draw_bars, draw_lines
from lightning_gradtrace.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_weights(table: pd.DataFrame, ax: Axes | None = None, *, value: str = "norm") -> Axes:
    """Draw a column of `weight_statistics` or `neuron_weights` over training: a line for each parameter or neuron."""
    ax = axes_of(table, {"param", "step", value}, ax)
    keys = [name for name in ("param", "axis", "neuron") if name in table]
    return draw_lines(ax, table, keys, value, "Weights over training")


def plot_spectra(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `weight_spectra`: singular values by rank, one line for each snapshot, the later the darker."""
    ax = axes_of(table, {"param", "step", "rank", "singular_value"}, ax)
    groups = list(table.groupby(["param", "step"], sort=False))
    for number, (key, part) in enumerate(groups):
        shade = 0.25 + 0.75 * (number + 1) / len(groups)
        label = f"step {key[1]}" if number in (0, len(groups) - 1) else None
        ax.plot(part["rank"], part["singular_value"], color=LIGHT.accent, alpha=shade, linewidth=1, label=label)
    ax.set(title="Spectra", xlabel="rank", ylabel="singular value")
    if groups:
        ax.legend(fontsize=7)
    return ax


def plot_directions(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `direction_shifts`: shift of every occurrence along each direction, over steps."""
    ax = axes_of(table, {"direction", "step", "shift"}, ax)
    for number, part in table.groupby("direction"):
        ax.plot(part["step"], part["shift"], ".", markersize=3, label=f"direction {number}")
    ax.set(title="Shifts along directions", xlabel="step", ylabel="shift")
    if 0 < table["direction"].nunique() <= 8:
        ax.legend(fontsize=7)
    return ax


def plot_bigrams(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `bigram_shifts`: the `n` pairs that changed most."""
    ax = axes_of(table, {"text", "next_text", "shift"}, ax)
    part = table.reindex(table["shift"].abs().sort_values(ascending=False).index).head(n)
    part = part.assign(label=part["text"].astype(str) + " " + part["next_text"].astype(str))
    return draw_bars(ax, part, "label", "shift", "Pairs of tokens", "shift of their score")

"""What the weights were at each snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from lightning_gradtrace.report.plots._shared import axes_for, lines
from lightning_gradtrace.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_weights(table: pd.DataFrame, ax: Axes | None = None, *, value: str = "norm") -> Axes:
    """Draw a column of `weight_statistics` or `neuron_weights` over training: a line for each parameter or neuron."""
    ax = axes_for(table, {"param", "step", value}, ax)
    keys = [name for name in ("param", "axis", "neuron") if name in table]
    return lines(ax, table, keys, value, "Weights over training")


def plot_spectra(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `weight_spectra`: singular values by rank, one line for each snapshot, the later the darker."""
    ax = axes_for(table, {"param", "step", "rank", "singular_value"}, ax)
    groups = list(table.groupby(["param", "step"], sort=False))
    for number, (key, part) in enumerate(groups):
        shade = 0.25 + 0.75 * (number + 1) / len(groups)
        label = f"step {key[1]}" if number in (0, len(groups) - 1) else None
        ax.plot(part["rank"], part["singular_value"], color=LIGHT.accent, alpha=shade, linewidth=1, label=label)
    ax.set(title="Spectra", xlabel="rank", ylabel="singular value")
    if groups:
        ax.legend(fontsize=7)
    return ax

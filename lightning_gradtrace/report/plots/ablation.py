"""What happens without a neuron, against its controls, and what activations show."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.report.plots._shared import MOST, axes_for, bars, intervals, labels_of, letters
from lightning_gradtrace.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_ablation(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `neuron_ablation`: share of flipped predictions, at all positions and at notable tokens."""
    ax = axes_for(table, {"n_samples", "flip_rate", "notable_flip_rate"}, ax)
    part = table.head(n)
    place = np.arange(len(part))[::-1]
    ax.hlines(place, part["flip_rate"], part["notable_flip_rate"], color=LIGHT.faint)
    ax.plot(part["flip_rate"], place, "o", color=LIGHT.contrast, markersize=5, label="all positions")
    ax.plot(part["notable_flip_rate"], place, "o", color=LIGHT.accent, markersize=5, label="with a notable token")
    keys = list(table.columns[: list(table.columns).index("n_samples")])
    ax.set_yticks(place, labels_of(part, keys), parse_math=False, fontsize=letters(len(part)))
    ax.set(title="Flipped predictions without it", xlabel="share of the positions")
    ax.legend(loc="lower right")
    return ax


def plot_effects(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `ablation_effects`: change of the loss with its interval, the `n` largest ones."""
    ax = axes_for(table, {"loss_change", "low", "high"}, ax)
    part = table.reindex(table["loss_change"].abs().sort_values(ascending=False).index).head(n)
    keys = list(table.columns[: list(table.columns).index("n_samples")]) if "n_samples" in table else []
    return intervals(ax, part, keys, "loss_change", "Loss without it", "change of the loss, nats")


def plot_token_losses(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `token_losses`: the `n` tokens whose loss grows most, in the worst ablation."""
    ax = axes_for(table, {"text", "loss_change", "count"}, ax)
    part = table.sort_values("loss_change", ascending=False, kind="stable").drop_duplicates("text").head(n)
    return bars(ax, part, "text", "loss_change", "Tokens that lose most", "nats")


def plot_flips(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `flip_tables` or `count_flips`: proportion of flips of the `n` tokens that flip most.

    Flips and counts of several ablations add up.
    """
    ax = axes_for(table, {"text", "flips", "count", "proportion"}, ax)
    part = table.groupby("text", sort=False)[["flips", "count"]].sum().nlargest(n, "flips").reset_index()
    part["proportion"] = part["flips"] / part["count"].clip(lower=1)
    return bars(ax, part, "text", "proportion", "Flipped predictions", "flips / count")


def plot_controls(table: pd.DataFrame, ax: Axes | None = None, *, measure: str = "flip_rate", n: int = MOST) -> Axes:
    """Draw a table of controls, of components or pooled: effect of one measure with its interval, against zero.

    Args:
        table: of the controls, concatenated, or of `pool_controls`.
        ax: the Axes to draw in; None makes a figure.
        measure: which rows: `flip_rate`, `notable_flip_rate`, `notable_share` or `token_share`. The rows of
            `frequency_control`, whose measure is `proportion`, are always drawn.
        n: at most so many rows.

    Raises:
        ValueError: a column is missing.
    """
    ax = axes_for(table, {"control", "measure", "effect", "low", "high"}, ax)
    part = table[table["measure"].isin([measure, "proportion"]) & table["effect"].notna()].head(n)
    keys = [*table.columns[: list(table.columns).index("measure")]]
    return intervals(ax, part, keys, "effect", "More than its control?", f"{measure.replace('_', ' ')}, difference")


def plot_layers(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `layer_table`: per parameter, the share of flipped tokens that were notable beforehand."""
    ax = axes_for(table, {"param", "notable_share"}, ax)
    part = table.assign(label=labels_of(table, ["param"]))
    return bars(ax, part, "label", "notable_share", "Notable tokens among the flipped", "share, mean over neurons")


def plot_activations(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `activation_baseline`: where flagged neurons rank among all of their weight."""
    ax = axes_for(table, {"rank_high", "n_neurons"}, ax)
    share = (table["rank_high"] - 1) / (table["n_neurons"] - 1).clip(lower=1)
    ax.hist(share, bins=np.linspace(0, 1, 21).tolist(), color=LIGHT.accent)
    ax.axhline(len(table) / 20, color=LIGHT.contrast, linestyle="--", linewidth=1)
    ax.set(title="Rank by activation on notable tokens", xlabel="0: highest of its weight, 1: lowest", ylabel="pairs")
    return ax


def plot_top_samples(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `top_samples`: how many samples of each neuron are in both of its lists."""
    ax = axes_for(table, {"param", "axis", "neuron", "kind", "both"}, ax)
    part = table[table["kind"] == "shift"].groupby(["param", "axis", "neuron"], sort=False)["both"].mean().reset_index()
    part["label"] = labels_of(part, ["param", "axis", "neuron"])
    title = "Samples that move a neuron and activate it"
    return bars(ax, part.head(MOST), "label", "both", title, "share of its list")

"""What made a mechanism: enrichment, groups, heads, and how the shifts of a step divide and agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.report.plots._shared import MOST, axes_for, labels_of
from lightning_gradtrace.report.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LINES = 8


def plot_enrichment(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `pattern_enrichment`: enrichment with its interval over that of the null, the first `n` rows.

    Intervals that are much wider than the null's run out of the frame.
    """
    ax = axes_for(table, {"n_samples", "enrichment", "low", "high", "null_low", "null_high"}, ax)
    part = table.head(n)
    ax.axvline(1, color=LIGHT.faint, linewidth=1)
    place = _over_null(ax, part, list(table.columns[: list(table.columns).index("n_samples")]), "enrichment")
    ax.hlines(place, part["low"], part["high"], color=LIGHT.ink, linewidth=1.2)
    drawn = part[["enrichment", "null_low", "null_high"]].to_numpy(float)
    if np.isfinite(drawn).any():
        ax.set_xlim(np.nanmin(drawn) - 0.5, np.nanmax(drawn) + 0.5)
    ax.set(title="Enrichment (band: null)", xlabel="times the share in the data")
    return ax


def plot_variance_explained(table: pd.DataFrame, ax: Axes | None = None, *, n: int = MOST) -> Axes:
    """Draw the table of `variance_explained`: the share of each grouping over that of the null, the first `n` rows."""
    ax = axes_for(table, {"n_groups", "explained", "null_low", "null_high"}, ax)
    _over_null(ax, table.head(n), list(table.columns[: list(table.columns).index("n_groups")]), "explained")
    ax.set_xlim(0, None)
    ax.set(title="Does it depend on the group? (band: null)", xlabel="share of the variance between groups")
    return ax


def plot_head_shifts(table: pd.DataFrame, ax: Axes | None = None, *, amount: str = "size", n: int = MOST) -> Axes:
    """Draw the table of `head_shifts`: which share of all that moved is in each part of each head, the first `n` heads.

    Args:
        table: from `head_shifts`; rows of some steps or samples alone say what these moved.
        ax: the Axes to draw in; None makes a figure.
        amount: column to add up: `size`, `square` or, if it is there, `toward`. Net sums have no shares.
        n: at most so many heads.

    Raises:
        ValueError: a column is missing.
    """
    ax = axes_for(table, {"module", "head", "part", amount}, ax)
    sums = table.astype({"module": object}).groupby(["module", "head", "part"], sort=True, observed=True)[amount].sum()
    wide = (sums / sums.sum()).unstack("part", fill_value=0)
    order = [part for part in ("query", "key", "value", "output") if part in wide]
    wide = wide[[*order, *(part for part in wide if part not in order)]].head(n)
    shares = wide.to_numpy(float)
    if shares.size:
        ax.imshow(shares, aspect="auto", cmap="Blues", vmin=0)
    for (row, column), share in np.ndenumerate(shares):
        color = LIGHT.paper if share > 0.6 * shares.max() else LIGHT.ink
        ax.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=8, color=color)
    ax.set_xticks(range(wide.shape[1]), [str(part) for part in wide])
    keys = ["module", "head"]
    ax.set_yticks(range(len(wide)), labels_of(wide.index.to_frame(index=False), keys), parse_math=False)
    ax.set(title=f"Which part of which head moved ({amount})")
    return ax


def plot_coherence(table: pd.DataFrame, ax: Axes | None = None, *, null: pd.DataFrame | None = None) -> Axes:
    """Draw the table of `coherence` over steps; 1 is what random signs give.

    Args:
        table: from `coherence`. The first 8 parameters have names, all together ("all") are in black.
        ax: the Axes to draw in; None makes a figure.
        null: from `sign_null`: where random signs put it, as vertical bars.

    Raises:
        ValueError: a column is missing.
    """
    ax = axes_for(table, {"step", "param", "coherence"}, ax)
    single = list(table[table["param"] != "all"].groupby("param", sort=False, observed=True))
    names = labels_of(pd.DataFrame({"param": [name for name, _ in single]}), ["param"])
    for number, (name, (_, part)) in enumerate(zip(names, single, strict=True)):
        named = number < _MOST_LINES
        options: dict[str, Any] = {"label": name} if named else {"color": LIGHT.faint}
        ax.plot(part["step"], part["coherence"], linewidth=1, **options)
    whole = table[table["param"] == "all"]
    ax.plot(whole["step"], whole["coherence"], color=LIGHT.ink, linewidth=2, label="all weights")
    if null is not None:
        ax.vlines(
            null["step"], null["null_low"], null["null_high"], color=LIGHT.faint, linewidth=4, label="random signs"
        )
    ax.axhline(1, color=LIGHT.faint, linewidth=1)
    if (table["coherence"] > 0).any():
        ax.set_yscale("log")
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    ax.set(title="Do the samples pull the same way?", xlabel="step", ylabel=r"$|\sum s_i|^2\ /\ \sum |s_i|^2$")
    return ax


def plot_division(table: pd.DataFrame, ax: Axes | None = None, *, value: str = "growth") -> Axes:
    """Draw the table of `division`, added up over the recorded steps: what shifts, carry and decay give and take.

    Args:
        table: from `division`; rows of some parameters or components alone say how these divide.
        ax: the Axes to draw in; None makes a figure.
        value: `growth` (of the squared norm) or `product` (with the whole change).

    Raises:
        ValueError: a column is missing.
    """
    ax = axes_for(table, {"step", "part", value}, ax)
    wide = table.pivot_table(index="step", columns="part", values=value, aggfunc="sum", sort=False, observed=True)
    added = wide.sort_index().cumsum()
    for part in added:
        ax.plot(added.index, added[part], linewidth=1.2, label=str(part))
    ax.plot(added.index, added.sum(axis=1), color=LIGHT.ink, linewidth=2, linestyle=":", label="together")
    ax.axhline(0, color=LIGHT.faint, linewidth=1)
    what = "growth of the squared norm" if value == "growth" else "product with the change"
    ax.set(title="Who gives, who takes", xlabel="step", ylabel=f"{what}, added up")
    ax.legend(fontsize=7)
    return ax


def _over_null(ax: Axes, table: pd.DataFrame, keys: Sequence[str], value: str) -> np.ndarray:
    """Draw a value of each row over the band of its null, the first row on top; return the places of the rows."""
    place = np.arange(len(table))[::-1]
    ax.hlines(place, table["null_low"], table["null_high"], color=LIGHT.faint, linewidth=7, alpha=0.5)
    ax.plot(table[value], place, "D", color=LIGHT.accent, markersize=4)
    ax.set_yticks(place, labels_of(table, keys), parse_math=False)
    return place

"""What plots share: axes, bars, intervals, lines, and the names of groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.report.summary import shorten
from lightning_gradtrace.report.theme import LIGHT, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 25
_LONGEST = 28


def axes_of(table: pd.DataFrame, needed: set[str], ax: Axes | None) -> Axes:
    """Return the Axes to draw in, of a new figure if none are given.

    Raises:
        ValueError: the table lacks a column.
    """
    missing = needed - set(table.columns)
    if missing:
        raise ValueError(f"the table lacks the columns {sorted(missing)}, it has {list(table.columns)}")
    if ax is not None:
        return ax
    need_matplotlib()
    from matplotlib.figure import Figure

    ax = Figure(figsize=(6.4, 4.0), layout="constrained").subplots()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def keys_before(table: pd.DataFrame, column: str) -> list[str]:
    """Return the columns before another one: those that name a row."""
    names = list(table.columns)
    return names[: names.index(column)]


def draw_bars(ax: Axes, table: pd.DataFrame, label: str, value: str, title: str, xlabel: str) -> Axes:
    """Draw one bar per row, the first one at the top."""
    place = np.arange(len(table))[::-1]
    ax.barh(place, table[value], color=LIGHT.accent, height=0.7)
    ax.set_yticks(place, [plain(text) for text in table[label]], parse_math=False, fontsize=letter_size(len(table)))
    ax.set(title=title, xlabel=xlabel)
    return ax


def draw_intervals(ax: Axes, table: pd.DataFrame, keys: Sequence[str], value: str, title: str, xlabel: str) -> Axes:
    """Draw a value with its interval `low` to `high` per row, against zero, the first one at the top."""
    place = np.arange(len(table))[::-1]
    ax.axvline(0, color=LIGHT.faint, linewidth=1)
    ax.hlines(place, table["low"], table["high"], color=LIGHT.ink, linewidth=1.2)
    ax.plot(table[value], place, "D", color=LIGHT.accent, markersize=4)
    ax.set_yticks(place, group_labels(table, keys), parse_math=False, fontsize=letter_size(len(table)))
    ax.locator_params(axis="x", nbins=6)
    ax.set(title=title, xlabel=xlabel)
    return ax


def letter_size(n_rows: int) -> float:
    """Return a size of letters at which so many lines of a figure don't touch."""
    return 9.0 if n_rows <= 15 else 7.0


def name_points(ax: Axes, table: pd.DataFrame, x: str, y: str) -> None:
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


def draw_lines(ax: Axes, table: pd.DataFrame, keys: Sequence[str], value: str, title: str) -> Axes:
    """Draw one line over the steps per group of rows."""
    groups = list(table.groupby(list(keys), sort=False))
    labels = group_labels(pd.DataFrame([key for key, _ in groups], columns=list(keys)), keys)
    for label, (_, part) in zip(labels, groups, strict=True):
        ax.plot(part["step"], part[value], linewidth=1.2, label=label)
    if 0 < len(groups) <= 12:
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    ax.set(title=title, xlabel="step", ylabel=value.replace("_", " "))
    return ax


def group_labels(table: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """Name the group of each row by some of its columns."""
    names = table[list(keys)].copy()
    for column in {"param", "module"} & set(keys):
        names[column] = names[column].astype(str).map(shorten(names[column].astype(str)))
    return [label_of(key) for key in names.itertuples(index=False, name=None)]


def label_of(key: object) -> str:
    """Name a group: without a module that its parameter names too, and of long names the end."""
    parts = [str(part) for part in key] if isinstance(key, tuple) else [str(key)]
    kept = [part for part in parts if not any(other.startswith(f"{part}.") for other in parts)]
    return plain(" ".join(part if len(part) <= _LONGEST else "…" + part[1 - _LONGEST :] for part in kept))


def plain(text: object) -> str:
    """Show control characters, which a token may hold and no font has, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))

"""What the figures share: Axes, bars, intervals, lines, labels."""

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
"""Rows that a figure shows of a long table."""

_LONGEST = 28


def axes_for(table: pd.DataFrame, needed: set[str], ax: Axes | None) -> Axes:
    """Return the Axes to draw in: those given, or of a new figure.

    Raises:
        ValueError: the table lacks a column.
        ImportError: matplotlib is not installed.
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


def bars(ax: Axes, table: pd.DataFrame, label: str, value: str, title: str, xlabel: str) -> Axes:
    """Draw a bar for every row, the first one on top."""
    place = np.arange(len(table))[::-1]
    ax.barh(place, table[value], color=LIGHT.accent, height=0.7)
    ax.set_yticks(place, [plain(text) for text in table[label]], parse_math=False, fontsize=letters(len(table)))
    ax.set(title=title, xlabel=xlabel)
    return ax


def intervals(ax: Axes, table: pd.DataFrame, keys: Sequence[str], value: str, title: str, xlabel: str) -> Axes:
    """Draw every row's value with its interval against zero, the first one on top."""
    place = np.arange(len(table))[::-1]
    ax.axvline(0, color=LIGHT.faint, linewidth=1)
    ax.hlines(place, table["low"], table["high"], color=LIGHT.ink, linewidth=1.2)
    ax.plot(table[value], place, "D", color=LIGHT.accent, markersize=4)
    ax.set_yticks(place, labels_of(table, keys), parse_math=False, fontsize=letters(len(table)))
    ax.locator_params(axis="x", nbins=6)
    ax.set(title=title, xlabel=xlabel)
    return ax


def letters(n_rows: int) -> float:
    """Return a size of letters at which so many lines of a figure don't touch."""
    return 9.0 if n_rows <= 15 else 7.0


def lines(ax: Axes, table: pd.DataFrame, keys: Sequence[str], value: str, title: str) -> Axes:
    """Draw a line over steps for every group."""
    groups = list(table.groupby(list(keys), sort=False))
    labels = labels_of(pd.DataFrame([key for key, _ in groups], columns=list(keys)), keys)
    for label, (_, part) in zip(labels, groups, strict=True):
        ax.plot(part["step"], part[value], linewidth=1.2, label=label)
    if 0 < len(groups) <= 12:
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    ax.set(title=title, xlabel="step", ylabel=value.replace("_", " "))
    return ax


def labels_of(table: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """Return a short name for every row."""
    # The name of a parameter holds that of its module.
    names = table[[key for key in keys if key != "module" or "param" not in keys]].copy()
    for column in {"param", "module"} & set(names):
        given = names[column].astype(str)
        names[column] = given.map({"": "", **shorten(name for name in given if name)})
    return [label_of(key) for key in names.itertuples(index=False, name=None)]


def label_of(key: object) -> str:
    """Name a group: without a module that its parameter names too, and of long names the end."""
    parts = list(key) if isinstance(key, tuple) else [key]
    names = [part for part in parts if isinstance(part, str)]
    said_twice = {part for part in names if not part or any(other.startswith(f"{part}.") for other in names)}
    kept = [str(part) for part in parts if part not in said_twice]
    return plain(" ".join(part if len(part) <= _LONGEST else "…" + part[1 - _LONGEST :] for part in kept))


def plain(text: object) -> str:
    """Show control characters, which a token may hold and no font has, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))

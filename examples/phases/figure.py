"""The figure of the study: series by step, those of the control in grey, phase boundaries as lines."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.phases.series import Series


def draw_phases(folder: Path, run: Series, control: Series, phases: pd.DataFrame) -> None:
    """Draw the series of a run and of its control into ``phases.png``.

    Args:
        folder: where the figure goes.
        run: measured.
        control: measured.
        phases: from `phase_boundaries`; the one of most series is drawn.
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True).reshape(-1)
    for ax, (title, at, value) in zip(axes, _PANELS, strict=True):
        for one, color, label in ((control, "0.6", "scrambled"), (run, "C0", "text")):
            table = _panel(one, title)
            ax.plot(table[at], table[value], color=color, lw=1.2, label=label)
        ax.set_title(title, fontsize=9)
        _mark(ax, phases)
    axes[0].legend(frameon=False, fontsize=8)
    for ax in axes[3:]:
        ax.set_xlabel("step")
    figure.savefig(folder / "phases.png", dpi=120)


_PANELS = [
    ("loss", "step", "loss"),
    ("shift of a step against the bigrams of its batch", "first_step", "pearson"),
    ("shifts in between against held-out bigrams", "first_step", "pearson"),
    ("self-influence: Gini over the samples of a step", "step", "gini"),
    ("weights that carry a sample's kept shift", "step", "participation"),
    ("overlap of the samples' selections", "step", "overlap"),
]


def _panel(one: Series, title: str) -> pd.DataFrame:
    number = [name for name, *_ in _PANELS].index(title)
    influence, sparsity = (table[table["param"] == ""] for table in (one.influence, one.sparsity))
    loss = one.trace.steps["loss"].rolling(20, min_periods=1).mean().rename_axis("step").reset_index(name="loss")
    return [loss, one.pairs, one.held_out, influence, sparsity, one.overlap][number]


def _mark(ax: Axes, phases: pd.DataFrame) -> None:
    for row in phases.nlargest(1, "series").to_dict("records"):
        ax.axvspan(row["first_step"], max(row["last_step"], row["first_step"] + 1), color="C1", alpha=0.25, lw=0)

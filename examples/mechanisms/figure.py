"""The figures of a head's study: when the mechanism formed, and whose shifts made it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.mechanisms.study import Run
from lightning_gradtrace.report import plot_enrichment

GREY = "0.85"


def draw_formation(
    run: Run,
    measures: Mapping[str, str],
    steps: slice,
    moved: Mapping[str, pd.DataFrame],
    heads: pd.DataFrame | None = None,
) -> None:
    """Draw measures by step, the enrichment of patterns in the parts of a head, and what moved each head.

    Into ``formation.png``.

    Args:
        run: a finished run.
        measures: columns of its measures by what they are called, drawn from 0 to 1 on the left.
        steps: the window in which shifts were counted, shaded.
        moved: tables of `heads_study.who_moved` by what the pattern is called.
        heads: table of `heads_study.moved_by_loss_tokens`, drawn on the right.
    """
    figure = Figure(figsize=(10 if heads is None else 13, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if heads is None else 3, width_ratios=[1.6, 1] if heads is None else [1.6, 1, 1])
    table = run.measures()
    for name, column in measures.items():
        axes[0].plot(table.index, table[column], label=name)
    axes[0].axvspan(steps.start, steps.stop, color=GREY, zorder=0, label="shifts counted")
    axes[0].set(xlabel="step", ylim=(0, 1))
    axes[0].legend(fontsize=8, framealpha=0.9, edgecolor="none")
    rows = pd.concat({name: table.reset_index() for name, table in moved.items()}, names=["pattern"])
    plot_enrichment(rows.reset_index("pattern").reset_index(drop=True), axes[1])
    axes[1].set_title("pushed along the change; band: 95 % of permutations", fontsize=8)
    axes[1].set(xlabel="times the share in the data")
    if heads is not None:
        _heads(axes[2], heads)
    figure.savefig(run.path / "formation.png", dpi=120)


def _heads(axes: Axes, heads: pd.DataFrame) -> None:
    """Draw by head its share of what loss tokens moved, and of what switching heads off costs."""
    heads = heads.dropna(subset=["moved"]).iloc[::-1]
    place = np.arange(len(heads))
    cost = heads["ablation"] / heads["ablation"].clip(lower=0).sum()
    axes.axvline(0, color=GREY, lw=1)
    axes.barh(place + 0.2, heads["moved"], 0.36, label="of what closing brackets moved")
    axes.barh(place - 0.2, cost, 0.36, label="of what switching off costs")
    axes.set_yticks(place, [f"head {name}" for name in heads.index])
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.set(xlabel="share of all heads")

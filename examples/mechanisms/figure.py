"""The figure of a head's study: when the mechanism formed, and whose shifts made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from examples.mechanisms.study import Run


def draw_formation(
    run: Run, measures: Sequence[str], steps: slice, moved: Mapping[str, Mapping[str, float]], parts: Sequence[str]
) -> None:
    """Draw measures by step and the enrichment of a pattern in some parts of a head, into ``formation.png``.

    Args:
        run: a finished run.
        measures: columns of its measures, drawn from 0 to 1 on the left.
        steps: the window in which shifts were counted, shaded.
        moved: columns of `pattern_enrichment` by part, see `heads_study.who_moved`.
        parts: those of them to draw on the right.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    table: pd.DataFrame = run.measures()
    for name in measures:
        left.plot(table.index, table[name], label=name.replace("_", " "))
    left.axvspan(steps.start, steps.stop, color="0.85", zorder=0, label="shifts counted")
    left.set(xlabel="step", ylim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    for place, part in enumerate(parts):
        row = moved[part]
        right.fill_between([place - 0.3, place + 0.3], row["null_low"], row["null_high"], color="0.85", lw=0)
        right.errorbar(
            place,
            row["enrichment"],
            [[row["enrichment"] - row["low"]], [row["high"] - row["enrichment"]]],
            fmt="o",
            color="C0",
            capsize=3,
        )
    right.axhline(1, color="0.4", lw=0.8)
    right.set(
        xticks=range(len(parts)), xticklabels=parts, ylabel="enrichment along the change", xlim=(-0.6, len(parts) - 0.4)
    )
    right.set_title("grey: 95 % of permutations", fontsize=8)
    figure.savefig(run.path / "formation.png", dpi=120)

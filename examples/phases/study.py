"""Is what SGD does early like n-grams, and specific late? The claims that a run checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from examples.mechanisms.study import Claim
from examples.phases.figure import draw_phases
from examples.phases.series import Series
from lightning_gradtrace import analysis

# Points of a series.
_POINTS = 40
# Shares of the training: its start, in which everything changes, and what "late" and "coincide" mean.
_START, _LATE, _TOGETHER = 1 / 8, 1 / 8, 1 / 10
_COINCIDE = ["overlap", "self_influence_gini", "held_out_alignment"]


def study(folder: Path, control: str = "scrambled", *, n_permutations: int = 199) -> list[Claim]:
    """Measure a run and its control, write series, change points, phases and figure, and return the claims.

    Args:
        folder: run directory, with a folder for the control.
        control: name of the control.
        n_permutations: of the null of the bigrams.
    """
    run, other = (Series.measure(one, _POINTS, n_permutations=n_permutations) for one in (folder, folder / control))
    series = run.together()
    changes = analysis.series_changes(series)
    n = len(run.trace.steps)
    phases = analysis.phase_boundaries(changes, max(1, int(n * _TOGETHER / 2)), span=(0, n - 1))
    for name, table in (("series", series), ("changes", changes), ("phases", phases)):
        table.to_csv(folder / f"{name}.csv", index=False)
    draw_phases(folder, run, other, phases)
    return [*_of_bigrams(run, other, n), *_of_samples(run, other, n), *_together(changes, n)]


def _of_bigrams(run: Series, other: Series, n: int) -> list[Claim]:
    """N-grams: learned at all, in a phase of their own, and less so later."""
    learned, scrambled = (float(one.in_all["pearson"].iloc[0]) for one in (run, other))
    held = run.held_out.set_index("first_step")["pearson"]
    eighths = [float(part.mean()) for part in np.array_split(held.to_numpy(), 8) if part.size]
    first = float(run.pairs["pearson"].iloc[0])
    return [
        Claim("change of the scores against held-out bigrams, correlation", learned, ">=", 0.03),
        Claim("its p-value under permuted pairs", float(run.in_all["p_value"].iloc[0]), "<", 0.01),
        Claim("the same correlation where the training text was scrambled, of it", scrambled / learned, "<", 0.2),
        Claim("held-out alignment in its best eighth of the training, of all eighths' mean", _peak(eighths), ">=", 2.0),
        Claim("held-out alignment in the last eighth, of the best", eighths[-1] / max(eighths), "<", 0.5),
        Claim("alignment of the first step with its own batch's bigrams", first, ">=", 0.1),
    ]


def _of_samples(run: Series, other: Series, n: int) -> list[Claim]:
    """Specific: samples move different weights, few of them matter, and each moves fewer weights."""
    overlap, scrambled = (one.overlap.set_index("step")["overlap"] for one in (run, other))
    gini, kept, effective = (
        table[table["param"] == ""].set_index("step")[name]
        for table, name in ((run.influence, "gini"), (run.sparsity, "kept_share"), (run.sparsity, "participation"))
    )
    return [
        Claim("overlap of the samples' selections, early less late", _early(overlap, n) - _late(overlap, n), ">=", 0.1),
        Claim("the same where the text was scrambled", _early(scrambled, n) - _late(scrambled, n), "<", 0.1),
        Claim("Gini of self-influence, late less early", _late(gini, n) - _early(gini, n), ">=", 0.05),
        Claim(
            "weights that carry a sample's kept shift, late of early",
            _late(effective, n) / _early(effective, n),
            "<",
            1,
        ),
        Claim(
            "share of the kept in a sample's squared shift, late of early", _late(kept, n) / _early(kept, n), ">=", 1
        ),
    ]


def _together(changes: pd.DataFrame, n: int) -> list[Claim]:
    """One boundary: the largest changes after the start fall together, and that of the loss with them."""
    steps = [main_change(changes, name, int(n * _START)) for name in (*_COINCIDE, "loss")]
    text = f"spread of the largest changes of {', '.join(_COINCIDE)} ({steps[:-1]}), of all steps"
    return [
        Claim(text, (max(steps[:-1]) - min(steps[:-1])) / n, "<", _TOGETHER),
        Claim(f"the same with that of the loss ({steps[-1]})", (max(steps) - min(steps)) / n, "<", _TOGETHER),
    ]


def main_change(changes: pd.DataFrame, series: str, after: int) -> float:
    """Return the step of the largest change of a series of the whole run after a step; NaN if there is none."""
    found = changes[(changes["series"] == series) & (changes["param"] == "") & (changes["step"] >= after)]
    return float(found.sort_values("jump", key=abs)["step"].iloc[-1]) if len(found) else float("nan")


def _peak(parts: list[float]) -> float:
    return max(parts) / float(np.mean(parts))


def _early(series: pd.Series, n: int) -> float:
    """Mean over the second eighth: the first one is the start."""
    return float(series.loc[n * _START : 2 * n * _START].mean())


def _late(series: pd.Series, n: int) -> float:
    return float(series.loc[n * (1 - _LATE) :].mean())

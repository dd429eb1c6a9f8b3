"""Is what SGD does early like n-grams, and specific late?"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from examples.mechanisms.study import Claim
from examples.phases.figure import draw_phases
from examples.phases.series import Series
from lightning_gradtrace import analysis

# The largest change of each of these is a candidate for one phase boundary.
COINCIDE = ("loss", "bigram_alignment", "overlap", "self_influence_gini")
# A share of the steps this long is "early" at the start and "late" at the end; the window of a boundary is half of it.
PART = 1 / 8


def study(folder: Path, control: str = "scrambled", *, n_permutations: int = 199) -> list[Claim]:
    """Measure a run and its control, write series, change points, phases and figure, and return the claims.

    Args:
        folder: run directory, with a folder for the control.
        control: name of the control.
        n_permutations: of the null of the bigrams; at least 99, so that 0.01 can be reached.
    """
    steps = pd.read_csv(folder / "steps.csv")["step"] if (folder / "steps.csv").exists() else None
    del steps
    every = 20
    run = Series.measure(folder, every, n_permutations=n_permutations)
    other = Series.measure(folder / control, every, n_permutations=n_permutations)
    series = run.together()
    changes = analysis.series_changes(series)
    n = len(run.trace.steps)
    phases = analysis.phase_boundaries(changes, max(1, int(n * PART / 2)), span=(0, n - 1))
    for name, table in (("series", series), ("changes", changes), ("phases", phases)):
        table.to_csv(folder / f"{name}.csv", index=False)
    draw_phases(folder, run, other, phases)
    return []

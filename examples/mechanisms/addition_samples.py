"""Which pairs build the waves of a network that adds: each sample's part in the growth of the key frequencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from examples.mechanisms.addition import ModularAddition, number_waves
from examples.mechanisms.phases import NAMES, label_steps
from examples.mechanisms.study import Run
from lightning_gradtrace.analysis import grouped_variance, pattern_enrichment

TABLES = {"embedding": "network.embedding.weight", "head": "network.head.weight"}
"""What is read of the numbers, and what is said of them: the two tables that have a row for every number."""

KINDS = ("key", "other")
"""Key frequencies, and all others but the constant."""

GROUPINGS = ["a", "b", "answer", "same_answer", "difference", "distance"]
"""Patterns that divide the samples into groups."""


def components(p: int, frequencies: Sequence[int], kind: str) -> list[int]:
    """Return the rows of `number_waves` that belong to the key frequencies, or to the others."""
    return [row for row in range(1, p) if ((row + 1) // 2 in frequencies) == (kind == "key")]


def growth_by_sample(run: Run, frequencies: Sequence[int], phases: pd.DataFrame) -> pd.DataFrame:
    """Add up by phase how far each sample's shifts made the waves of both tables larger.

    The waves of a kind of frequencies are ``P W``, P the projection onto them along the numbers. A shift s adds
    ``2 <s, P W> + |P s|^2`` to ``|P W|^2``; kept is the first part, which adds up over samples. It is in the units of
    the recorded steps: their sum, not that of the steps between.

    Returns:
        Columns sample_id, phase, table, kind, growth.
    """
    assert isinstance(run.task, ModularAddition)
    trace = run.open("tables.zarr")
    steps = [int(step) for step in trace.steps.index if step in set(run.trace.weight_steps)]
    phase = label_steps(pd.Series(steps), phases)
    parts = []
    for table, param in TABLES.items():
        waves = number_waves(run.task.p, trace.param(param)["shape"][0] - run.task.p).numpy()
        for step, name in zip(steps, phase, strict=True):
            weights = run.trace.weights(param, step).astype(np.float64)
            along = {kind: waves[components(run.task.p, frequencies, kind)] for kind in KINDS}
            aims = {kind: rows.T @ (rows @ weights) for kind, rows in along.items() if len(rows)}
            seen = trace.occurrences[trace.occurrences["step"] == step]
            growth = 2 * trace.factored[param].inner(seen.index, np.stack(list(aims.values())))
            for kind, column in zip(aims, growth.T, strict=True):
                rows = {"sample_id": seen["sample_id"], "phase": name, "table": table, "kind": kind, "growth": column}
                parts.append(pd.DataFrame(rows))
    keys = ["sample_id", "phase", "table", "kind"]
    joined = pd.concat(parts)
    joined["phase"] = pd.Categorical(joined["phase"], categories=list(NAMES), ordered=True)
    return joined.groupby(keys, observed=True)[["growth"]].sum().reset_index()


def patterns(run: Run) -> pd.DataFrame:
    """Return what is known of every training pair: its numbers, answer, difference, and whether its mirror is there.

    Columns a, b, answer, same_answer (number of training pairs with this answer), difference (a - b mod p), distance
    (of a and b on the circle) and mirrored (b + a is a training pair, too), by sample id.
    """
    assert isinstance(run.task, ModularAddition)
    known, p = run.sequences.patterns.copy(), run.task.p
    known["same_answer"] = known.groupby("answer")["a"].transform("size")
    known["difference"] = (known["a"] - known["b"]) % p
    known["distance"] = np.minimum(known["difference"], p - known["difference"])
    pairs = set(zip(known["a"], known["b"], strict=True))
    known["mirrored"] = [(b, a) in pairs and a != b for a, b in zip(known["a"], known["b"], strict=True)]
    return known


def by_group(growth: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    """Say by phase, table and kind how much of what samples added depends on each grouping, against a null.

    Returns:
        As `grouped_variance`, by phase, table and kind.
    """
    by = ["phase", "table", "kind"]
    return grouped_variance(growth, known[GROUPINGS], amount="growth", by=by, n_permutations=499)


def mirrored(growth: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    """Say whether pairs whose mirror is trained on, too, add more than others: columns of `pattern_enrichment`."""
    by = ["phase", "table", "kind"]
    return pattern_enrichment(growth, known["mirrored"], amount="growth", by=by, n_resamples=499)


def spread(growth: pd.DataFrame) -> pd.DataFrame:
    """Say how evenly the samples share in the growth, and whether the same ones do so in the phase before.

    Returns:
        One row per phase, table and kind: growth (sum), against (share of samples whose growth has the other sign),
        top_tenth (share of the sum of absolute growth that the tenth of the samples with most has; 0.1 if all have
        the same), like_before (rank correlation over samples with the phase before).
    """
    rows, before = [], dict[Any, pd.Series]()
    for key, part in growth.groupby(["phase", "table", "kind"], observed=True):
        phase, table, kind = key
        values = part.set_index("sample_id")["growth"]
        size = values.abs().sort_values(ascending=False)
        earlier = before.get((table, kind))
        rows.append(
            {
                "phase": phase,
                "table": table,
                "kind": kind,
                "growth": values.sum(),
                "against": float((np.sign(values) == -np.sign(values.sum())).mean()),
                "top_tenth": size.head(max(1, len(size) // 10)).sum() / size.sum(),
                "like_before": np.nan if earlier is None else values.corr(earlier, method="spearman"),
            }
        )
        before[table, kind] = values
    return pd.DataFrame(rows)

"""Neuron control: other neurons of the same parameter on the same samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Entries
from lightning_gradtrace.analysis._bootstrap import FloatArray, Interval, bootstrap
from lightning_gradtrace.analysis._study import predictor_of, studies
from lightning_gradtrace.analysis.controls._compare import RATIOS, Group, rate, row, table
from lightning_gradtrace.analysis.interventions import named_parameter

if TYPE_CHECKING:
    from torch import nn

    from lightning_gradtrace.analysis.predictions import Forward, Predictor
    from lightning_gradtrace.store import Trace


def neuron_control(
    trace: Trace,
    model: nn.Module | Predictor,
    neurons: pd.DataFrame,
    entries: Entries,
    *,
    n_neurons: int = 5,
    n_samples: int = 2000,
    batch_size: int = 32,
    forward: Forward | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    n_resamples: int = 999,
) -> pd.DataFrame:
    """Compare a neuron's flips with those of random neurons of the same parameter, on the same samples and tokens.

    What can mislead: a neuron with larger weights or a larger activation flips more, whatever its samples say. The
    columns `norm` and `control_norm` show the Euclidean norms of the column or row; a large quotient explains a
    large `flip_rate`, less so a large `notable_share`. Other flagged neurons may be among the random ones.

    Args:
        trace: an open trace with a `TopK` record and inputs.
        model: the trained model, or a `Predictor` to share predictions between calls.
        neurons: rows of the table of `neurons`.
        entries: the kept entries that `neurons` was made from.
        n_neurons: other neurons per neuron, drawn without replacement (all others if there are fewer).
        n_samples: at most so many samples per neuron.
        batch_size: samples at once (a `Predictor` has its own).
        forward: as in `flip_table` (a `Predictor` has its own).
        seed: of all draws.
        confidence: of the intervals.
        n_resamples: bootstrap resamples of the samples and of the random neurons.

    Returns:
        Four rows per neuron, with the measures and columns of `random_control`; `control` is "neuron",
        `control_value` the mean over the random neurons, `n` the number of samples, `n_control` that of random
        neurons; besides, `norm` and `control_norm` (mean over the random neurons).

    Raises:
        ValueError: `n_neurons` below 1, or as in `neuron_ablation`.
    """
    if n_neurons < 1:
        raise ValueError(f"`n_neurons` is {n_neurons}, expected 1 or more")
    predictor = predictor_of(trace, model, batch_size, forward)
    rows = []
    for study in studies(trace, predictor, neurons, entries, n_samples=n_samples, seed=seed):
        param, neuron, axis = study.neuron
        size = _access.matrix(trace, param).shape[1 if axis == "in" else 0]
        pool = np.setdiff1d(np.arange(size), [neuron])
        others = study.rng.choice(pool, size=min(n_neurons, pool.size), replace=False).tolist()
        pred = predictor(study.rows)
        group = Group.of(pred, predictor(study.rows, study.neuron), study.tokens)
        controls = [Group.of(pred, predictor(study.rows, (param, one, axis)), study.tokens) for one in others]
        norms = _norms(predictor.model, param, axis)
        extra = {"norm": float(norms[neuron]), "control_norm": float(norms[others].mean()) if others else np.nan}
        rows += [
            {**one, **extra}
            for one in _compare(
                study.keys, group, controls, confidence=confidence, n_resamples=n_resamples, rng=study.rng
            )
        ]
    return table(rows).assign(**{k: pd.Series([r[k] for r in rows], dtype=float) for k in ("norm", "control_norm")})


def _compare(keys: dict[str, Any], group: Group, controls: list[Group], **options: Any) -> Iterator[dict[str, Any]]:
    sizes = (len(group.counts), len(controls))
    everything = [np.ones((1, n)) for n in sizes]
    for measure in RATIOS:

        def of_controls(samples: FloatArray, chosen: FloatArray, measure: str = measure) -> FloatArray:
            rates = [rate(samples, c.counts, measure) for c in controls]
            return _mean(np.stack(rates, axis=1) if rates else np.zeros((len(samples), 0)), chosen)

        def difference(samples: FloatArray, chosen: FloatArray, measure: str = measure) -> FloatArray:
            return rate(samples, group.counts, measure) - of_controls(samples, chosen, measure)

        value, control_value = (
            rate(everything[0], group.counts, measure)[0],
            of_controls(everything[0], everything[1])[0],
        )
        found = bootstrap(difference, sizes, **options)
        yield row(keys, "neuron", measure, float(value), float(control_value), found, sizes)
    shares = np.array([[c.token_share for c in controls]])
    control_value = float(_mean(shares, everything[1])[0])
    found = Interval(group.token_share - control_value, np.nan, np.nan)
    yield row(keys, "neuron", "token_share", group.token_share, control_value, found, sizes)


def _mean(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Average each row over its defined values, NaN where there are none."""
    defined = np.isfinite(values)
    total = (weights * defined).sum(axis=1)
    summed = (weights * np.where(defined, values, 0.0)).sum(axis=1)
    return np.divide(summed, total, out=np.full(len(values), np.nan), where=total > 0)


def _norms(model: nn.Module, param: str, axis: str) -> FloatArray:
    weight = named_parameter(model, param).detach().float()
    return weight.norm(dim=0 if axis == "in" else 1).cpu().numpy().astype(np.float64)

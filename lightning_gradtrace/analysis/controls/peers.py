"""Peer control: other neurons or entries of the same parameter, other heads of the same module, on the same samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Entries
from lightning_gradtrace.analysis._bootstrap import FloatArray, Interval, bootstrap
from lightning_gradtrace.analysis._components import kind_of
from lightning_gradtrace.analysis._study import predictor_of, studies
from lightning_gradtrace.analysis.controls._compare import RATIOS, Group, rate, row, table
from lightning_gradtrace.analysis.interventions import named_parameter
from lightning_gradtrace.analysis.switches import Switch, resolve

if TYPE_CHECKING:
    from torch import nn

    from lightning_gradtrace.analysis.predictions import Forward, Predictor
    from lightning_gradtrace.store import Trace


def peer_control(
    trace: Trace,
    model: nn.Module | Predictor,
    components: pd.DataFrame,
    entries: Entries,
    *,
    heads: pd.DataFrame | None = None,
    n_peers: int = 5,
    n_samples: int = 2000,
    batch_size: int = 32,
    forward: Forward | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    n_resamples: int = 999,
) -> pd.DataFrame:
    """Compare a component's flips with those of its peers, on the same samples and tokens.

    Peers are drawn at random: for a neuron other neurons of the same parameter, for an entry other entries of it, for
    a head other heads of the same module (that have the same parts, where keys and values are shared).

    What can mislead: a neuron with larger weights or a larger activation flips more, whatever its samples say. The
    columns `norm` and `control_norm` show the Euclidean norms of what is switched off; a large quotient explains a
    large `flip_rate`, less so a large `notable_share`. Other flagged neurons may be among the random ones.

    Args:
        trace: an open trace with a `TopK` record and inputs.
        model: the trained model, or a `Predictor` to share predictions between calls.
        components: rows of `neurons` or of `components` (heads, parts of heads, entries).
        entries: the kept entries that they were made from.
        heads: for heads, the table of `attention_heads`.
        n_peers: peers of each, drawn without replacement (all of them if there are fewer).
        n_samples: at most so many samples for each.
        batch_size: samples at once (a `Predictor` has its own).
        forward: as in `flip_table` (a `Predictor` has its own).
        seed: of all draws.
        confidence: of the intervals.
        n_resamples: bootstrap resamples of the samples and of the peers.

    Returns:
        Four rows for each, with the measures and columns of `random_control`; `control` is "neuron", "head",
        "head_part" or "entry", `control_value` the mean over the peers, `n` the number of samples, `n_control` that of
        peers; besides, `norm` and `control_norm` (mean over the peers).

    Raises:
        ValueError: `n_peers` below 1, or as in `neuron_ablation`.

    Source: docs/concepts.md, 5, controls.
    """
    _access.check_count("n_peers", n_peers)
    predictor = predictor_of(trace, model, batch_size, forward)
    control = kind_of(components)
    rows = []
    for study in studies(trace, predictor, components, entries, heads=heads, n_samples=n_samples, seed=seed):
        peers = study.component.peers(n_peers, study.rng)
        pred = predictor(study.rows)
        group = Group.of(pred, predictor(study.rows, study.switch), study.tokens)
        controls = [Group.of(pred, predictor(study.rows, one), study.tokens) for one in peers]
        norms = [_norm(predictor.model, one) for one in peers]
        extra = {
            "norm": _norm(predictor.model, study.switch),
            "control_norm": float(np.mean(norms)) if norms else np.nan,
        }
        options = {"confidence": confidence, "n_resamples": n_resamples, "rng": study.rng}
        rows += [{**one, **extra} for one in _compare(study.keys, control, group, controls, **options)]
    columns = {k: pd.Series([r[k] for r in rows], dtype=float) for k in ("norm", "control_norm")}
    return table(rows, components).assign(**columns)


def _compare(
    keys: dict[str, Any], control: str, group: Group, controls: list[Group], **options: Any
) -> Iterator[dict[str, Any]]:
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
        yield row(keys, control, measure, float(value), float(control_value), found, sizes)
    shares = np.array([[c.token_share for c in controls]])
    control_value = float(_mean(shares, everything[1])[0])
    found = Interval(group.token_share - control_value, np.nan, np.nan)
    yield row(keys, control, "token_share", group.token_share, control_value, found, sizes)


def _mean(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Average each row over its defined values, NaN where there are none."""
    defined = np.isfinite(values)
    total = (weights * defined).sum(axis=1)
    summed = (weights * np.where(defined, values, 0.0)).sum(axis=1)
    return np.divide(summed, total, out=np.full(len(values), np.nan), where=total > 0)


def _norm(model: nn.Module, switch: Switch) -> float:
    """Return the Euclidean norm of all weights that are switched off."""
    (switch,) = resolve(model, [switch])
    parts = [named_parameter(model, name).detach()[index].double() for name, index in switch.parts]
    return float(sum(float(part.square().sum()) for part in parts) ** 0.5)

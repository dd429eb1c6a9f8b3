"""How do the weights change over training: moments, norms, effective rank and spectra of the snapshots?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._bootstrap import FloatArray

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace


def weight_statistics(
    trace: Trace,
    params: str | Sequence[str] | None = None,
    *,
    steps: Iterable[int] | None = None,
    spectra: bool = True,
) -> pd.DataFrame:
    """Describe every weight snapshot of a trace, parameter by parameter.

    Source: docs/concepts.md, 5, the tables at its end; norms are in units of the weight.

    Args:
        trace: an open trace with weight snapshots.
        params: names of parameters, also ones that are not tracked; None for the tracked ones.
        steps: snapshots to look at; None for all.
        spectra: whether to compute singular values, which takes most of the time. Parameters with more than two axes
            count as matrices (first axis, all others), those with fewer have no spectrum.

    Returns:
        One row per parameter and snapshot: `param`, `step`, `mean`, `std`, `skewness`, `kurtosis` (excess: 0 for a
        normal distribution; NaN where all weights are equal, as for the skewness), `l1` (sum of |w|), `norm`
        (Euclidean), `max` (largest |w|), `zeros` (share), `change` (Euclidean distance from the snapshot before;
        NaN at the first), `distance` (from the first snapshot looked at), and with `spectra` `spectral_norm`,
        `nuclear_norm`, `stable_rank` (squared Euclidean over squared spectral norm) and `effective_rank`
        (exp of the entropy of the singular values as shares of their sum; Roy and Vetterli 2007, EUSIPCO), NaN
        without a spectrum or where all weights are zero.

    Raises:
        ValueError: no snapshots, or no snapshot before one of `steps`.
        KeyError: the trace has no weights of a parameter.
    """
    rows = []
    for name in _names(trace, params):
        first = last = None
        for step, weights in _snapshots(trace, name, steps):
            flat = weights.reshape(-1)
            first = flat if first is None else first
            row = {"param": name, "step": step, **_moments(flat)}
            row["change"] = np.nan if last is None else float(np.linalg.norm(flat - last))
            row["distance"] = float(np.linalg.norm(flat - first))
            if spectra:
                row |= _spectrum(weights)
            rows.append(row)
            last = flat
    return pd.DataFrame(rows)


def weight_spectra(
    trace: Trace, params: str | Sequence[str] | None = None, *, n: int | None = None, steps: Iterable[int] | None = None
) -> pd.DataFrame:
    """Return the singular values of every snapshot of the parameters with two or more axes.

    Source: docs/concepts.md, 5, the tables at its end; singular values are in units of the weight.

    Args:
        trace: an open trace with weight snapshots.
        params: as in `weight_statistics`.
        n: the n largest; None for all.
        steps: as in `weight_statistics`.

    Returns:
        `param`, `step`, `rank` (1 for the largest), `singular_value`.

    Raises:
        ValueError: as in `weight_statistics`, or `n` below 1.
        KeyError: as in `weight_statistics`.
    """
    if n is not None and n < 1:
        raise ValueError(f"`n` is {n}, expected 1 or more, or None for all")
    parts = [pd.DataFrame({"param": [], "step": [], "rank": [], "singular_value": []})]
    for name in _names(trace, params):
        for step, weights in _snapshots(trace, name, steps):
            if weights.ndim >= 2 and weights.size:
                values = np.linalg.svd(weights.reshape(len(weights), -1), compute_uv=False)[:n]
                rank = np.arange(1, values.size + 1)
                parts.append(pd.DataFrame({"param": name, "step": step, "rank": rank, "singular_value": values}))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def neuron_weights(
    trace: Trace, params: str | Sequence[str] | None = None, axis: str = "in", *, steps: Iterable[int] | None = None
) -> pd.DataFrame:
    """Follow the columns or rows of matrices over the snapshots.

    Source: docs/concepts.md, 5, the tables at its end; norms are in units of the weight.

    Args:
        trace: an open trace with weight snapshots.
        params: as in `weight_statistics`; parameters that are no matrices are left out.
        axis: "in" for columns, "out" for rows.
        steps: as in `weight_statistics`.

    Returns:
        One row per snapshot and neuron: `param`, `axis`, `neuron`, `step`, `norm` (Euclidean), `cosine` (with the
        same neuron in the first snapshot looked at; NaN where either is zero).

    Raises:
        ValueError: as in `weight_statistics`, or another axis.
        KeyError: as in `weight_statistics`.
    """
    _access.check_axis(axis)
    parts = [pd.DataFrame({"param": [], "axis": [], "neuron": [], "step": [], "norm": [], "cosine": []})]
    for name in _names(trace, params):
        first = None
        for step, weights in _snapshots(trace, name, steps):
            if weights.ndim != 2:
                break
            lines = weights.T if axis == "in" else weights
            first = lines if first is None else first
            norm, before = np.linalg.norm(lines, axis=1), np.linalg.norm(first, axis=1)
            product = norm * before
            cosine = np.divide((lines * first).sum(axis=1), product, out=np.full(len(lines), np.nan), where=product > 0)
            columns = {"param": name, "axis": axis, "neuron": np.arange(len(lines)), "step": step}
            parts.append(pd.DataFrame({**columns, "norm": norm, "cosine": cosine}))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def _names(trace: Trace, params: str | Sequence[str] | None) -> list[str]:
    if not len(trace.weight_steps):
        raise ValueError(
            "this analysis reads weight snapshots, and the trace holds none; record with "
            "`GradTrace(..., weights_every_n_steps=...)`"
        )
    if params is None:
        return [p.param for p in _access.shapes(trace)]
    return [params] if isinstance(params, str) else list(params)


def _snapshots(trace: Trace, name: str, steps: Iterable[int] | None) -> Iterator[tuple[int, FloatArray]]:
    known = trace.weight_steps.tolist()
    chosen = known if steps is None else [int(step) for step in steps]
    missing = sorted(set(chosen) - set(known))
    if missing:
        raise ValueError(f"no snapshot before the steps {missing}; there are snapshots before the steps {known}")
    for step in chosen:
        yield step, trace.weights(name, step).astype(np.float64)


def _moments(flat: FloatArray) -> dict[str, float]:
    if not flat.size:
        names = ("mean", "std", "skewness", "kurtosis", "l1", "norm", "max", "zeros")
        return dict.fromkeys(names, np.nan)
    mean = flat.mean()
    away = flat - mean
    variance = (away**2).mean()
    # Rounding of the mean leaves a variance where all weights are equal.
    spread = variance > 1e-28 * max(mean**2, 1e-300)
    return {
        "mean": float(mean),
        "std": float(np.sqrt(variance)),
        "skewness": float((away**3).mean() / variance**1.5) if spread else np.nan,
        "kurtosis": float((away**4).mean() / variance**2 - 3) if spread else np.nan,
        "l1": float(np.abs(flat).sum()),
        "norm": float(np.linalg.norm(flat)),
        "max": float(np.abs(flat).max()),
        "zeros": float((flat == 0).mean()),
    }


def _spectrum(weights: FloatArray) -> dict[str, float]:
    values: FloatArray = np.zeros(0)
    if weights.ndim >= 2 and weights.size:
        values = np.asarray(np.linalg.svd(weights.reshape(len(weights), -1), compute_uv=False), dtype=np.float64)
    found = {
        "spectral_norm": values[0] if values.size else np.nan,
        "nuclear_norm": values.sum() if values.size else np.nan,
    }
    if not values.size or values[0] == 0:
        return found | {"stable_rank": np.nan, "effective_rank": np.nan}
    share = values[values > 0] / values.sum()
    return found | {
        "stable_rank": float((values**2).sum() / values[0] ** 2),
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
    }

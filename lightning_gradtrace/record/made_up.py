"""Rows that stand for those of a run that hasn't been made: as hard to compress, and drawn in no time."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from lightning_gradtrace.record._base import ParameterInfo
from lightning_gradtrace.store.schema import ArraySpec


def made_up_rows(spec: ArraySpec, n: int, infos: Sequence[ParameterInfo], n_samples: int) -> np.ndarray:
    """Draw rows for an array.

    Args:
        spec: the array.
        n: number of rows.
        infos: the tracked parameters.
        n_samples: samples of a step.

    Returns:
        Shape (n, *tail). Kept entries ascend and gather in few rows of weights, with values from the tail of a normal
        distribution; norms are log-normal, other floats normal; numbers of steps, occurrences and samples are as in
        a run.
    """
    rng = np.random.default_rng(0)
    shape, kind = (
        (n, *(max(1, length) for length in spec.shape_tail)),
        np.dtype("O" if spec.dtype == "str" else spec.dtype),
    )
    if spec.group in ("topk", "topk_step") and spec.dims[1:] == ("k",):
        pool = n_samples if spec.group == "topk_step" else 1
        return _kept_rows(tuple(infos), n, shape[1], pool)[spec.name].astype(kind)
    if kind.kind == "O":
        texts = [str(getattr(info, spec.name, "")) for info in infos]
        return np.array([texts[i % len(texts)] for i in range(n)], object)
    number = np.arange(n)
    if spec.group == "norms":
        # Norms of one parameter are alike, those of several differ.
        return (1e-3 * np.exp(0.3 * rng.standard_normal(shape) + rng.standard_normal(shape[1:]))).astype(kind)
    if kind.kind == "f":
        constant = spec.name in ("lr", "momentum", "clip_factor", "residual", "rounding", "sum_error")
        return np.ones(shape, kind) if constant else (rng.standard_normal(shape) * 1e-3).astype(kind)
    if spec.name == "sample_id":
        return rng.permutation(n).astype(kind)
    if spec.name in ("step", "occurrence", "slot"):
        per = number if spec.axis == "step" or spec.name == "occurrence" else number // n_samples
        return (number % n_samples if spec.name == "slot" else per).astype(kind)
    return np.zeros(shape, kind)


@functools.lru_cache(maxsize=4)
def _kept_rows(infos: tuple[ParameterInfo, ...], n: int, k: int, pool: int) -> dict[str, np.ndarray]:
    """Draw what is kept in n rows, each of which holds k entries of ``pool`` samples; arrays of shape (n, k)."""
    rng = np.random.default_rng(0)
    share = -(-k // pool)
    rows: dict[str, list[np.ndarray]] = {"occurrence": [], "index": [], "shift": []}
    for row in range(n):
        # Every sample is drawn anew: a compressor would find what is repeated.
        chosen = [_kept(rng, infos, share) for _ in range(pool)]
        rows["occurrence"].append(np.repeat(np.arange(pool) + row * pool, share)[:k])
        rows["index"].append(np.concatenate([entry for entry, _ in chosen])[:k])
        rows["shift"].append(np.concatenate([shift for _, shift in chosen])[:k])
    return {name: np.stack(parts) for name, parts in rows.items()}


def _kept(rng: np.random.Generator, infos: Sequence[ParameterInfo], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw what is kept of one sample: entries and shifts, shape (k,)."""
    sides = [(info.shape[0] if info.shape else 1, info.numel) for info in infos]
    lengths = np.concatenate([np.full(n, numel // max(1, n), np.int64) for n, numel in sides])
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    # Rows of a gradient differ by factors, the same ones for all samples: about as numbers of this distribution do.
    size = np.exp(np.random.default_rng(7).standard_normal(len(lengths)).clip(-3, 3).round(1))
    levels, level = np.unique(size, return_inverse=True)
    of_level = np.bincount(level, lengths)
    low, high = 0.0, 60.0
    for _ in range(40):  # the threshold that about k entries reach
        threshold = (low + high) / 2
        reach = np.array([math.erfc(threshold / (s * math.sqrt(2))) for s in levels])
        low, high = (threshold, high) if (of_level * reach).sum() > k else (low, threshold)
    counts = rng.binomial(lengths, reach[level])
    row = np.repeat(np.arange(len(lengths)), counts)
    entry = np.unique(starts[row] + (rng.random(len(row)) * lengths[row]).astype(np.int64))
    total = int(lengths.sum())
    while len(entry) < min(k, total):
        entry = np.unique(np.append(entry, rng.integers(0, total, k - len(entry) + 1)))
    entry = np.sort(rng.choice(entry, min(k, total), replace=False))
    entry = np.append(entry, np.zeros(k - len(entry), np.int64))
    scale = size[np.searchsorted(starts, entry, side="right") - 1]
    value = scale * np.sqrt((threshold / scale) ** 2 - 2 * np.log(1 - rng.random(k)))
    return entry, value * rng.choice([-1e-4, 1e-4], k)

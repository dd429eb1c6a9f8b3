"""Cuts shares into pieces: some samples, rows or columns at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def slices(n: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size`` that cover ``n``."""
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def parts_of(n: int, count: int) -> list[slice]:
    """Return ``count`` slices of nearly the same size that cover ``n``."""
    edges = [n * i // count for i in range(count + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


def picked(scale: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """Return the scale of some rows and columns of every sample."""
    matrix = scale.numpy()
    return torch.from_numpy(np.stack([matrix[r].take(c, axis=1) for r, c in zip(rows, columns, strict=True)]))


def chunks(samples: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield the samples a few at a time, at least one."""
    size = max(1, size)
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def of_samples(factor: Tensor, samples: np.ndarray) -> Tensor:
    """Return some samples of a factor; neighbours are not copied."""
    first, last = int(samples[0]), int(samples[-1])
    if last - first + 1 == len(samples):
        return factor[first : last + 1]
    return factor[torch.from_numpy(samples)]


def of_features(factor: Tensor, features: np.ndarray) -> Tensor:
    """Return some features of every sample: (sample, position, all), (sample, some) -> (sample, position, some)."""
    index = torch.from_numpy(features)[:, None, :]
    return factor.gather(2, index.expand(-1, factor.shape[1], -1))

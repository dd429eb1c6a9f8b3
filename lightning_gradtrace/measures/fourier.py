"""Modular addition: how much of a network's answer runs over a few frequencies.

A network that has grokked a + b mod p computes cosines ``cos(w_k (a + b - c))``, ``w_k = 2 pi k / p``, for a handful of
key frequencies k. Source: Nanda et al., 2023, "Progress measures for grokking via mechanistic interpretability".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fourier_basis(p: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the real Fourier basis of functions on 0..p-1: orthonormal rows, constant, cos 1, sin 1, cos 2, ...

    Args:
        p: an odd modulus, at least 3.
        dtype: of the result.

    Returns:
        Shape (p, p).

    Raises:
        ValueError: p is even or too small.

    Example:
        >>> basis = fourier_basis(5)
        >>> torch.allclose(basis @ basis.T, torch.eye(5, dtype=basis.dtype))
        True
    """
    if p < 3 or p % 2 == 0:
        raise ValueError(f"`p` is {p}; expected an odd modulus of at least 3")
    angle = 2 * torch.pi * torch.arange(1, p // 2 + 1, dtype=torch.float64)[:, None] * torch.arange(p) / p
    waves = torch.stack([angle.cos(), angle.sin()], 1).flatten(0, 1)
    rows = torch.cat([torch.ones(1, p, dtype=torch.float64), waves])
    return (rows / rows.norm(dim=1, keepdim=True)).to(dtype)


def frequency_power(values: Tensor) -> Tensor:
    """Return how the squared norm of a table over 0..p-1, e.g. of an embedding, divides among frequencies.

    Args:
        values: shape (p, ...).

    Returns:
        Shape (p // 2,): the share of frequency k = 1..p//2 in everything but the constant; adds up to 1.
    """
    components = fourier_basis(values.shape[0], values.dtype) @ values.flatten(1)
    power = components[1:].pow(2).sum(1).unflatten(0, (-1, 2)).sum(1)
    return power / power.sum()


def frequency_subspace(p: int, frequencies: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return an orthonormal basis of the functions of (a, b) that are waves in a + b of these frequencies.

    Args:
        p: the modulus, odd.
        frequencies: numbers k between 1 and p // 2.
        dtype: of the result.

    Returns:
        Shape (2 * number of frequencies, p * p): cosines and sines of w_k (a + b).

    Raises:
        ValueError: a frequency is out of range.
    """
    wrong = [k for k in frequencies if not 1 <= k <= p // 2]
    if wrong:
        raise ValueError(f"frequencies {wrong} are out of range; expected whole numbers from 1 to {p // 2}")
    number = torch.arange(p)
    total = (number[:, None] + number).flatten() % p
    rows = fourier_basis(p, dtype)[[2 * k - 1 + part for k in frequencies for part in (0, 1)]]
    waves = rows[:, total]
    return waves / waves.norm(dim=1, keepdim=True)


def logit_frequency_power(logits: Tensor) -> Tensor:
    """Return the share of each frequency of a + b in the logits of all pairs, relative to all but the constant.

    Args:
        logits: shape (p * p, p): logits of every answer c for every pair, pair (a, b) in row a * p + b.

    Returns:
        Shape (p // 2,), at most 1 in sum.
    """
    p = logits.shape[1]
    varying = logits - logits.mean(0)
    waves = frequency_subspace(p, range(1, p // 2 + 1), logits.dtype)
    power = (waves @ varying).pow(2).sum(1).unflatten(0, (-1, 2)).sum(1)
    return power / varying.pow(2).sum()


def key_frequencies(power: Tensor, share: float = 0.02) -> list[int]:
    """Return the frequencies that hold at least this share of the power, the strongest first.

    Args:
        power: from `frequency_power` or `logit_frequency_power`.
        share: the smallest share that counts.

    Example:
        >>> key_frequencies(torch.tensor([0.01, 0.3, 0.69]))
        [3, 2]
    """
    order = power.argsort(descending=True)
    return [int(k) + 1 for k in order if power[k] >= share]


def restricted_loss(logits: Tensor, answers: Tensor, frequencies: Sequence[int]) -> Tensor:
    """Return the loss when only the constant and the waves of the key frequencies are left in the logits.

    It falls when the generalising circuit works, however much else the network does.

    Args:
        logits: shape (p * p, p), see `logit_frequency_power`.
        answers: the right answers, shape (p * p,).
        frequencies: the key frequencies.

    Returns:
        Mean cross-entropy over all pairs, in nats; ln p without frequencies and with an even constant.
    """
    constant = logits.mean(0)
    waves = frequency_subspace(logits.shape[1], frequencies, logits.dtype)
    return F.cross_entropy(constant + waves.T @ (waves @ (logits - constant)), answers)


def excluded_loss(logits: Tensor, answers: Tensor, frequencies: Sequence[int], rows: Tensor | None = None) -> Tensor:
    """Return the loss when the waves of the key frequencies are taken out of the logits.

    On training pairs it rises when the network comes to rely on the generalising circuit instead of memory.

    Args:
        logits: shape (p * p, p), see `logit_frequency_power`.
        answers: the right answers, shape (p * p,).
        frequencies: the key frequencies.
        rows: numbers of the pairs to average over, e.g. the training pairs; None for all.

    Returns:
        Mean cross-entropy, in nats; ln p if nothing but those waves was there.
    """
    waves = frequency_subspace(logits.shape[1], frequencies, logits.dtype)
    left = logits - waves.T @ (waves @ logits)
    pick = slice(None) if rows is None else rows
    return F.cross_entropy(left[pick], answers[pick])


def gini(values: Tensor) -> Tensor:
    """Return the Gini coefficient of absolute values: 0 if all are alike, near 1 if few hold everything.

    Args:
        values: any shape, at least one element.

    Returns:
        A scalar between 0 and 1.

    Example:
        >>> gini(torch.ones(4)), gini(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        (tensor(0.), tensor(0.7500))
    """
    size = values.abs().flatten().sort().values
    n = len(size)
    rank = torch.arange(1, n + 1, dtype=size.dtype, device=size.device)
    return ((2 * rank - n - 1) * size).sum() / (n * size.sum())

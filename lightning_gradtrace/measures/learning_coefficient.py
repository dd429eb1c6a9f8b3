"""The local learning coefficient: how degenerate the loss is around some weights."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def local_learning_coefficient(
    model: M,
    loss: Callable[[M], Tensor],
    n_samples: int,
    *,
    lr: float,
    localization: float = 0.0,
    n_beta: float | None = None,
    centre: float | None = None,
    n_chains: int = 4,
    n_draws: int = 200,
    n_burn_in: int = 0,
    seed: int = 0,
) -> Tensor:
    """Estimate the local learning coefficient by stochastic gradient Langevin dynamics from the model's weights.

    ``n beta (mean of L over draws - L at the weights)``; the draws are from ``exp(-n beta L(w) - localization / 2
    |w - w*|^2)``, as far as the learning rate is small. At a regular minimum it is half the number of weights, at a
    degenerate one less. It depends on `lr`, `localization` and `n_beta`: compare estimates with the same settings, and
    look whether half the learning rate changes them. A negative one says that the weights are at no minimum.

    The chains are run by `SGMCMC` of the package devinterp. The model is left as it is.

    Args:
        model: its weights are the centre; a copy is sampled.
        loss: mean loss of a model, over all samples or a random batch of them, in nats.
        n_samples: n, number of training samples.
        lr: step size of the dynamics.
        localization: strength of the pull back to the centre.
        n_beta: inverse temperature times n; None for ``n / ln n``.
        centre: loss at the weights, over all samples; None for that of one call of `loss`.
        n_chains: independent chains.
        n_draws: steps of each chain that count.
        n_burn_in: steps before them.
        seed: of the noise; chain c has ``seed + c``.

    Returns:
        One estimate per chain, shape (n_chains,), float64.

    Raises:
        ImportError: devinterp is not installed.
        ValueError: a number is out of range.

    Source:
        Lau et al., 2023, "The local learning coefficient", arXiv:2308.12108.
    """
    if min(n_chains, n_draws) < 1 or n_burn_in < 0 or n_samples < 2 or lr <= 0:
        raise ValueError(
            f"`n_chains` is {n_chains}, `n_draws` {n_draws}, `n_burn_in` {n_burn_in}, `n_samples` {n_samples} and `lr` "
            f"{lr}; expected at least one chain, one draw and two samples, and a positive learning rate"
        )
    try:
        sampler: Any = importlib.import_module("devinterp.optim").SGMCMC
    except ImportError as error:
        raise ImportError(
            "`local_learning_coefficient` needs devinterp, which is not installed: "
            "`pip install 'lightning-gradtrace[llc]'`"
        ) from error
    n_beta = n_samples / math.log(n_samples) if n_beta is None else n_beta
    if centre is None:
        with torch.no_grad():
            centre = float(loss(model))
    found = []
    for chain in range(n_chains):
        moving = copy.deepcopy(model)
        device = next(moving.parameters()).device
        noise = torch.Generator(device).manual_seed(seed + chain)
        optimizer = sampler.sgld(moving.parameters(), lr=lr, nbeta=n_beta, localization=localization)
        total = 0.0
        for step in range(n_burn_in + n_draws):
            optimizer.zero_grad()
            value = loss(moving)
            total += float(value.detach()) if step >= n_burn_in else 0.0
            value.backward()
            optimizer.step(noise_generator=noise)
        found.append(n_beta * (total / n_draws - centre))
    return torch.tensor(found, dtype=torch.float64)

"""Obviously right and slow: one sample at a time through autograd. The reference of every capture test."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def per_sample_gradients(
    contribution: Callable[[int], Tensor], n_samples: int, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Differentiate the contribution of every sample to the batch loss on its own.

    Args:
        contribution: returns, for sample ``i``, the scalar that it adds to the loss that is back-propagated, with the
            loss's own normalisation (for a mean over N tokens: the sum over the tokens of sample ``i``, divided by N).
        n_samples: number of samples.
        parameters: parameters by name.

    Returns:
        ``g``, shape (sample, *shape), by name.

    Example::

        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
        >>> per_sample_gradients(lambda i: (x[i] @ w) / 2, 2, {"w": w})["w"]
        tensor([[0.5000, 0.0000],
                [1.5000, 0.5000]])
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(n_samples):
        gradients = torch.autograd.grad(contribution(i), list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return {name: torch.stack(found) for name, found in rows.items()}

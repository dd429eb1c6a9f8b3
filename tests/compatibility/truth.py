"""What the shares must be: one sample at a time through autograd.

Where batch norm couples the samples, the share of sample i is the part of the gradient that comes through its own
slices (docs/concepts.md, 2). To have that from autograd alone, each layer is run with a copy of its parameters for
every sample; the gradient by a copy is the share.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gradtrace.capture.oracle import per_sample_gradients


def true_shares(
    model: nn.Module, batch: tuple[Tensor, ...], couples: bool, of_losses: bool = False, is_strung: bool = False
) -> dict[str, Tensor]:
    """Return the share of every sample in the gradient of the mean loss, by parameter.

    Args:
        model: the model.
        batch: the batch.
        couples: whether batch norm couples the samples.
        of_losses: in that case, take the gradient of each sample's loss, wherever in the batch it flows.
        is_strung: whether samples have no axis of their own, along which one could be cut out of the batch.
    """
    model = copy.deepcopy(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    n = len(batch[-1])
    if couples and not of_losses:
        return _by_copies(model, batch, parameters)

    def contribution(i: int) -> Tensor:
        if couples or is_strung:
            return model.losses(batch)[i] / n
        return model(tuple(t[i : i + 1] for t in batch)) / n

    return per_sample_gradients(contribution, n, parameters)


def _by_copies(model: nn.Module, batch: tuple[Tensor, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    n = len(batch[0])
    copies = {name: p.detach().expand(n, *p.shape).clone().requires_grad_() for name, p in parameters.items()}
    with _forwards(model, copies):
        loss = model(batch)
    return dict(zip(copies, torch.autograd.grad(loss, list(copies.values())), strict=True))


@contextmanager
def _forwards(model: nn.Module, copies: dict[str, Tensor]) -> Iterator[None]:
    """Let every layer with parameters use the copy of each sample for its slice."""
    changed: list[Any] = []
    for name, layer in model.named_modules():
        own = {leaf: copies[f"{name}.{leaf}"] for leaf, _ in layer.named_parameters(recurse=False)}
        if own:
            layer.forward = lambda x, layer=layer, own=own: _apply(layer, x, own)  # type: ignore[method-assign]
            changed.append(layer)
    yield
    for layer in changed:
        del layer.forward


def _apply(layer: nn.Module, x: Tensor, own: dict[str, Tensor]) -> Tensor:
    if isinstance(layer, nn.BatchNorm2d):
        normal = F.batch_norm(x, None, None, training=True, eps=layer.eps)
        return normal * own["weight"][:, :, None, None] + own["bias"][:, :, None, None]
    rows = []
    for i in range(len(x)):
        weight, bias = own["weight"][i], own["bias"][i] if "bias" in own else None
        one = x[i : i + 1]
        rows.append(
            layer._conv_forward(one, weight, bias) if isinstance(layer, nn.Conv2d) else F.linear(one, weight, bias)
        )
    return torch.cat(rows)

"""The general rule: vmap of a use's vector-Jacobian product over its samples (docs/concepts.md, 2).

It serves every function without a closed form. It needs the parameters as they were in the forward pass, so it is
evaluated at the end of the backward pass, and it writes the shares out: ``n_samples * numel`` numbers per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from lightning_gradtrace.capture.batch_axis import SampleAxis
from lightning_gradtrace.capture.derived import Derived, Root, quiet_vmap
from lightning_gradtrace.capture.shares import DenseShare, Share
from lightning_gradtrace.capture.tape import Operand, Use


def general_shares(
    use: Use, inputs: Mapping[int, SampleAxis], outputs: Mapping[int, SampleAxis], n_samples: int
) -> dict[str, Share]:
    """Return the shares of every parameter behind a use of any function.

    Args:
        use: the use, with its cotangents.
        inputs: place of the samples in those arguments that hold any, by position among the leaves.
        outputs: place of the samples in every output that has a cotangent.
        n_samples: number of samples.

    Returns:
        A share per parameter name; derived tensors are differentiated through, down to the parameters.
    """
    roots: dict[str, Tensor] = {}
    for leaf in use.leaves:
        if isinstance(leaf, (Root, Derived)):
            roots.update({name: tensor.detach() for name, tensor in leaf.roots().items()})
    batched = {i: axis.samples_first(use.leaves[i].tensor, n_samples) for i, axis in inputs.items()}
    cotangents = {i: axis.samples_first(use.cotangents[i], n_samples) for i, axis in outputs.items()}

    def single(samples: dict[int, Tensor], cotangent: dict[int, Tensor]) -> dict[str, Tensor]:
        def call(values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            leaves = [_value(leaf, i, values, samples, inputs) for i, leaf in enumerate(use.leaves)]
            args, kwargs = tree_unflatten(leaves, use.structure)
            result = use.function(*args, **kwargs)
            return (result,) if isinstance(result, Tensor) else tuple(result[i] for i in outputs)

        vjp = torch.func.vjp(call, roots)[1]
        seeds = tuple(_restore(cotangent[i], axis) for i, axis in outputs.items())
        return vjp(seeds)[0]

    with quiet_vmap():
        pulled = torch.func.vmap(single)(batched, cotangents)
    return {name: DenseShare(value) for name, value in pulled.items()}


def _restore(sample: Tensor, axis: SampleAxis) -> Tensor:
    """Give one sample its axis back: of size 1, or, where axes were merged, the positions that share the axis."""
    return sample.unsqueeze(axis.axis) if axis.factor == "whole" else sample


def _value(
    leaf: Any, i: int, values: Mapping[str, Tensor], samples: Mapping[int, Tensor], inputs: Mapping[int, SampleAxis]
) -> Any:
    if isinstance(leaf, (Root, Derived)):
        return leaf.evaluate(values)
    if i in samples:
        return _restore(samples[i], inputs[i])
    return leaf.tensor if isinstance(leaf, Operand) else leaf

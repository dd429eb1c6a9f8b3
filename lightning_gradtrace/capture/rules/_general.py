"""The general rules, for every function: by slicing and by masking (docs/concepts.md, 2).

By *slicing*, a use is run on the samples one by one (under vmap) and each run is differentiated. It is right where the
function treats the samples apart. By *masking*, the use is run once as it was, on the whole batch, and the cotangent of
each sample, zero outside the sample's part of the output, is pulled back through it. It is right for every function,
also for one that mixes the samples: the shares are then the parts of the outputs in the gradient. It costs as many
backward passes of the use over the whole batch as there are samples.

Both need the parameters as they were in the forward pass, so they are evaluated at the end of the backward pass, and
both write the shares out: ``n_samples * numel`` numbers per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.derived import (
    Derived,
    Lineage,
    Operand,
    OverwrittenError,
    Root,
    batched_vjp,
    evaluate,
    quiet_vmap,
)
from lightning_gradtrace.capture.forward.replay import run
from lightning_gradtrace.capture.forward.use import Use
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis
from lightning_gradtrace.capture.routes.rows import Rows
from lightning_gradtrace.capture.shares import DenseShare, DiagonalShare, Share
from lightning_gradtrace.update.clipping import dense

Places = Mapping[int, SampleAxis | Rows]


def sliced_shares(
    use: Use, inputs: Places, outputs: Places, cut: Mapping[Derived, int], n_samples: int
) -> dict[Lineage, Share]:
    """Return the shares of every tracked tensor that a use received, sample by sample.

    Args:
        use: the use, with its cotangents.
        inputs: place of the samples in those arguments that hold any, by position among the leaves.
        outputs: place of the samples in every output that has a cotangent.
        cut: axis of the samples in those tracked tensors that hold a slice for each.
        n_samples: number of samples.

    Returns:
        A share per tracked tensor.

    Raises:
        RuntimeError: the function can't be run on one sample.
        OverwrittenError: an argument has changed since the use.
    """
    check_untouched(use)
    lineages = set(use.lineages.values())
    whole = {lineage: lineage.tensor.detach() for lineage in lineages if lineage not in cut}
    slices: dict[Lineage, Tensor] = {lineage: lineage.tensor.detach().movedim(axis, 0) for lineage, axis in cut.items()}
    batched = {i: axis.samples_first(use.leaves[i].tensor, n_samples) for i, axis in inputs.items()}
    cotangents = {i: axis.samples_first(use.cotangents[i], n_samples) for i, axis in outputs.items()}

    def single(
        samples: dict[int, Tensor], cotangent: dict[int, Tensor], own: dict[Lineage, Tensor]
    ) -> dict[Lineage, Tensor]:
        def call(received: Mapping[Lineage, Tensor]) -> tuple[Tensor, ...]:
            leaves = []
            for i, leaf in enumerate(use.leaves):
                if isinstance(leaf, (Root, Derived)):
                    value = received[leaf]
                    leaves.append(value.unsqueeze(cut[leaf]) if isinstance(leaf, Derived) and leaf in cut else value)
                elif i in samples:
                    leaves.append(_restore(samples[i], inputs[i]))
                else:
                    leaves.append(leaf.tensor if isinstance(leaf, Operand) else leaf)
            results = run(use.function, leaves, use.structure, use.around)
            return tuple(results[i] for i in outputs)

        vjp = torch.func.vjp(call, {**whole, **own})[1]
        pulled: dict[Lineage, Tensor] = vjp(tuple(_restore(cotangent[i], axis) for i, axis in outputs.items()))[0]
        return pulled

    with quiet_vmap():
        pulled = torch.func.vmap(single)(batched, cotangents, slices)
    return {
        lineage: DiagonalShare(value, cut[lineage])
        if isinstance(lineage, Derived) and lineage in cut
        else DenseShare(value)
        for lineage, value in pulled.items()
    }


def masked_shares(use: Use, outputs: Places, n_samples: int) -> dict[Lineage, Share]:
    """Return the shares of every parameter behind a use, by parts of its outputs.

    Args:
        use: the use, with its cotangents.
        outputs: place of the samples in every output that has a cotangent.
        n_samples: number of samples.

    Returns:
        A share per parameter; derived tensors are differentiated through.

    Raises:
        OverwrittenError: an argument has changed since the use.
    """
    roots = {name: root for lineage in use.lineages.values() for name, root in lineage.roots.items()}
    values = {name: root.tensor.detach().requires_grad_() for name, root in roots.items()}
    known: dict[int, list[Any]] = {}
    with torch.enable_grad():
        results = run_whole(use, {i: evaluate(lineage, values, known) for i, lineage in use.lineages.items()})
    identity = torch.eye(n_samples, device=results[next(iter(outputs))].device)

    def cotangents(samples: slice) -> list[Tensor]:
        return [
            use.cotangents[i] * axis.mark(identity[samples].to(use.cotangents[i].dtype), use.cotangents[i].shape)
            for i, axis in outputs.items()
        ]

    pulled = batched_vjp([results[i] for i in outputs], list(values.values()), cotangents, n_samples)
    return {roots[name]: DenseShare(value) for name, value in zip(values, pulled, strict=True)}


def weighted_sums(use: Use, outputs: Places, weights: Tensor) -> dict[Lineage, Tensor]:
    """Return what the shares of every tracked tensor that a use received must add up to, with a weight per sample.

    Args:
        use: the use, with its cotangents.
        outputs: place of the samples in every output that has a cotangent.
        weights: one per sample.

    Returns:
        ``sum_i weights[i] g[i]`` by tracked tensor, of one vector-Jacobian product of the whole use.

    Raises:
        OverwrittenError: an argument has changed since the use.
    """
    received = {lineage: lineage.tensor.detach().requires_grad_() for lineage in use.lineages.values()}
    with torch.enable_grad():
        results = run_whole(use, {i: received[lineage] for i, lineage in use.lineages.items()})
    seeds = [
        use.cotangents[i] * axis.mark(weights.to(use.cotangents[i].dtype), use.cotangents[i].shape)
        for i, axis in outputs.items()
    ]
    found = torch.autograd.grad([results[i] for i in outputs], list(received.values()), seeds, allow_unused=True)
    return {
        lineage: torch.zeros_like(lineage.tensor) if gradient is None else dense(gradient)
        for lineage, gradient in zip(received, found, strict=True)
    }


def own_cotangents(use: Use) -> dict[int, Tensor]:
    """Take from the cotangent of every output what came to it through other outputs of the same call.

    Some functions compute one output from another, as ``lstm_cell`` does its hidden state from its cell state. The
    backward pass then gives an output the gradient through the others as well, which would be counted twice.

    Args:
        use: a use with several cotangents.

    Returns:
        The gradient of the loss with respect to each output alone.

    Raises:
        OverwrittenError: an argument has changed since the use.
    """
    received = {lineage: lineage.tensor.detach().requires_grad_() for lineage in use.lineages.values()}
    with torch.enable_grad():
        results = run_whole(use, {i: received[lineage] for i, lineage in use.lineages.items()})
    own = dict(use.cotangents)
    settled: list[int] = []
    # From the last computed to the first: an output that feeds others is settled after them.
    for i in sorted(own, key=lambda i: _height(results[i])):
        for j in settled:
            (through,) = torch.autograd.grad(results[j], results[i], own[j], retain_graph=True, allow_unused=True)
            if through is not None:
                own[i] = own[i] - through
        settled.append(i)
    return own


def _height(result: Tensor) -> int:
    """Minus the number of its node: nodes are numbered in the order in which they were made."""
    return -int(result.grad_fn._sequence_nr()) if result.grad_fn is not None else 0


def run_whole(use: Use, tracked: Mapping[int, Tensor]) -> list[Tensor]:
    """Run a use again on the whole batch, with given values of its tracked tensors."""
    check_untouched(use)
    leaves = [
        tracked[i] if i in tracked else leaf.tensor if isinstance(leaf, Operand) else leaf
        for i, leaf in enumerate(use.leaves)
    ]
    results = run(use.function, leaves, use.structure, use.around)
    if use.around.random is not None:
        for result, kept in zip(results, use.outputs, strict=True):
            if kept is not None and kept.untouched and not torch.equal(result.detach(), kept.tensor):
                raise UnrepeatableError
    return results


def check_untouched(use: Use) -> None:
    """Raise if any tensor that a use received has changed since."""
    if not all(leaf.untouched for leaf in use.leaves if isinstance(leaf, Operand)):
        raise OverwrittenError


class UnrepeatableError(Exception):
    """A second run of a random function gave other numbers than the first."""


def _restore(sample: Tensor, axis: SampleAxis | Rows) -> Tensor:
    """Give one sample its axis back: of size 1, or, where axes were merged, the positions that share the axis."""
    return sample.unsqueeze(axis.axis) if axis.factor == "whole" else sample

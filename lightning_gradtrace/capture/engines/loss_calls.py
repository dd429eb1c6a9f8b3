"""Calls of losses over classes: which one the loss depends on, and which of its rows are whose."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gradtrace.capture.check import tolerance
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis, candidates
from lightning_gradtrace.capture.placing.placement import UnattributableError
from lightning_gradtrace.capture.precision import brought_to
from lightning_gradtrace.capture.shares import Share

LOSSES = (F.cross_entropy, F.nll_loss)


@dataclass
class LossCall:
    """One call of a loss over classes.

    Attributes:
        logits: its input, part of the graph.
        targets: class numbers.
        ignored: the target that has no loss.
    """

    logits: Tensor
    targets: Tensor
    ignored: int

    @property
    def class_axis(self) -> int:
        """Axis of the classes in the logits."""
        return min(1, self.logits.dim() - 1)

    @property
    def row_shape(self) -> list[int]:
        """Shape of the logits without their classes: one row for each loss token."""
        return [size for axis, size in enumerate(self.logits.shape) if axis != self.class_axis]

    def rows(self, place: SampleAxis, n_samples: int) -> Tensor:
        """Number the loss tokens: flat rows of the logits, shape (sample, position)."""
        shape = self.row_shape
        numbers = torch.arange(int(np.prod(shape)), device=self.logits.device).view(shape)
        return place.samples_first(numbers, n_samples).reshape(n_samples, -1)

    def only(self, cotangent: Tensor, rows: Tensor) -> Tensor:
        """Keep some rows of a cotangent of the logits, zero elsewhere."""
        source = cotangent.movedim(self.class_axis, -1)
        flat, kept = source.reshape(-1, source.shape[-1]), torch.zeros_like(cotangent)
        target = kept.movedim(self.class_axis, -1)
        index = torch.unravel_index(rows, tuple(self.row_shape))
        target[index] = flat[rows]
        return kept


def find_call(calls: Sequence[LossCall], loss: Tensor) -> tuple[LossCall, Tensor]:
    """Return the loss call that the loss depends on, and the gradient of the loss by its logits.

    Raises:
        UnattributableError: there is not one alone, its targets are no tokens, or its passes would miss something.
    """
    logits = [call.logits for call in calls]
    found = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True) if logits else ()
    reached = [(call, d) for call, d in zip(calls, found, strict=True) if d is not None]
    if len(reached) != 1:
        raise UnattributableError(
            f"`TokenGrads`: the loss depends on {len(reached)} calls of `cross_entropy` or `nll_loss`, expected one, "
            "whose rows are the loss tokens. Compute the loss with one call of `torch.nn.functional.cross_entropy` "
            "over all positions, or leave `TokenGrads` out of the records."
        )
    call, cotangent = reached[0]
    if call.targets.is_floating_point() or list(call.targets.shape) != call.row_shape:
        raise UnattributableError(
            f"`TokenGrads`: the targets of the loss have shape {tuple(call.targets.shape)} and dtype "
            f"{call.targets.dtype}, expected token ids of shape {tuple(call.row_shape)}. Probabilities are no tokens."
        )
    return call, cotangent


def refuse_reentrant(logits: Tensor, ends: Collection[Any], unseen: bool) -> None:
    """Refuse passes through layers that run a backward pass of their own inside of a backward pass.

    Args:
        logits: where the passes begin.
        ends: nodes of the graph where they end.
        unseen: whether tracked parameters were not used so far; they may be used inside of such layers.

    Raises:
        UnattributableError: passes would come to such a layer, or to parameters inside of it.
    """
    layers = [node for node in _below([logits.grad_fn]) if node.name() == "CheckpointFunctionBackward"]
    if layers and (unseen or not _below(layers).isdisjoint(ends)):
        raise UnattributableError(
            "`TokenGrads`: the model checkpoints activations with `use_reentrant=True`, and the backward pass of such "
            "a layer adds to `.grad`, which the passes of single loss tokens must not. Give `checkpoint(..., "
            "use_reentrant=False)`, or leave `TokenGrads` out of the records."
        )


def _below(nodes: Iterable[Any]) -> set[Any]:
    """Return nodes of a graph and all that a backward pass comes to from them."""
    pending = [node for node in nodes if node is not None]
    met = set(pending)
    while pending:
        found = {after for after, _ in pending.pop().next_functions if after is not None} - met
        met |= found
        pending += found
    return met


def place_of_samples(
    call: LossCall, cotangent: Tensor, n_samples: int
) -> Generator[Tensor, dict[str, Share], SampleAxis]:
    """Find out which rows belong to which sample, by passes that are yielded; see `capture.passes`.

    Rows of sample i times a number of its own must lead to the share of sample i times that number. The numbers are
    powers of two, by which nothing is rounded: a wrong arrangement shows, and so does what flows between samples.

    Raises:
        UnattributableError: no arrangement does that.
    """
    options = candidates(call.row_shape, n_samples)
    order = torch.randperm(n_samples, generator=torch.Generator().manual_seed(0), device="cpu")
    weights = brought_to(cotangent.device, torch.pow(2.0, (order % 8).double()))
    whole = yield cotangent
    for place in options:
        rows = call.rows(place, n_samples)
        by_row = torch.empty(rows.numel(), dtype=weights.dtype, device=weights.device)
        by_row[rows] = weights[:, None].expand(rows.shape)
        scale = by_row.view(call.row_shape).unsqueeze(call.class_axis).to(cotangent.dtype)
        found = yield cotangent * scale
        if _is_multiple(found, whole, weights, tolerance(call.logits.dtype)):
            return place
    raise UnattributableError(
        f"`TokenGrads`: the loss tokens (logits of shape {tuple(call.logits.shape)}) can't be told apart by sample: "
        f"the loss of one sample's tokens has gradients that flow through other samples, for each of {len(options)} "
        "ways to arrange them. Layers that couple samples (batch norm, pooling over the batch) don't go with "
        "`TokenGrads`; leave it out of the records."
    )


def _is_multiple(found: Mapping[str, Share], whole: Mapping[str, Share], weights: Tensor, largest_error: float) -> bool:
    """Say whether the share of every sample is its share of the whole loss times its weight, rounding apart.

    All parameters of a sample count together: the gradient of some is nothing but rounding (biases of keys).
    """
    for i, weight in enumerate(weights.tolist()):
        one, error, size = slice(i, i + 1), 0.0, 0.0
        for name, share in whole.items():
            expected = share.dense(one) * weight
            error += float(torch.linalg.vector_norm(found[name].dense(one) - expected)) ** 2
            size += float(torch.linalg.vector_norm(expected)) ** 2
        if error > largest_error**2 * size:
            return False
    return True

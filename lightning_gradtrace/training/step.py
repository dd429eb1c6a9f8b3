"""One optimizer step under way: where it stands, how it divides, and the micro-batches it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.precision import HALF, coarsest_by_name
from lightning_gradtrace.capture.shares import Share
from lightning_gradtrace.record import ParameterInfo, ParameterShifts, StepShifts
from lightning_gradtrace.record.token_grads import with_tokens
from lightning_gradtrace.update.division import StepDivision

Quantity = Literal["shift", "gradient"]


@dataclass
class Position:
    """Where a step stands in the training.

    Attributes:
        step: number of the optimizer step, counted from 0 over all optimizers.
        epoch: number of the epoch.
        rank: rank of the process.
        optimizer: number of the optimizer, in the order of `configure_optimizers`.
    """

    step: int
    epoch: int
    rank: int = 0
    optimizer: int = 0


@dataclass
class Step:
    """A step between the hook before it and the hook after it.

    Attributes:
        position: where it stands.
        division: what is known of it.
        micro_batches: the shares of the gradients that it uses.
        losses: the losses that were back-propagated, without the loss scale of fp16 AMP.
        norm: norm of all gradients of the optimizer before clipping.
        check: parameters whose shares are to be summed and compared with their gradients.
        sum_error: largest relative error of a sum of shares, NaN where it was not computed.
        precision_elsewhere: of all ranks what `precision` is of this one.
    """

    position: Position
    division: StepDivision
    micro_batches: Sequence[MicroBatch]
    losses: Sequence[Tensor]
    norm: float = float("nan")
    check: frozenset[str] = frozenset()
    sum_error: float = float("nan")
    precision_elsewhere: Mapping[str, torch.dtype] = field(default_factory=dict)

    @property
    def precision(self) -> dict[str, torch.dtype]:
        """Coarsest dtype that the gradient of each parameter passed in one of the micro-batches, by name."""
        return coarsest_by_name([self.precision_elsewhere, *(m.precision for m in self.micro_batches)])

    @property
    def is_half(self) -> bool:
        """Whether gradients were computed in half precision."""
        return any(dtype in HALF for dtype in self.precision.values())

    def tells(self, sharded: bool) -> tuple[float, ...]:
        """Return what the other ranks must know of the step, as numbers that add up.

        Whether sums are to be compared; of spread parameters, whether the optimizer's factors, or those of clipping,
        differ between weights; and the square of the norm of the gradients that are here.

        Args:
            sharded: whether parameters are spread over the ranks.
        """
        factors = self.division.factors.values() if sharded else ()
        gains = any(isinstance(gain, Tensor) for gain, _ in factors)
        clips = any(isinstance(clip, Tensor) for _, clip in factors)
        return float(bool(self.check)), float(gains or clips), float(clips), self.norm**2

    def occurrences(self) -> dict[str, np.ndarray]:
        """Return the coordinates of the step's occurrences, as the store keeps them."""
        sizes = [m.n_samples for m in self.micro_batches]
        n = sum(sizes)
        return {
            "step": np.full(n, self.position.step, np.int64),
            "micro_batch": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
            "slot": np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
            "rank": np.full(n, self.position.rank, np.int32),
            "sample_id": np.concatenate([m.sample_ids for m in self.micro_batches]),
        }

    def shifts(self, infos: Sequence[ParameterInfo], quantity: Quantity = "shift", skipped: bool = False) -> StepShifts:
        """Turn the shares of the step into what the optimizer made of them.

        Args:
            infos: the tracked parameters.
            quantity: "shift", or "gradient" for the shares themselves.
            skipped: whether the optimizer left the weights as they are: all shifts are zero.
        """
        division, parameters, shift = self.division, [], quantity == "shift"
        for info in infos:
            scale = None if skipped else division.scale(info.name)
            if not shift and scale is not None:
                scale = 1.0 / division.loss_scale
            shares: list[Share | None] = [
                m.shares.get(info.name) if scale is not None else None for m in self.micro_batches
            ]
            if shift:
                shares = [None if share is None else division.share(info.name, share) for share in shares]
            gain = None if skipped else division.gain(info.name)
            parameters.append(ParameterShifts(info, 1.0 if scale is None else scale, shares, gain))
        found = StepShifts([m.n_samples for m in self.micro_batches], parameters, self.position.step)
        return with_tokens(found, self.micro_batches, division.share if shift else lambda _, share: share)

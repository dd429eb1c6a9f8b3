"""When the sums of shares are compared with the gradients, and what follows from it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradtrace.capture.check import check_sums, sum_errors
from lightning_gradtrace.capture.engines._base import Engine
from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.training.step import Step


@dataclass
class SumCheck:
    """Compares the sum of a parameter's shares with its gradient until it was found right, and on schedule.

    Attributes:
        engine: says what to do about a sum that is wrong.
        low_precision: whether the forward pass runs in half precision, where sums agree less closely.
        right: parameters whose sums were right, as they are used now.
    """

    engine: Engine[Any]
    low_precision: bool = False
    right: set[str] = field(default_factory=set, init=False)

    def due(self, names: Collection[str], micro_batches: Sequence[MicroBatch], scheduled: bool) -> frozenset[str]:
        """Return the parameters whose sums are to be compared in a step.

        Args:
            names: those with a gradient.
            micro_batches: the shares; a parameter without any was never found right.
            scheduled: whether all are.
        """
        with_shares = {name for micro_batch in micro_batches for name in micro_batch.shares}
        return frozenset(names) if scheduled else frozenset(names) - (self.right & with_shares)

    def forget(self, micro_batches: Iterable[MicroBatch]) -> None:
        """Take note of parameters that were used as they never were before."""
        self.right.difference_update(*(micro_batch.unlike for micro_batch in micro_batches))

    def compare(self, step: Step) -> float:
        """Compare the sums that are due in a step with the gradients, and return the largest relative error.

        Raises:
            UnattributableError: a sum is wrong.
        """
        gradients, scale = step.division.gradients, step.division.loss_scale
        true = {name: gradients[name] * scale if scale != 1 else gradients[name] for name in sorted(step.check)}
        errors = sum_errors(step.micro_batches, true, step.norm * scale)
        return self.judge(step, errors, true, functools.partial(self.engine.advice, step.micro_batches, true))

    def judge(
        self,
        step: Step,
        errors: Mapping[str, float],
        gradients: Mapping[str, Tensor],
        advice: Callable[[], str] | None = None,
    ) -> float:
        """Return the largest of relative errors by parameter, NaN if none is finite.

        Args:
            step: the step.
            errors: relative errors of the sums.
            gradients: the gradients, for their dtypes.
            advice: says what to do; the engine's by default.

        Raises:
            UnattributableError: an error is too large.
        """
        advice = advice or functools.partial(self.engine.advice, step.micro_batches, {})
        precision = dict.fromkeys(gradients, torch.bfloat16) if self.low_precision else step.precision
        check_sums(errors, gradients, precision, advice)
        finite = {name: error for name, error in errors.items() if np.isfinite(error)}
        self.right.update(finite)  # an overflowed gradient proves nothing
        return max(finite.values()) if finite else float("nan")

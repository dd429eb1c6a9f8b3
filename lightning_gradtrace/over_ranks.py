"""The check of the sums and the ledger of a step, over the samples of all ranks.

On each rank the shares add up to the gradient of that rank's own loss, which is gone when the gradients have been
averaged. What can be compared with `.grad`, and with the movement of the weights, are sums over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Size, Tensor, dtype

from lightning_gradtrace.capture.check import sum_error, total_share
from lightning_gradtrace.capture.shares import DenseShare, accumulation_dtype
from lightning_gradtrace.ranks import Ranks
from lightning_gradtrace.step import Step
from lightning_gradtrace.update.division import StepDivision
from lightning_gradtrace.update.ledger import Balance, Ledger


def compare_over_ranks(
    ranks: Ranks, step: Step | None, parameters: Mapping[str, Tensor], skipped: bool = False
) -> tuple[dict[str, float], Balance]:
    """Compare sums over all ranks with the gradients, and their shifts with what happened to the weights.

    The sum of the shares of every tracked parameter travels once; one parameter at a time is held.

    Args:
        ranks: the ranks, all of which call this.
        step: the step that was just made; None if this rank has nothing to tell of it.
        parameters: tracked parameters of the step's optimizer by name, the same on all ranks.
        skipped: whether the optimizer left the weights as they are.

    Returns:
        Relative errors of the sums by name, as in `sum_errors`, and the outcome of the ledger, if it is asked for.

    Raises:
        RankError: something failed on another rank.
    """
    errors: dict[str, float] = {}
    ledger = Ledger() if step is not None and step.division.ledger and not skipped else None

    def shape(name: str) -> tuple[Size, dtype]:
        return parameters[name].shape, accumulation_dtype(parameters[name].dtype)

    def part(name: str) -> Tensor | None:
        return None if step is None else total_share(step.micro_batches, name)

    def use(name: str, total: Tensor) -> None:
        if step is None or name not in step.division.gradients:
            return
        division, scale = step.division, step.division.loss_scale
        gradient = division.gradients[name] * scale
        total = total.to(gradient.device)
        errors[name] = sum_error(total, gradient, step.norm * scale)
        if ledger is not None:
            ledger.add(division.entry(name, _shifts(division, name, total)))

    ranks.sums(parameters, shape, part, use)
    return errors, Balance() if ledger is None else ledger.balance()


def _shifts(division: StepDivision, name: str, total: Tensor) -> Tensor | None:
    """Turn the sum of the shares of a parameter into the sum of its shifts."""
    scale = division.scale(name)
    return None if scale is None else division.share(name, DenseShare(total[None])).total() * scale

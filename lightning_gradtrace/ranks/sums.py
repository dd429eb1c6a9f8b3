"""What takes the samples, or the weights, of all ranks: the check of the sums, the ledger, and gathered factors.

On each rank the shares add up to the gradient of that rank's own loss, which is gone when the gradients have been
averaged. What can be compared with `.grad`, and with the movement of the weights, are sums over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Size, Tensor, dtype

from lightning_gradtrace.capture.check import relative_error, summed_in, total_share
from lightning_gradtrace.capture.precision import FINE_TO_COARSE
from lightning_gradtrace.capture.shares import DenseShare, accumulation_dtype
from lightning_gradtrace.ranks.meeting import Ranks
from lightning_gradtrace.training.step import Step
from lightning_gradtrace.update.division import StepDivision
from lightning_gradtrace.update.ledger import Balance, Ledger
from lightning_gradtrace.update.sharding import Piece, is_sharded, local


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
    squares: dict[str, tuple[float, float]] = {}
    unseen: set[str] = set()

    def part(name: str) -> Tensor | None:
        return None if step is None else total_share(step.micro_batches, name)

    def use(name: str, total: Tensor) -> None:
        if step is None or name not in step.division.gradients:
            return
        division, piece = step.division, Piece.of(parameters[name])
        gradient = division.gradients[name] * division.loss_scale
        total = total.to(gradient.device)
        if not total.any():
            unseen.add(name)
        squares[name] = (_square(piece.take(total) - gradient), _square(gradient))
        if ledger is not None:
            shifts = _shifts(division, name, total)
            ledger.add(division.entry(name, None if shifts is None else piece.take(shifts)))

    precision = _precision_anywhere(ranks, step, list(parameters))  # first: what fails in the last use ends no message
    if step is not None:
        step.precision_elsewhere = precision
    ranks.sums(parameters, lambda name: _form(parameters[name]), part, use)
    if any(is_sharded(p) for p in parameters.values()):
        _add_pieces(ranks, list(parameters), squares, ledger)
    if step is not None:
        for name, (difference, size) in squares.items():
            kind = summed_in(step.division.gradients[name].dtype, precision.get(name))
            # A sum of nothing has no rounding.
            overall = 0.0 if name in unseen else step.norm * step.division.loss_scale
            errors[name] = relative_error(difference**0.5, size**0.5, kind, overall)
    return errors, Balance() if ledger is None else ledger.balance()


def _precision_anywhere(ranks: Ranks, step: Step | None, names: list[str]) -> dict[str, torch.dtype]:
    """Return the coarsest dtype that the gradient of each parameter passed on any rank."""
    own = {} if step is None else step.precision
    coarse = [[float(own.get(name) is dtype) for name in names] for dtype in FINE_TO_COARSE]
    mine = torch.tensor(coarse, device="cpu")
    found: dict[str, torch.dtype] = {}

    def use(_: str, total: Tensor) -> None:
        for precision, counts in zip(FINE_TO_COARSE, total.tolist(), strict=True):  # a coarser one takes the place
            found.update(dict.fromkeys((name for name, n in zip(names, counts, strict=True) if n), precision))

    ranks.sums(["precision"], lambda _: (mine.shape, mine.dtype), lambda _: mine, use)
    return found


def _add_pieces(ranks: Ranks, names: list[str], squares: dict[str, tuple[float, float]], ledger: Ledger | None) -> None:
    """Add up squares over the pieces of spread parameters, in one message."""
    book = [0.0, 0.0, 0.0] if ledger is None else [ledger.missing, ledger.change, ledger.unit]
    pieces = [x for name in names for x in squares.get(name, (0.0, 0.0))]
    mine = torch.tensor([*pieces, *book], dtype=torch.float64, device="cpu")

    def use(_: str, total: Tensor) -> None:
        numbers = total.tolist()
        squares.update({n: (numbers[2 * i], numbers[2 * i + 1]) for i, n in enumerate(names) if n in squares})
        if ledger is not None:
            ledger.missing, ledger.change, ledger.unit = numbers[-3:]

    ranks.sums(["squares"], lambda _: (mine.shape, mine.dtype), lambda _: mine, use)


def gather_factors(
    ranks: Ranks, division: StepDivision | None, parameters: Mapping[str, Tensor], with_clips: bool
) -> None:
    """Make the factors of spread parameters whole: local samples move all weights, not only the piece that is here.

    Holds one number for every tracked weight until the step is recorded.

    Args:
        ranks: the ranks, all of which call this.
        division: of the step; None if this rank has nothing to tell of it.
        parameters: tracked parameters of the step's optimizer by name, the same on all ranks.
        with_clips: whether a gradient was clipped otherwise than by one number on any rank.

    Raises:
        RankError: something failed on another rank.
    """
    whole: dict[str, list[Tensor]] = {}
    for which in (0, 1) if with_clips else (0,):

        def part(name: str, which: int = which) -> Tensor | None:
            factors = {} if division is None else division.factors
            if name not in factors:
                return None
            return Piece.of(parameters[name]).place(factors[name][which], _form(parameters[name])[1])

        def use(name: str, total: Tensor) -> None:
            whole.setdefault(name, []).append(total.to(parameters[name].device))

        ranks.sums(parameters, lambda name: _form(parameters[name]), part, use)
    for name, (_, clip) in ({} if division is None else division.factors).items():
        assert division is not None
        division.gather(name, whole[name][0], whole[name][1] if with_clips else clip)


def gather_weights(ranks: Ranks, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return spread parameters whole, on the CPU; all ranks call this."""
    whole: dict[str, Tensor] = {}

    def part(name: str) -> Tensor | None:
        p = parameters[name]
        if is_sharded(p):
            return Piece.of(p).place(local(p), p.dtype)
        return p if ranks.rank == 0 else None  # whole on all ranks

    ranks.sums(parameters, lambda name: (parameters[name].shape, parameters[name].dtype), part, whole.__setitem__)
    return whole


def _form(parameter: Tensor) -> tuple[Size, dtype]:
    return parameter.shape, accumulation_dtype(parameter.dtype)


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _shifts(division: StepDivision, name: str, total: Tensor) -> Tensor | None:
    """Turn the sum of the shares of a parameter into the sum of its shifts."""
    scale = division.scale(name)
    return None if scale is None else division.share(name, DenseShare(total[None])).total() * scale

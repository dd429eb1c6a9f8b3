"""Do the shares add up to the gradient that autograd left (docs/concepts.md, 2)?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.parameters import TrackedParameter
from lightning_gradtrace.capture.placing.placement import UnattributableError
from lightning_gradtrace.capture.precision import coarsest
from lightning_gradtrace.capture.shares import SumShare, accumulation_dtype

# Largest relative error of a sum in the dtype of the gradient, with room for another order of summation.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_COARSE = 5e-2
# A gradient that vanishes but for rounding (a bias before a batch norm) is compared with this part of all gradients.
# Times the tolerance that is some units of rounding of the whole gradient: 8 in float32, where no less is safe.
_FLOOR = {torch.float64: 1e-4, torch.float32: 1e-3}
_COARSE_FLOOR = 1e-1


def tolerance(dtype: torch.dtype, passed: torch.dtype | None = None) -> float:
    """Return the largest relative error of a sum of shares that rounding explains.

    Args:
        dtype: dtype of the gradient.
        passed: coarsest dtype that it passed while it was computed, None if that is not known.

    Returns:
        The largest relative error.
    """
    return _TOLERANCE.get(coarsest([dtype, passed or dtype]), _COARSE)


def summed_in(dtype: torch.dtype, passed: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype whose rounding is left where a sum vanishes: single precision or wider, as sums are formed.

    Args:
        dtype: dtype of the gradient.
        passed: see `tolerance`.
    """
    return coarsest([dtype, accumulation_dtype(passed or dtype)])


def sum_errors(
    micro_batches: Sequence[MicroBatch], gradients: Mapping[str, Tensor], overall: float = 0.0
) -> dict[str, float]:
    """Compare the sum over all occurrences with the gradient, parameter by parameter.

    Args:
        micro_batches: the shares of all micro-batches that the gradient accumulates.
        gradients: gradient of every tracked parameter before clipping, by name.
        overall: norm of the gradients of all parameters, tracked or not.

    Returns:
        ``|sum_i g[i] - grad| / |grad|`` by name (Frobenius norms); 0 where both vanish, NaN where either is not
        finite. A small part of ``overall`` stands in for a ``|grad|`` that is smaller, if there are any shares.
    """
    errors = {}
    for name, gradient in gradients.items():
        total = total_share(micro_batches, name)  # first: shares that run the model tell of their precision then
        met = [m.precision[name] for m in micro_batches if name in m.precision]
        passed = coarsest(met) if met else None
        errors[name] = sum_error(total, gradient, overall, passed)
        if errors[name] > tolerance(gradient.dtype, passed) >= _COARSE:
            errors[name] = sum_error(total, gradient, overall, passed, _apart(micro_batches, name))
    return errors


def _apart(micro_batches: Sequence[MicroBatch], name: str) -> float:
    """Return how large the terms are that cancel each other in a sum of shares: those of uses, those of samples.

    In half precision each of them is rounded by itself. So the last bias of a reward model, which the better answer
    moves up and the worse one down, has a gradient of nothing but rounding.
    """
    size = 0.0
    for share in (m.shares[name] for m in micro_batches if name in m.shares):
        signs = 1.0 - 2.0 * (torch.arange(share.n_samples, device="cpu") % 2)
        uses = share.parts if isinstance(share, SumShare) else [share]
        norms = [float(torch.linalg.vector_norm(use.total())) for use in uses]
        device = uses[0].total().device
        size += max(sum(norms), float(torch.linalg.vector_norm(share.weighted_total(signs.to(device)))))
    return size


def total_share(micro_batches: Sequence[MicroBatch], name: str) -> Tensor | None:
    """Return the sum of the shares of a parameter over all occurrences, None if there are none."""
    total: Tensor | None = None
    for share in (m.shares[name] for m in micro_batches if name in m.shares):
        total = share.total() if total is None else total + share.total()
    return total


def sum_error(
    total: Tensor | None,
    gradient: Tensor,
    overall: float = 0.0,
    passed: torch.dtype | None = None,
    apart: float = 0.0,
) -> float:
    """Compare the sum of the shares of one parameter with its gradient, see `sum_errors`.

    Args:
        total: the sum, None for no shares.
        gradient: gradient of the parameter before clipping.
        overall: norm of the gradients of all parameters.
        passed: see `tolerance`.
        apart: norm of the terms that may have cancelled each other.
    """
    size = float(torch.linalg.vector_norm(gradient.float()))
    if total is None:
        return size / size if size else 0.0  # a sum of nothing has no rounding
    kind = summed_in(gradient.dtype, passed)
    difference = float(torch.linalg.vector_norm(total - gradient))
    if math.isfinite(size) and math.isfinite(overall) and not math.isfinite(difference):
        return math.inf  # shares that are no numbers, of a gradient that is
    return relative_error(difference, max(size, apart), kind, overall)


def relative_error(difference: float, size: float, dtype: torch.dtype, overall: float = 0.0) -> float:
    """Compare the error of a sum with the norm of the gradient, or with a small part of all gradients'.

    NaN where these are not finite: then nobody knows which gradients are nothing but rounding.
    """
    norm = max(size, overall * _FLOOR.get(dtype, _COARSE_FLOOR)) if math.isfinite(overall) else math.nan
    if not norm:
        return float("inf") if difference else 0.0
    return difference / norm


def check_sums(
    errors: Mapping[str, float],
    gradients: Mapping[str, Tensor],
    precision: Mapping[str, torch.dtype] = MappingProxyType({}),
    advice: Callable[[], str] = lambda: "",
) -> None:
    """Raise if the shares of a parameter don't add up to its gradient.

    Args:
        errors: from `sum_errors`.
        gradients: gradients by name, for their dtypes.
        precision: coarsest dtype that the gradient of each parameter passed, by name.
        advice: says what to do; asked only when there is something wrong.

    Raises:
        UnattributableError: names the parameters and says what to do.
    """
    bad = {}
    for name, error in errors.items():
        largest = tolerance(gradients[name].dtype, precision.get(name))
        if error > largest:  # False for NaN: recorded and flagged, not refused
            bad[name] = error
    if bad:
        listed = ", ".join(f"`{name}` (relative error {error:.1e})" for name, error in list(bad.items())[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UnattributableError(
            f"GradTrace: the per-sample gradients of {listed}{more} don't add up to `.grad`. {advice()}"
        )


def check_used(tracked: Sequence[TrackedParameter], used: Collection[str]) -> None:
    """Warn of tracked parameters without a gradient in an optimizer's first captured step; frozen ones may wait.

    Args:
        tracked: the tracked parameters that could take part.
        used: names of those that did.

    Raises:
        UnattributableError: none of them did.
    """
    able = [f"`{p.name}`" for p in tracked if p.tensor.requires_grad]
    unused = [f"`{p.name}`" for p in tracked if p.tensor.requires_grad and p.name not in used]
    if unused and len(unused) == len(able):
        raise UnattributableError(
            f"GradTrace: none of the tracked parameters ({', '.join(able[:5])}{', ...' if len(able) > 5 else ''}) took "
            "part in the loss of the first captured step. Track parameters that the training uses: "
            "`GradTrace(params=...)` takes globs on names, or a predicate(name, parameter)."
        )
    if unused:
        warnings.warn(
            f"GradTrace: {', '.join(unused[:5])}{', ...' if len(unused) > 5 else ''} took no part in the loss of "
            "the first captured step; their shifts are zero until they do",
            stacklevel=2,
        )


def warn_of_edits(names: Sequence[str]) -> None:
    """Warn that something was added to gradients between the backward pass and the step.

    Args:
        names: the parameters.
    """
    warnings.warn(
        "GradTrace: between the backward pass and the optimizer's step the gradients of "
        f"{', '.join(f'`{name}`' for name in names[:5])}{', ...' if len(names) > 5 else ''} were changed by more than "
        "a factor: something was added to them (noise, a penalty, a projection), by a hook or by "
        "`configure_gradient_clipping`. What was added is no sample's share; the `residual` shows it",
        stacklevel=2,
    )


def check_known(unknown: Sequence[str], fresh: bool = True) -> None:
    """Refuse a step whose gradients hold more than the recorded backward passes left.

    Args:
        unknown: parameters whose gradients were not zero when the first of these passes began.
        fresh: whether there were such passes.

    Raises:
        UnattributableError: there are any.
    """
    if unknown:
        names = ", ".join(f"`{name}`" for name in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        if not fresh:
            raise UnattributableError(
                f"GradTrace: a step used the gradients of {names}, which an earlier step had used already, and no "
                "backward pass came between: their samples would count twice. Make one step with a gradient and then "
                "call `optimizer.zero_grad()`, give each parameter to one optimizer only, or leave these parameters "
                "out with `GradTrace(params=...)`."
            )
        raise UnattributableError(
            f"GradTrace: the gradients of {names} were not zero when the step's first backward pass began: they still "
            "held what an earlier step had used, so the samples of this step don't account for it. Call "
            "`optimizer.zero_grad()` between one step and the next step's first backward pass, or leave these "
            "parameters out with `GradTrace(params=...)`."
        )

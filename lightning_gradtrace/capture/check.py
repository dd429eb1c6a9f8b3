"""Do the shares add up to the gradient that autograd left (docs/concepts.md, 2)?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_gradtrace.capture.engine import MicroBatch
from lightning_gradtrace.capture.placement import UnattributableError

# Largest relative error of a sum in the dtype of the gradient, with room for another order of summation.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_COARSE = 5e-2


def tolerance(dtype: torch.dtype, low_precision: bool = False) -> float:
    """Return the largest relative error of a sum of shares that rounding explains.

    Args:
        dtype: dtype of the gradient.
        low_precision: whether the step was computed in half precision.

    Returns:
        The largest relative error.
    """
    return _COARSE if low_precision else _TOLERANCE.get(dtype, _COARSE)


def sum_errors(micro_batches: Sequence[MicroBatch], gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Compare the sum over all occurrences with the gradient, parameter by parameter.

    Args:
        micro_batches: the shares of all micro-batches that the gradient accumulates.
        gradients: gradient of every tracked parameter before clipping, by name.

    Returns:
        ``|sum_i g[i] - grad| / |grad|`` by name (Frobenius norms); 0 where both vanish, NaN where either is not
        finite. A gradient that is nothing but the rounding errors of the others (of a bias before batch norm, of the
        bias of keys) is compared on their scale.
    """
    errors = {}
    norms = {name: float(torch.linalg.vector_norm(gradient.double())) for name, gradient in gradients.items()}
    whole = math.sqrt(sum(norm**2 for norm in norms.values()))
    for name, gradient in gradients.items():
        shares = [m.shares[name] for m in micro_batches if name in m.shares]
        norm = norms[name] if not norms[name] else max(norms[name], _rounding(gradient.dtype) * whole)
        if not shares:
            errors[name] = 1.0 if norm else 0.0
            continue
        total = shares[0].total()
        for share in shares[1:]:
            total = total + share.total()
        difference = float(torch.linalg.vector_norm(total - gradient))
        errors[name] = difference / norm if norm else (float("inf") if difference else 0.0)
    return errors


def _rounding(dtype: torch.dtype) -> float:
    """Return the size of a gradient, relative to the whole, below which it is as small as an error that is allowed."""
    return 100 * torch.finfo(dtype).eps / tolerance(dtype)


def check_sums(
    errors: Mapping[str, float],
    gradients: Mapping[str, Tensor],
    low_precision: bool = False,
    advice: Callable[[], str] = lambda: "",
    slack: float = 1.0,
) -> None:
    """Raise if the shares of a parameter don't add up to its gradient.

    Args:
        errors: from `sum_errors`.
        gradients: gradients by name, for their dtypes.
        low_precision: whether the step was computed in half precision.
        advice: says what to do; asked only when there is something wrong.
        slack: how much larger than the rounding of a sum an error may be.

    Raises:
        UnattributableError: names the parameters and says what to do.
    """
    bad = {}
    for name, error in errors.items():
        if error > slack * tolerance(
            gradients[name].dtype, low_precision
        ):  # False for NaN: recorded and flagged, not refused
            bad[name] = error
    if bad:
        listed = ", ".join(f"`{name}` (relative error {error:.1e})" for name, error in list(bad.items())[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UnattributableError(
            f"GradTrace: the per-sample gradients of {listed}{more} don't add up to `.grad`. {advice()}"
        )

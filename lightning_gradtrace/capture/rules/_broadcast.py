"""Parameters that are broadcast over the samples: their share is a cotangent summed to their shape."""

from __future__ import annotations

from torch import Tensor

from lightning_gradtrace.capture.rules._base import Call
from lightning_gradtrace.capture.shares import DenseShare, accumulation_dtype


def sum_to(call: Call, values: Tensor, parameter: Tensor) -> DenseShare | None:
    """Sum what reaches every entry of the output to the shape of the parameter that was broadcast to it.

    Args:
        call: the use.
        values: laid out like ``call.cotangent``.
        parameter: the parameter; its last axes are the output's.

    Returns:
        The share; None if the parameter has entries of its own for every sample.
    """
    n_axes = values.dim() - (call.axis.factor != "whole")
    shape = [1] * (n_axes - parameter.dim()) + list(parameter.shape)
    if call.axis.factor == "whole":
        own = shape.pop(call.axis.axis)
    else:
        own = shape[call.axis.axis] if call.n_samples > 1 else 1
    if own != 1:
        return None
    over = [axis + 1 for axis, size in enumerate(shape) if size == 1 and values.shape[axis + 1] != 1]
    if over:
        values = values.sum(over, keepdim=True, dtype=accumulation_dtype(values.dtype))
    return DenseShare(values.reshape(call.n_samples, *parameter.shape))

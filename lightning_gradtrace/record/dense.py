"""Dense: every shift of every occurrence."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from typing_extensions import override

from lightning_gradtrace.record._base import ParameterInfo, ParameterShifts, Record, StepShifts
from lightning_gradtrace.record._parts import shift_blocks
from lightning_gradtrace.record.schedule import as_schedule
from lightning_gradtrace.record.transfer import HostCopies
from lightning_gradtrace.store.schema import ArraySpec, Codec, escape

_MANTISSA = {"float16": 10, "float32": 23, "float64": 52}
_CODECS = ("none", "fast", "small")
_INNER_BYTES = 256_000
"""Raw size of what is read at once; 16 times as much goes into one file."""
_INNER_ROWS = 256
"""Most rows of it: a short run of a small parameter shall not end in much padding."""


class Dense(Record):
    """Keeps all shifts, written out: 4 bytes for every tracked weight and occurrence (docs/concepts.md, 4).

    Lossless by default. What loses precision is asked for and written down in the attributes of the arrays.

    Arrays: ``dense/<param>/shift`` (occurrence, *shape), sharded, so that a few occurrences can be read without the
    others of a file. Zero where the loss did not reach a parameter.

    Args:
        dtype: "float16", "float32" or "float64"; None takes the type in which the shifts were computed. Shifts are
            often below the smallest numbers of float16: prefer ``keep_bits=7``, which has the precision of bfloat16.
        keep_bits: number of bits of the mantissa to keep, rounded to nearest, ties to even; the rest is zero and
            compresses well. The relative error is at most ``2**-(keep_bits + 1)``. None keeps all.
        codec: "none" doesn't compress, "fast" does by a tenth, "small" by a little more and a multiple of the time
            (docs/performance.md). None takes "none" if all bits are kept, which then hardly compress, else "fast".
        schedule: at which steps to keep it: a `Schedule`, n for every n-th step, or a function of the step.

    Raises:
        ValueError: an argument is out of range.

    Example::

        >>> Dense(keep_bits=7)
        Dense(dtype=None, keep_bits=7, codec=None)
    """

    def __init__(
        self,
        dtype: str | None = None,
        keep_bits: int | None = None,
        codec: Literal["none", "fast", "small"] | None = None,
        schedule: Any = None,
    ) -> None:
        self.dtype = dtype
        self.keep_bits = keep_bits
        self.codec = codec
        self.schedule = as_schedule("Dense", schedule)
        if dtype is not None and dtype not in _MANTISSA:
            listed = ", ".join(f"`{name}`" for name in _MANTISSA)
            raise ValueError(f"`Dense(dtype={dtype!r})`: expected one of {listed}, or None for the type of the shifts")
        most = _MANTISSA[dtype or "float64"]
        if keep_bits is not None and (isinstance(keep_bits, bool) or not 1 <= keep_bits <= most):
            raise ValueError(f"`Dense(keep_bits={keep_bits!r})`: expected 1 to {most} bits, or None for all")
        if codec is not None and codec not in _CODECS:
            listed = ", ".join(f"`{name}`" for name in _CODECS)
            raise ValueError(f"`Dense(codec={codec!r})`: expected one of {listed}, or None")

    @property
    @override
    def group(self) -> str:
        return "dense"

    @override
    def specs(self, parameters: Sequence[ParameterInfo]) -> list[ArraySpec]:
        return [self._spec(info) for info in parameters]

    def _spec(self, info: ParameterInfo) -> ArraySpec:
        dtype = self.dtype or info.dtype
        lossy: dict[str, Any] = {}
        if self._bits(dtype) is not None:
            lossy["keep_bits"] = self.keep_bits
        if np.dtype(dtype).itemsize < np.dtype(info.dtype).itemsize:
            lossy["rounded_from"] = info.dtype
        dims = ("occurrence", *(f"{info.name}.{axis}" for axis in range(len(info.shape))))
        row = np.dtype(dtype).itemsize * max(1, info.numel)
        path, meaning = f"dense/{escape(info.name)}/shift", f"shift of {info.name}"
        inner = min(_INNER_ROWS, max(1, _INNER_BYTES // row))
        codec: Codec = self.codec or ("fast" if "keep_bits" in lossy else "none")
        return ArraySpec(path, dims, info.shape, dtype, meaning, codec=codec, inner_rows=inner, attrs=lossy)

    def _bits(self, dtype: str) -> int | None:
        return None if self.keep_bits is None or self.keep_bits >= _MANTISSA[dtype] else self.keep_bits

    @override
    def reduce(self, step: StepShifts, first_occurrence: int) -> dict[str, np.ndarray]:
        with HostCopies() as host:
            rows = {f"dense/{escape(p.info.name)}/shift": self._shifts(step, p, host) for p in step.parameters}
        return {path: self._rounded(values) for path, values in rows.items()}

    def _shifts(self, step: StepShifts, parameter: ParameterShifts, host: HostCopies) -> np.ndarray:
        out = np.zeros((step.n_occurrences, *parameter.info.shape), self.dtype or parameter.info.dtype)
        for micro_batch, occurrences in enumerate(step.micro_batches):
            if parameter.shares[micro_batch] is None:
                continue
            for samples, rows, block in shift_blocks(parameter, micro_batch):
                place = (slice(None), rows) if parameter.info.shape else ()
                host.put(block, functools.partial(_fill, out[occurrences][samples], place))
        return out

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        bits = self._bits(values.dtype.name)
        return values if bits is None else round_bits(values, bits)


def _fill(target: np.ndarray, place: tuple[slice, ...], values: np.ndarray) -> None:
    with np.errstate(over="ignore"):  # beyond float16 is infinite, and counted as such
        target[place] = values


def round_bits(values: np.ndarray, keep_bits: int) -> np.ndarray:
    """Round floats to some bits of mantissa, to nearest, ties to even; what is not finite stays.

    The method of numcodecs' BitRound (Zender, "Bit Grooming", Geosci. Model Dev. 9, 2016; Klöwer et al., "Compressing
    atmospheric data into its real information content", Nature Computational Science 1, 2021).

    Args:
        values: float16, float32 or float64.
        keep_bits: bits of the mantissa to keep, at least 1.

    Returns:
        Rounded values of the same type.

    Example::

        >>> round_bits(np.array([1.0, 1.26, -3.1], np.float32), 2).tolist()
        [1.0, 1.25, -3.0]
    """
    drop = _MANTISSA[values.dtype.name] - keep_bits
    if drop <= 0:
        return values
    whole = np.dtype(f"u{values.dtype.itemsize}").type
    bits = values.view(whole)
    half = whole((1 << (drop - 1)) - 1)
    rounded = bits + half + ((bits >> whole(drop)) & whole(1))
    rounded &= ~whole((1 << drop) - 1)
    return np.where(np.isfinite(values), rounded.view(values.dtype), values)

"""Shifts of one parameter from whatever record a trace has: exact, the kept ones alone, or sketched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import IntArray, Steps
from lightning_gradtrace.analysis._bootstrap import FloatArray

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

RECORDS = ("dense", "factored", "topk", "sketch")

# Shifts of one parameter that are read at once, 8 bytes each.
_BLOCK = 1 << 23


def choose_record(trace: Trace, record: str, *, linear: bool) -> str:
    """Return the record to read, the first of `RECORDS` that the trace holds for "auto".

    Args:
        trace: an open trace.
        record: "auto" or one of `RECORDS`.
        linear: whether only inner products are asked for; more than these a sketch doesn't hold.

    Raises:
        ValueError: the trace has none that serves.
    """
    if record not in ("auto", *RECORDS):
        raise ValueError(f"`record` is {record!r}, expected one of {', '.join(map(repr, ('auto', *RECORDS)))}")
    held = [name for name in RECORDS if _has(trace, name)]
    if "sketch" in held and not linear:
        held.remove("sketch")
        if record == "sketch" or (record == "auto" and not held):
            raise ValueError(
                "a Sketch estimates inner products of shifts with directions in the space of the weights, and no "
                'lengths along directions of input or output space; take `axis="weight"`, or record `Dense` or '
                "`Factored`"
            )
    if not held or record not in ("auto", *held):
        wanted = "a Dense, Factored, TopK or Sketch record" if record == "auto" else f"a record {record!r}"
        raise ValueError(f"this analysis reads {wanted}, and the trace holds {', '.join(trace.records) or 'none'}")
    return held[0] if record == "auto" else record


def shift_blocks(trace: Trace, record: str, param: str, steps: Steps) -> Iterator[tuple[IntArray, Any]]:
    """Yield occurrences (m,) of a record and their shifts (m, *shape) of a parameter; of a sketch (m, dim)."""
    if record == "topk":
        yield from _kept(trace, _access.shape_of(trace, param), steps)
        return
    source = getattr(trace, record)
    occurrence = np.asarray(source.occurrence if record == "sketch" else source[param].occurrence)
    mask = _access.occurrences_in(trace, steps)
    if mask is not None:
        occurrence = occurrence[mask[occurrence]]
    at_once = max(1, _BLOCK // max(1, int(np.prod(trace.param(param)["shape"]))))
    for start in range(0, occurrence.size, at_once):
        part = occurrence[start : start + at_once]
        yield part, source.vectors(part, param) if record == "sketch" else source[param].shifts(part)


def sketched(trace: Trace, param: str, directions: FloatArray) -> FloatArray:
    """Sketch directions (n, *shape) as the record of a trace sketched the shifts: (n, dim)."""
    import torch

    from lightning_gradtrace.record.projection import Projection
    from lightning_gradtrace.store.schema import escape

    attrs: dict[str, Any] = trace.array(f"sketch/{escape(param)}/shift").attrs.asdict()
    rows, columns = attrs["matrix"]
    left, right = attrs["sides"]
    projection = Projection(param, attrs["seed"], rows, columns, left, right)
    found = projection.apply(torch.from_numpy(np.ascontiguousarray(directions)))
    return np.asarray(found.reshape(len(found), -1).numpy(), dtype=np.float64)


def _has(trace: Trace, record: str) -> bool:
    try:
        getattr(trace, record)
    except AttributeError:
        return False
    return True


def _kept(trace: Trace, param: _access.Shape, steps: Steps) -> Iterator[tuple[IntArray, FloatArray]]:
    """Yield every occurrence of the record with what it kept of the parameter, zero elsewhere."""
    size = int(np.prod(param.shape))
    at_once = max(1, _BLOCK // max(1, size))
    numbers = np.arange(param.offset, param.offset + size)
    mask = _access.occurrences_in(trace, steps)
    chosen = _access.recorded(trace)
    chosen = chosen if mask is None else chosen[mask[chosen]]
    done = 0

    def until(end: int) -> Iterator[tuple[IntArray, FloatArray]]:
        for start in range(done, end, at_once):
            part = chosen[start : min(start + at_once, end)]
            yield part, np.zeros((part.size, *param.shape))

    for occurrence, _, entry, shift in _access.shifts_of(trace, numbers, np.zeros(size, dtype=np.int64), steps):
        if not occurrence.size:
            continue
        end = int(np.searchsorted(chosen, occurrence[-1], side="right"))
        for part, dense in until(end):
            inside = slice(*np.searchsorted(occurrence, [part[0], part[-1] + 1]))
            row = np.searchsorted(part, occurrence[inside])
            dense.reshape(part.size, -1)[row, entry[inside] - param.offset] = shift[inside]
            yield part, dense
        done = end
    yield from until(len(chosen))

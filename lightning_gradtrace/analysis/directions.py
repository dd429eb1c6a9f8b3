"""Shifts along any direction: neurons that need not be a row or a column ("virtual neurons")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import IntArray, Steps
from lightning_gradtrace.analysis._bootstrap import FloatArray

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

RECORDS = ("auto", "dense", "factored", "topk")
AXES = ("in", "out", "weight")

# Shifts of one parameter that are read at once, 8 bytes each.
_BLOCK = 1 << 23


def direction_shifts(
    trace: Trace,
    param: str,
    directions: npt.ArrayLike,
    axis: str = "in",
    *,
    record: str = "auto",
    steps: Steps = None,
) -> pd.DataFrame:
    """Measure how far each occurrence moved a weight along given directions.

    A column of a weight W (out, in) is what W does to one input coordinate. A direction v in input space (`axis="in"`)
    is such a coordinate of a turned basis, and its share of the shift s is the vector s v; a direction u in output
    space ("out") has u' s. Both are reported by their Euclidean norm; for v a basis vector it is the norm of that
    column. A direction D in the space of the weights ("weight", the shape of W) has the signed inner product <s, D>.
    Directions are scaled to length 1. For an orthonormal basis of input or output space the squares add up to |s|^2.

    Args:
        trace: an open trace with a `Dense`, `Factored` or `TopK` record.
        param: name of a tracked parameter; of two axes for "in" and "out".
        directions: one direction, or several of them along the first axis: (in,), (n, in); (out,), (n, out);
            (*shape), (n, *shape).
        axis: "in", "out" or "weight".
        record: where the shifts are taken from. "dense" and "factored" are exact (as far as the record is). "topk"
            knows only the k largest of each occurrence and takes the others as zero: an approximation that is blind
            to what is spread over many weights. "auto": the first of the three that the trace holds.
        steps: step numbers to look at; None for all.

    Returns:
        One row per occurrence of the record and direction, in order: `occurrence`, `step`, `sample_id`, `direction`
        (number), `shift`, `norm` (|s|, of what the record holds of this parameter), `share` (|shift| / norm, NaN
        where nothing moved), `record`.

    Raises:
        ValueError: the trace holds no such record, the parameter is not tracked, or directions of another shape, of
            length zero or not finite.
    """
    known = {one.param: one for one in _access.shapes(trace)}
    if param not in known:
        raise ValueError(f"`{param}` is not tracked in this trace; it tracks {', '.join(f'`{p}`' for p in known)}")
    units = _units(np.asarray(directions, dtype=np.float64), param, known[param].shape, axis)
    record = _record(trace, record)
    blocks = _kept(trace, known[param], steps) if record == "topk" else record_shifts(trace, record, param, steps)
    rows: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    moved: list[FloatArray] = [np.zeros((0, len(units)))]
    norms: list[FloatArray] = [np.zeros(0)]
    for occurrence, shift in blocks:
        wide = shift.astype(np.float64, copy=False)
        if axis == "weight":
            along = wide.reshape(len(wide), -1) @ units.reshape(len(units), -1).T
        else:
            turned = wide @ units.T if axis == "in" else np.swapaxes(wide, 1, 2) @ units.T
            along = np.linalg.norm(turned, axis=1)
        rows.append(occurrence)
        moved.append(along)
        norms.append(np.linalg.norm(wide.reshape(len(wide), -1), axis=1))
    occurrence = np.repeat(np.concatenate(rows), len(units))
    shift = np.concatenate(moved).reshape(-1)
    norm = np.repeat(np.concatenate(norms), len(units))
    where = trace.occurrences.iloc[occurrence]
    return pd.DataFrame(
        {
            "occurrence": occurrence,
            "step": where["step"].to_numpy(),
            "sample_id": where["sample_id"].to_numpy(),
            "direction": np.tile(np.arange(len(units)), len(occurrence) // max(1, len(units))),
            "shift": shift,
            "norm": norm,
            "share": np.divide(np.abs(shift), norm, out=np.full(shift.size, np.nan), where=norm > 0),
            "record": record,
        }
    )


def principal_directions(
    trace: Trace, param: str, n: int = 5, axis: str = "in", *, record: str = "auto", steps: Steps = None
) -> tuple[FloatArray, pd.DataFrame]:
    """Find the directions of input or output space along which a weight was moved most.

    These are the eigenvectors of the sum over occurrences of s' s ("in") or s s' ("out"): the orthonormal basis that
    a trace itself suggests for `direction_shifts`.

    Args:
        trace: as in `direction_shifts`.
        param: name of a tracked matrix.
        n: how many.
        axis: "in" or "out".
        record: as in `direction_shifts`.
        steps: step numbers to look at; None for all.

    Returns:
        The directions (n, in) or (n, out), the largest first, each with its largest component positive; and a table
        `direction`, `square` (sum of the squared shifts along it), `share` (of all squared shifts).

    Raises:
        ValueError: as in `direction_shifts`, or `n` out of range.
    """
    shape = _access.matrix(trace, param).shape
    _access.check_axis(axis)
    size = shape[1] if axis == "in" else shape[0]
    if not 1 <= n <= size:
        raise ValueError(f"`n` is {n}, expected 1 to {size}, the size of this axis of `{param}` {shape}")
    record = _record(trace, record)
    whole = _access.matrix(trace, param)
    blocks = _kept(trace, whole, steps) if record == "topk" else record_shifts(trace, record, param, steps)
    total = np.zeros((size, size))
    for _, shift in blocks:
        wide = shift.astype(np.float64, copy=False)
        lines = (wide if axis == "in" else np.swapaxes(wide, 1, 2)).reshape(-1, size)
        total += lines.T @ lines
    values, vectors = np.linalg.eigh(total)
    square, found = values[::-1][:n], vectors.T[::-1][:n]
    largest = np.take_along_axis(found, np.abs(found).argmax(axis=1)[:, None], axis=1)
    everything = float(np.trace(total))
    share = square / everything if everything > 0 else np.full(n, np.nan)
    table = pd.DataFrame({"direction": np.arange(n), "square": square, "share": share})
    return found * np.where(largest < 0, -1.0, 1.0), table


def exact_shifts(trace: Trace, param: str, steps: Steps) -> Iterator[tuple[IntArray, FloatArray]]:
    """Yield occurrences (m,) of some steps and their shifts (m, *shape), from a record that holds all of them.

    Args:
        trace: an open trace with a `Dense` or `Factored` record.
        param: name of a tracked parameter.
        steps: step numbers to look at; None for all.

    Raises:
        ValueError: the trace holds no such record.
    """
    record = _record(trace, "auto")
    if record == "topk":
        raise ValueError(
            f"this analysis reads a Dense or Factored record, and the trace holds {', '.join(trace.records)}"
        )
    yield from record_shifts(trace, record, param, steps)


def _units(directions: FloatArray, param: str, shape: tuple[int, ...], axis: str) -> FloatArray:
    if axis not in AXES:
        raise ValueError(f'`axis` is {axis!r}, expected "in", "out" or "weight"')
    if axis != "weight" and len(shape) != 2:
        raise ValueError(
            f"`{param}` has shape {shape}; only parameters of shape (out, in) have an input and an output space"
        )
    one = {"in": shape[1:], "out": shape[:1], "weight": shape}[axis]
    several = directions[None] if directions.shape == one else directions
    if several.shape[1:] != one or several.ndim != len(one) + 1:
        raise ValueError(
            f"`directions` has shape {directions.shape}, expected {one} or (n, {', '.join(map(str, one))}) for "
            f"`axis={axis!r}` of `{param}` {shape}"
        )
    flat = several.reshape(len(several), -1)
    length = np.linalg.norm(flat, axis=1)
    if not (np.isfinite(length) & (length > 0)).all():
        raise ValueError(
            "`directions` holds one of length zero or with values that are not finite, which points nowhere"
        )
    return (flat / length[:, None]).reshape(several.shape)


def _record(trace: Trace, record: str) -> str:
    if record not in RECORDS:
        raise ValueError(f"`record` is {record!r}, expected one of {', '.join(repr(r) for r in RECORDS)}")
    held = [name for name in ("dense", "factored", "topk") if _has(trace, name)]
    if not held or record not in ("auto", *held):
        wanted = "a Dense, Factored or TopK record" if record == "auto" else f"a record {record!r}"
        raise ValueError(f"this analysis reads {wanted}, and the trace holds {', '.join(trace.records) or 'none'}")
    return held[0] if record == "auto" else record


def _has(trace: Trace, record: str) -> bool:
    try:
        getattr(trace, record)
    except AttributeError:
        return False
    return True


def record_shifts(trace: Trace, record: str, param: str, steps: Steps) -> Iterator[tuple[IntArray, Any]]:
    """Yield occurrences (m,) and their shifts (m, *shape) from a record that holds all of them."""
    source = getattr(trace, record)[param]
    occurrence = np.asarray(source.occurrence)
    mask = _access.occurrences_in(trace, steps)
    if mask is not None:
        occurrence = occurrence[mask[occurrence]]
    size = max(1, int(np.prod(trace.param(param)["shape"])))
    at_once = max(1, _BLOCK // size)
    for start in range(0, occurrence.size, at_once):
        part = occurrence[start : start + at_once]
        yield part, source.shifts(part)


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

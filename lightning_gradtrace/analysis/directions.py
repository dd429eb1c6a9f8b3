"""Shifts along any direction: neurons that need not be a row or a column ("virtual neurons")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import IntArray, Steps
from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis._shift_sources import choose_record, shift_blocks, sketched
from lightning_gradtrace.analysis._workers import joined, over_steps

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

AXES = ("in", "out", "weight")


def direction_shifts(
    trace: Trace,
    param: str,
    directions: npt.ArrayLike,
    axis: str = "in",
    *,
    record: str = "auto",
    steps: Steps = None,
    client: Any = None,
) -> pd.DataFrame:
    """Measure how far each occurrence moved a weight along given directions.

    A column of a weight W (out, in) is what W does to one input coordinate. A direction v in input space (`axis="in"`)
    is such a coordinate of a turned basis, and its share of the shift s is the vector s v; a direction u in output
    space ("out") has u' s. Both are reported by their Euclidean norm; for v a basis vector it is the norm of that
    column. A direction D in the space of the weights ("weight", the shape of W) has the signed inner product <s, D>.
    Directions are scaled to length 1. For an orthonormal basis of input or output space the squares add up to |s|^2.

    Args:
        trace: an open trace with a `Dense`, `Factored`, `TopK` or `Sketch` record.
        param: name of a tracked parameter; of two axes for "in" and "out".
        directions: one direction, or several of them along the first axis: (in,), (n, in); (out,), (n, out);
            (*shape), (n, *shape).
        axis: "in", "out" or "weight".
        record: where the shifts are taken from. "dense" and "factored" are exact (as far as the record is). "topk"
            knows only the k largest of each occurrence and takes the others as zero: an approximation that is blind
            to what is spread over many weights. "sketch" estimates <s, D>, so for `axis="weight"` only: without bias
            over the draw of its signs, with a standard deviation of at most the array's `relative_error` times |s|.
            The signs are those of the whole run, so means over occurrences are no more exact than that; runs with
            other seeds are. "auto": the first of the four that the trace holds and that can answer.
        steps: step numbers to look at; None for all.
        client: a `dask.distributed.Client` whose workers share the work; None does all of it here.

    Returns:
        One row per occurrence of the record and direction, in order: `occurrence`, `step`, `sample_id`, `direction`
        (number), `shift`, `norm` (|s|, of what the record holds of this parameter; of a sketch its length, which
        estimates it), `share` (|shift| / norm, NaN where nothing moved), `record`.

    Raises:
        ValueError: the trace holds no such record, the parameter is not tracked, or directions of another shape, of
            length zero or not finite.

    Source: docs/concepts.md, 3: a shift is in units of the weight, and so is its part along a unit vector.
    """
    shape = _access.shape_of(trace, param).shape
    units = _units(np.asarray(directions, dtype=np.float64), param, shape, axis)
    record = choose_record(trace, record, linear=axis == "weight")
    if record == "sketch":
        units = sketched(trace, param, units)
    row, along, length = over_steps(client, trace, steps, _along, joined, param, record, units, axis)
    occurrence, shift, norm = np.repeat(row, len(units)), along.reshape(-1), np.repeat(length, len(units))
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
    trace: Trace,
    param: str,
    n: int = 5,
    axis: str = "in",
    *,
    record: str = "auto",
    steps: Steps = None,
    client: Any = None,
) -> tuple[FloatArray, pd.DataFrame]:
    """Find the directions of input or output space along which a weight was moved most.

    These are the eigenvectors of the sum over occurrences of s' s ("in") or s s' ("out"): the orthonormal basis that
    a trace itself suggests for `direction_shifts`.

    Source: principal components of the shifts, not centred; a direction has length 1.

    Args:
        trace: as in `direction_shifts`.
        param: name of a tracked matrix.
        n: how many; as many as the axis has if it has fewer.
        axis: "in" or "out".
        record: as in `direction_shifts`.
        steps: step numbers to look at; None for all.
        client: as in `direction_shifts`.

    Returns:
        The directions (n, in) or (n, out), the largest first, each with its largest component positive; and a table
        `direction`, `square` (sum of the squared shifts along it), `share` (of all squared shifts).

    Raises:
        ValueError: as in `direction_shifts`, or `n` below 1.
    """
    shape = _access.matrix(trace, param).shape
    _access.check_axis(axis)
    size = shape[1] if axis == "in" else shape[0]
    _access.check_count("n", n, of="directions")
    record = choose_record(trace, record, linear=False)
    total = over_steps(client, trace, steps, _products, np.add, param, record, axis, size)
    values, vectors = np.linalg.eigh(total)
    square, found = values[::-1][:n], vectors.T[::-1][:n]
    largest = np.take_along_axis(found, np.abs(found).argmax(axis=1)[:, None], axis=1)
    everything = float(np.trace(total))
    share = square / everything if everything > 0 else np.full(square.size, np.nan)
    table = pd.DataFrame({"direction": np.arange(len(square)), "square": square, "share": share})
    return found * np.where(largest < 0, -1.0, 1.0), table


def _along(
    trace: Trace, param: str, record: str, units: FloatArray, axis: str, steps: Steps
) -> tuple[IntArray, FloatArray, FloatArray]:
    """Return occurrences (m,), their shifts along the directions (m, n), and their lengths (m,)."""
    rows: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    moved: list[FloatArray] = [np.zeros((0, len(units)))]
    norms: list[FloatArray] = [np.zeros(0)]
    for occurrence, shift in shift_blocks(trace, record, param, steps):
        wide = shift.astype(np.float64, copy=False)
        if axis == "weight":
            along = wide.reshape(len(wide), -1) @ units.reshape(len(units), -1).T
        else:
            turned = wide @ units.T if axis == "in" else np.swapaxes(wide, 1, 2) @ units.T
            along = np.linalg.norm(turned, axis=1)
        rows.append(occurrence)
        moved.append(along)
        norms.append(np.linalg.norm(wide.reshape(len(wide), -1), axis=1))
    return np.concatenate(rows), np.concatenate(moved), np.concatenate(norms)


def _products(trace: Trace, param: str, record: str, axis: str, size: int, steps: Steps) -> FloatArray:
    """Return the sum over occurrences of s' s ("in") or s s' ("out")."""
    total = np.zeros((size, size))
    for _, shift in shift_blocks(trace, record, param, steps):
        wide = shift.astype(np.float64, copy=False)
        lines = (wide if axis == "in" else np.swapaxes(wide, 1, 2)).reshape(-1, size)
        total += lines.T @ lines
    return total


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

"""Rows of arrays over the parts of several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_gradtrace.store.inputs import Inputs
from lightning_gradtrace.store.merged.rows import Occurrences, Rows, StepRows
from lightning_gradtrace.store.merged.topk import Kept, merge_kept
from lightning_gradtrace.store.target import StoreError

if TYPE_CHECKING:
    from lightning_gradtrace.store.reader import Trace

TOPK_STEP = ("occurrence", "index", "shift")
"""Arrays of ``topk_step/``, in the order of `Kept`."""

# What all ranks know of a step they compute alike, though perhaps on different hardware.
_ROUNDING = 1e-4


def read_occurrences(
    parts: Sequence[Trace], path: str, rows: Rows, span: slice, tail: tuple[int, ...], fill: object
) -> np.ndarray:
    """Read rows along "occurrence" of an array.

    Args:
        parts: the parts, by rank.
        path: of the array.
        rows: where its rows lie.
        span: which of them.
        tail: lengths of the other axes: arrays that grow are as wide as the widest row of their part.
        fill: padding of narrower ones.
    """
    rank, row = rows.rank[span], rows.row[span]
    out: np.ndarray | None = None
    for number, part in enumerate(parts):
        at = np.flatnonzero(rank == number)
        if not part.has(path):
            continue
        first, last = (int(row[at[0]]), int(row[at[-1]]) + 1) if len(at) else (0, 0)
        values = part.read(path, first, last)
        if out is None:
            out = np.full((len(rank), *tail), fill, values.dtype)
        inside = out[(slice(None), *(slice(0, n) for n in values.shape[1:]))]
        inside[at] = values
    assert out is not None  # one part holds the array, or nobody would ask
    return out


def read_steps(parts: Sequence[Trace], path: str, rows: StepRows, span: slice) -> np.ndarray:
    """Read rows along "step" of an array that holds the same on all ranks that have a row.

    Args:
        parts: the parts, by rank.
        path: of the array.
        rows: where its rows lie.
        span: which of them.

    Raises:
        StoreError: it does not.
    """
    places = rows.rows[:, span]
    known = np.zeros(places.shape[1], bool)
    out: np.ndarray | None = None
    for own, part in zip(places, parts, strict=True):
        at = np.flatnonzero(own >= 0)
        if not part.has(path):
            continue
        values = part.read(path, int(own[at[0]]), int(own[at[-1]]) + 1) if len(at) else part.read(path, 0, 0)
        if out is None:
            out = np.zeros((len(known), *values.shape[1:]), values.dtype)
        seen = known[at]
        if not _agree(out[at[seen]], values[seen]):
            raise StoreError(
                f"`{path}` differs between ranks, so that a step has no value of its own there: read the parts, "
                "`trace.parts[rank].read(...)`"
            )
        out[at[~seen]], known[at] = values[~seen], True
    assert out is not None
    return out


def read_topk_step(parts: Sequence[Trace], rows: StepRows, places: Occurrences, span: slice) -> Kept:
    """Read the largest shifts of steps over all ranks.

    Args:
        parts: the parts, by rank.
        rows: where the rows of ``topk_step/`` lie.
        places: where the occurrences lie.
        span: which rows.

    Raises:
        StoreError: a part lacks a step, or names occurrences that it doesn't hold.
    """
    kept = []
    for rank, (own, part) in enumerate(zip(rows.rows[:, span], parts, strict=True)):
        first, last = (int(own[0]), int(own[-1]) + 1) if len(own) else (0, 0)
        numbers = np.append(places.numbers[rank], -1)  # padding stays -1
        occurrence = part.read("topk_step/occurrence", max(0, first), last)
        if len(occurrence) != len(own) or (occurrence >= len(numbers) - 1).any() or (occurrence < -1).any():
            raise StoreError(f"`topk_step` of rank {rank} lacks steps or names occurrences of others: it is damaged")
        index, shift = (part.read(f"topk_step/{name}", first, last) for name in TOPK_STEP[1:])
        kept.append((numbers[occurrence], index, shift))
    return merge_kept(kept)


def merge_inputs(inputs: Sequence[Inputs]) -> Inputs:
    """Join the texts of several ranks; of a sample that several have seen, the first one's."""
    width = max(one.tokens.shape[1] for one in inputs)
    tokens = [np.pad(one.tokens, ((0, 0), (0, width - one.tokens.shape[1])), constant_values=-1) for one in inputs]
    sample_id = np.concatenate([one.sample_id for one in inputs])
    first = np.sort(np.unique(sample_id, return_index=True)[1])
    length = np.concatenate([one.length for one in inputs])
    return Inputs(sample_id[first], length[first], np.concatenate(tokens)[first], inputs[0].vocab)


def _agree(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    return bool(np.allclose(a, b, rtol=_ROUNDING, atol=0, equal_nan=True))

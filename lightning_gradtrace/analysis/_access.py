"""What every analysis needs from a trace: selections block by block, parameter shapes, words of token ids."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.floating[Any]]
Steps = int | slice | Iterable[int] | IntArray | None
Entries = pd.DataFrame | Sequence[int] | IntArray

# Up to here a table over all entries (4 bytes each) is cheaper than a search per selection.
_TABLE_LIMIT = 1 << 26
# Names that an error lists in full.
_FEW = 6


def check_trace(trace: Any) -> None:
    """Raise unless this is an open trace; a path and a table are what is passed by mistake."""
    if not hasattr(trace, "occurrences"):
        raise TypeError(f"`trace` is a {type(trace).__name__}, expected an open trace; open it by `open_trace(path)`")


def topk(trace: Trace) -> Any:
    """Return the TopK view of a trace.

    Raises:
        TypeError: it is no trace.
        ValueError: the trace holds no TopK record.
    """
    check_trace(trace)
    try:
        return trace.topk
    except AttributeError as error:
        raise ValueError(
            "this analysis reads a `TopK` record, and the trace holds none; record with "
            f"`GradTrace(..., record=TopK(1000))`. The trace says: {error}"
        ) from error


def recorded(trace: Trace) -> IntArray:
    """Return the occurrences at which the TopK record was kept, ascending: all of them unless it has a schedule."""
    view = topk(trace)
    if view.per == "sample":
        return np.asarray(trace.row_labels(view.group, "occurrence"))
    kept = trace.row_labels(view.group, "step")
    return np.flatnonzero(np.isin(trace.occurrences["step"].to_numpy(), kept))


def entry_numbers(trace: Trace, entries: Entries) -> IntArray:
    """Return the global entry numbers of a table with a column `entry`, or of a sequence of numbers.

    Raises:
        TypeError: it is no trace.
        ValueError: no such column, numbers twice, or numbers that the trace doesn't track.
    """
    check_trace(trace)
    if isinstance(entries, pd.DataFrame):
        if "entry" not in entries.columns:
            raise ValueError(
                f"`entries` has the columns {list(entries.columns)}, expected a column `entry` with global entry "
                "numbers; pass the table of `frequent_entries(trace)`"
            )
        entries = entries["entry"].to_numpy()
    numbers = np.asarray(entries, dtype=np.int64).reshape(-1)
    if np.unique(numbers).size != numbers.size:
        raise ValueError("`entries` names some entries twice, expected each once; drop the duplicates")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= trace.n_entries):
        raise ValueError(
            f"`entries` holds numbers from {numbers.min()} to {numbers.max()}, but this trace tracks entries 0 to "
            f"{trace.n_entries - 1}; take the entries from the same trace"
        )
    return numbers


def moved(trace: Trace, steps: Steps = None) -> Iterator[tuple[IntArray, IntArray, FloatArray]]:
    """Run once over the record and yield occurrence, entry and shift (m,) of everything selected, block by block.

    Entries that did not move (a record fills its k with zero shifts where fewer weights moved) and shifts that are
    not finite say nothing about which weight a sample moved, and are left out. No occurrence is split between two
    blocks.

    Args:
        trace: the trace.
        steps: step numbers, as in `trace.topk.frame` (a slice holds both its ends); None for all.
    """
    mask = occurrences_in(trace, steps)
    rest: list[tuple[IntArray, IntArray, FloatArray]] = []
    view = topk(trace)
    blocks = view.blocks() if mask is None else view.blocks(steps=np.unique(trace.occurrences["step"].to_numpy()[mask]))
    for block in blocks:
        keep = (block.shift != 0) & np.isfinite(block.shift)
        if mask is not None:
            keep &= mask[block.occurrence]
        # bincount and pandas refuse unsigned 64-bit numbers
        part = (block.occurrence, block.entry.astype(np.int64, copy=False), block.shift)
        if not keep.all():
            part = (part[0][keep], part[1][keep], part[2][keep])
        if not part[0].size:
            continue
        # The last occurrence may go on in the next block: it waits.
        end = int(np.searchsorted(part[0], part[0][-1]))
        ahead = (part[0][:end], part[1][:end], part[2][:end])
        if rest and rest[0][0][0] != part[0][0]:
            yield _join(rest)
            rest = []
        if end:
            yield _join([*rest, ahead])
            rest = []
        rest.append((part[0][end:], part[1][end:], part[2][end:]))
    if rest:
        yield _join(rest)


def _join(parts: list[tuple[IntArray, IntArray, FloatArray]]) -> tuple[IntArray, IntArray, FloatArray]:
    if len(parts) == 1:
        return parts[0]
    occurrence, entry, shift = (np.concatenate(column) for column in zip(*parts, strict=True))
    return occurrence, entry, shift


def selected(trace: Trace, steps: Steps = None) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield occurrence (m,) and entry (m,) of everything selected, as `moved` does."""
    for occurrence, entry, _ in moved(trace, steps):
        yield occurrence, entry


def occurrences_in(trace: Trace, steps: Steps) -> npt.NDArray[np.bool_] | None:
    """Mark the occurrences of the given steps: (occurrence,) bool, or None for all of them.

    Raises:
        TypeError: these are no step numbers, or it is no trace.
        ValueError: no occurrence lies in those steps, or a slice counts from the end.
    """
    check_trace(trace)
    if steps is None:
        return None
    from lightning_gradtrace.store.steps import step_numbers

    step = trace.occurrences["step"].to_numpy()
    chosen = step_numbers(steps, trace.steps.index)
    mask = np.isin(step, chosen)
    if not mask.any():
        held = f"steps {step.min()} to {step.max()}" if step.size else "no step at all"
        raise ValueError(f"`steps` matches no occurrence of this trace, which holds {held}")
    return mask


def snapshots_of(trace: Trace) -> IntArray:
    """Return the last snapshot before each occurrence's step, the first one for earlier steps: (occurrence,)."""
    step = trace.occurrences["step"].to_numpy()
    return np.maximum(np.searchsorted(trace.weight_steps, step, side="right") - 1, 0)


class Lookup:
    """Finds the row that stands for an entry.

    Args:
        trace: the trace.
        kept: (e,) global entry numbers, each once.
        rows: (e,) number that stands for each kept entry, e.g. its place in a table or its neuron.
    """

    def __init__(self, trace: Trace, kept: IntArray, rows: IntArray) -> None:
        self._table: IntArray | None = None
        if trace.n_entries <= _TABLE_LIMIT:
            self._table = np.full(trace.n_entries, -1, dtype=np.int32)
            self._table[kept] = rows
        else:
            order = np.argsort(kept)
            self._kept, self._rows = kept[order], rows[order]

    def __call__(self, entry: IntArray) -> IntArray:
        """Return the row of each entry (m,), -1 for those that are not kept."""
        if self._table is not None:
            return self._table[entry]
        if not self._kept.size:
            return np.full(entry.size, -1, dtype=np.int64)
        place = np.searchsorted(self._kept, entry)
        place[place == self._kept.size] = 0
        return np.where(self._kept[place] == entry, self._rows[place], -1)


def selections(
    trace: Trace, kept: IntArray, rows: IntArray, steps: Steps = None
) -> Iterator[tuple[IntArray, IntArray]]:
    """Run once over the record and yield the selections of the kept entries, block by block.

    Args:
        trace: the trace.
        kept: (e,) global entry numbers, each once.
        rows: (e,) as in `Lookup`.
        steps: step numbers to look at; None for all.

    Yields:
        occurrence (m,) and row (m,): occurrence selected an entry that `rows` maps to this row. Memory is that of
        one block.
    """
    for occurrence, row, _, _ in shifts_of(trace, kept, rows, steps):
        yield occurrence, row


def shifts_of(
    trace: Trace, kept: IntArray, rows: IntArray, steps: Steps = None
) -> Iterator[tuple[IntArray, IntArray, IntArray, FloatArray]]:
    """Yield occurrence, row, entry and shift (m,) of the kept entries' selections, as `selections` does."""
    find = Lookup(trace, kept, rows)
    for occurrence, entry, shift in moved(trace, steps):
        row = find(entry)
        found = row >= 0
        yield occurrence[found], row[found], entry[found], shift[found]


@dataclass(frozen=True)
class Shape:
    """One tracked parameter: its name, shape, first global entry number and owning module."""

    param: str
    shape: tuple[int, ...]
    offset: int
    module: str


def shapes(trace: Trace) -> list[Shape]:
    """Return the tracked parameters in the order of their offsets."""
    columns = (trace.params[name] for name in ("param", "shape", "offset", "module"))
    found = [Shape(str(p), tuple(s), int(o), str(m)) for p, s, o, m in zip(*columns, strict=True)]
    return sorted(found, key=lambda p: p.offset)


def matrix(trace: Trace, param: str) -> Shape:
    """Return a tracked parameter that has neurons.

    Raises:
        ValueError: not tracked, or not of shape (out, in).
    """
    one = shape_of(trace, param)
    if len(one.shape) != 2:
        raise ValueError(f"`{param}` has shape {one.shape}; only parameters of shape (out, in) have neurons")
    return one


def shape_of(trace: Trace, param: str) -> Shape:
    """Return a tracked parameter.

    Raises:
        ValueError: it is not tracked.
    """
    known = {one.param: one for one in shapes(trace)}
    if param not in known:
        alike = list(known) if len(known) <= _FEW else difflib.get_close_matches(param, known, 3, 0.0)
        more = "" if len(alike) == len(known) else f" and {len(known) - len(alike)} others, see `trace.params`"
        raise ValueError(
            f"`{param}` is not tracked in this trace; it tracks {', '.join(f'`{p}`' for p in alike)}{more}"
        )
    return known[param]


def check_count(name: str, value: Any, least: int = 1, of: str = "") -> None:
    """Raise unless an argument is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"`{name}` is {value!r}, expected {least} or more{of and ' ' + of} (a whole number)")


def check_axis(axis: str) -> None:
    """Raise unless `axis` is "in" or "out"."""
    if axis not in ("in", "out"):
        raise ValueError(f'`axis` is {axis!r}, expected "in" (a column of the weight) or "out" (a row)')


def words(vocab: Sequence[str] | None, tokens: IntArray) -> list[str]:
    """Return the text of token ids: their vocabulary strings, or the ids themselves where there is none."""
    size = len(vocab) if vocab is not None else 0
    return [vocab[t] if vocab is not None and 0 <= t < size else str(t) for t in tokens.tolist()]

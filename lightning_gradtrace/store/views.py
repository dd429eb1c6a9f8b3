"""TopK records of a trace: as a table of chosen steps, or as a stream of blocks of bounded size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from lightning_gradtrace.store.record_view import Rows, array_of
from lightning_gradtrace.store.steps import step_numbers
from lightning_gradtrace.store.target import StoreError

if TYPE_CHECKING:
    from lightning_gradtrace.store.reader import Trace

ENTRY_BYTES = 20
"""Memory of one kept entry in a block: occurrence 8, entry up to 8, shift 4."""


@dataclass(frozen=True)
class Block:
    """Kept entries of neighbouring steps, flat, in the order of `occurrence` and then of `entry`.

    Attributes:
        occurrence: number of the occurrence, row of `Trace.occurrences`, shape (m,).
        entry: global entry number, see `Trace.entries`, shape (m,).
        shift: share of the occurrence in the change of the entry, shape (m,).
    """

    occurrence: np.ndarray
    entry: np.ndarray
    shift: np.ndarray

    def __len__(self) -> int:
        """Number of kept entries m."""
        return len(self.entry)


class TopKView(ABC):
    """What a TopK record kept."""

    group: ClassVar[str]
    per: ClassVar[str]

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._index = array_of(trace, f"{self.group}/index")

    @property
    def k(self) -> int:
        """Entries kept per sample or per step."""
        return int(self._index.shape[1])

    @property
    def n_rows(self) -> int:
        """Committed rows: one for each occurrence or step that the record was kept at."""
        return len(self._labels)

    @cached_property
    def _labels(self) -> np.ndarray:
        """Occurrences or steps that the rows belong to, shape (rows,)."""
        return Rows(self._trace, self.group, self._axis).labels

    @property
    def _axis(self) -> str:
        return "occurrence" if self.per == "sample" else "step"

    def blocks(self, max_bytes: int = 64 * 2**20, steps: int | Iterable[int] | slice | None = None) -> Iterator[Block]:
        """Stream what was kept.

        Args:
            max_bytes: memory that the arrays of one block may take; at least one row is read.
            steps: number of a step, several of them, or a slice of them, whose rows alone are read; None for all.

        Yields:
            Blocks in the order of training.

        Raises:
            KeyError: if the trace has no such step.
        """
        rows = max(1, max_bytes // (ENTRY_BYTES * max(1, self.k)))
        chunk = int(self._index.chunks[0])
        # Whole chunks, where they fit, so that none is decompressed twice.
        rows = rows // chunk * chunk if rows >= chunk else rows
        for first, last in [(0, self.n_rows)] if steps is None else _runs(self._rows(steps)):
            for start in range(first, last, rows):
                yield self._checked(self._block(start, min(start + rows, last)))

    def frame(self, steps: int | Iterable[int] | slice | None = None) -> pd.DataFrame:
        """Tabulate what was kept.

        Args:
            steps: number of a step, several of them, or a slice of them; None for all, which must fit into memory.

        Returns:
            One row per kept entry: step, slot, sample_id, param, index (flat, inside the parameter), shift, occurrence,
            micro_batch, rank.

        Raises:
            KeyError: if the trace has no such step.
        """
        blocks = [self._checked(self._block(start, stop)) for start, stop in _runs(self._rows(steps))]
        occurrence = _join([block.occurrence for block in blocks], np.int64)
        entries = self._trace.entries(_join([block.entry for block in blocks], np.int64))
        where = self._trace.occurrences.iloc[occurrence]
        columns: dict[str, Any] = {name: where[name].to_numpy() for name in ("step", "slot", "sample_id")}
        columns |= {"param": entries["param"].array, "index": entries["index"].to_numpy()}
        columns |= {"shift": _join([block.shift for block in blocks], np.float32), "occurrence": occurrence}
        columns |= {name: where[name].to_numpy() for name in ("micro_batch", "rank")}
        return pd.DataFrame(columns)

    def _rows(self, steps: int | Iterable[int] | slice | None) -> np.ndarray:
        """Rows of the record that belong to the steps."""
        chosen = chosen_steps(self._trace, steps)
        of_row = self._trace.occurrences["step"].to_numpy()[self._labels] if self.per == "sample" else self._labels
        return np.flatnonzero(np.isin(of_row, chosen))

    def _checked(self, block: Block) -> Block:
        """Refuse entries and occurrences that the trace doesn't have: whatever indexes with them may rely on it."""
        for name, numbers, n in (
            ("occurrence", block.occurrence, self._trace.n_occurrences),
            ("index", block.entry, self._trace.n_entries),
        ):
            if len(numbers) and (numbers.min() < 0 or numbers.max() >= n):
                raise StoreError(
                    f"`{self.group}/{name}` names {numbers.min()} to {numbers.max()}; the trace has 0 to {n - 1}: it "
                    "is damaged, and `verify` says where"
                )
        return block

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._trace.read(f"{self.group}/{name}", start, stop)

    @abstractmethod
    def _block(self, start: int, stop: int) -> Block:
        """Read rows start to stop."""


class TopKPerSample(TopKView):
    """The k entries with the largest shifts of each occurrence, group ``topk``."""

    group = "topk"
    per = "sample"

    def _block(self, start: int, stop: int) -> Block:
        occurrence = np.repeat(self._labels[start:stop], self.k)
        index, shift = self._read("index", start, stop), self._read("shift", start, stop)
        return Block(occurrence, index.reshape(-1), shift.reshape(-1))


class TopKPerStep(TopKView):
    """The k largest shifts of each step over all its occurrences, group ``topk_step``."""

    group = "topk_step"
    per = "step"

    def _block(self, start: int, stop: int) -> Block:
        occurrence = self._read("occurrence", start, stop)
        kept = occurrence >= 0
        return Block(occurrence[kept], self._read("index", start, stop)[kept], self._read("shift", start, stop)[kept])


def chosen_steps(trace: Trace, steps: int | Iterable[int] | slice | None) -> np.ndarray:
    """Return the numbers of steps.

    Args:
        trace: the trace.
        steps: number of a step, several of them, or a slice of them; None for all.

    Returns:
        Ascending, shape (n,).

    Raises:
        KeyError: if the trace has no such step.
        TypeError: if these are no step numbers.
        ValueError: if a slice counts from the end.
    """
    known = trace.steps.index.to_numpy()
    if steps is None:
        return known
    chosen = step_numbers(steps, trace.steps.index)
    unknown = np.setdiff1d(chosen, known)
    if len(unknown):
        span = f"{known[0]} to {known[-1]}" if len(known) else "none"
        raise KeyError(f"steps {unknown[:5].tolist()} are not in the trace; it holds {len(known)} steps, {span}")
    return chosen


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Turn sorted row numbers into half-open intervals.

    Example:
        >>> _runs(np.array([0, 1, 4, 5, 9]))
        [(0, 2), (4, 6), (9, 10)]
    """
    if not len(rows):
        return []
    ends = np.flatnonzero(np.diff(rows) > 1)
    starts = rows[np.concatenate([[0], ends + 1])]
    stops = rows[np.concatenate([ends, [len(rows) - 1]])] + 1
    return [(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]


def _join(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)

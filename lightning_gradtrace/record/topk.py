"""TopK: the largest shifts of every occurrence, or of every step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from typing_extensions import override

from lightning_gradtrace.record._base import ParameterInfo, Record, StepShifts
from lightning_gradtrace.record.schedule import as_schedule
from lightning_gradtrace.record.search import Candidates, Known, Searcher, fill_with_zeros, largest
from lightning_gradtrace.store.schema import ArraySpec


class TopK(Record):
    """Keeps the ``k`` largest absolute shifts over all tracked parameters (docs/concepts.md, 4).

    The outcome is exact: equal to sorting the dense shifts by size, ties broken by occurrence, then by entry number.
    Shifts that are not finite count as the largest, so that they are always kept, and the step's ``nonfinite`` column
    counts them.

    Arrays: ``topk/index`` and ``topk/shift`` (occurrence, k) for ``per="sample"``, ``topk_step/occurrence``,
    ``topk_step/index`` and ``topk_step/shift`` (step, k) for ``per="step"``. ``index`` is the global entry number:
    the parameter's offset plus the flat index in it.

    Args:
        k: number of entries to keep, at least 1. If the model has fewer, all are kept, with a warning.
        per: "sample" keeps k for each occurrence, "step" keeps k over all occurrences of a step.
        prune: skip rows and columns that can't reach the threshold; slower without, with the same outcome.
        schedule: at which steps to keep it: a `Schedule`, n for every n-th step, or a function of the step.

    Raises:
        ValueError: ``k``, ``per`` or ``schedule`` is out of range.

    Example::

        >>> TopK(1000)
        TopK(k=1000, per='sample', prune=True)
    """

    def __init__(
        self, k: int, per: Literal["sample", "step"] = "sample", prune: bool = True, schedule: Any = None
    ) -> None:
        self.k = k
        self.per = per
        self.prune = prune
        self.schedule = as_schedule("TopK", schedule)
        self._searcher: Searcher | None = None
        self._n_entries = 0
        self._kept = 0
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"`TopK(k={self.k!r})`: expected a whole number of entries, at least 1")
        if self.per not in ("sample", "step"):
            raise ValueError(f"`TopK(per={self.per!r})`: expected one of `sample`, `step`")

    @property
    @override
    def group(self) -> str:
        """Zarr group of the record's arrays."""
        return "topk" if self.per == "sample" else "topk_step"

    @override
    def specs(self, parameters: Sequence[ParameterInfo]) -> list[ArraySpec]:
        self._n_entries = sum(p.numel for p in parameters)
        self._kept = self.k
        if self.per == "sample" and self.k > self._n_entries:
            warnings.warn(
                f"`TopK(k={self.k})`: the tracked parameters have {self._n_entries} entries; all of them are kept",
                stacklevel=2,
            )
            self._kept = self._n_entries
        self._searcher = Searcher(self._kept, pool=self.per == "step", prune=self.prune)
        dtype = "uint32" if self._n_entries < 2**32 - 1 else "uint64"
        axis = "occurrence" if self.per == "sample" else "step"
        dims, tail = (axis, "k"), (self._kept,)
        specs = [
            ArraySpec(f"{self.group}/index", dims, tail, dtype, "global entry number of a kept weight", codec="index"),
            ArraySpec(f"{self.group}/shift", dims, tail, "float32", "shift of the weight", codec="float"),
        ]
        if self.per == "step":
            name = f"{self.group}/occurrence"
            specs.append(ArraySpec(name, dims, tail, "int64", "occurrence that moved the weight, -1 for none"))
        return specs

    @override
    def state(self) -> dict[str, Any]:
        # The guess decides which entries are formed together, and so the last bit of their sums.
        return {"guess": None if self._searcher is None else self._searcher.guess}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        if self._searcher is not None:
            self._searcher.guess = state["guess"]

    @override
    def reduce(self, step: StepShifts, first_occurrence: int) -> dict[str, np.ndarray]:
        if self._searcher is None:
            raise RuntimeError("`TopK.reduce` was called before `TopK.specs`, which says what the model tracks")
        if self.per == "sample":
            return self._per_sample(step, self._searcher.search(step))
        known: Known | None = step.shared.get(Known)
        if known is not None and known.k >= self._kept:
            # The k largest of a step are among the k largest of their occurrences.
            return self._per_step(step, known.kept, first_occurrence)
        return self._per_step(step, self._searcher.search(step, known), first_occurrence)

    def _per_sample(self, step: StepShifts, found: Candidates) -> dict[str, np.ndarray]:
        n, k = step.n_occurrences, self._kept
        index = np.empty((n, k), np.uint32 if self._n_entries < 2**32 - 1 else np.uint64)
        shift = np.empty((n, k), np.float32)
        edges = np.searchsorted(found.occurrence, np.arange(n + 1))
        chosen = []
        for i in range(n):
            part = slice(edges[i], edges[i + 1])
            keep = largest(found.shift[part], k)
            entry, value = found.entry[part][keep], found.shift[part][keep]
            chosen.append(keep + edges[i])
            index[i], shift[i] = fill_with_zeros(entry, value, k, self._n_entries)
        every = np.concatenate(chosen) if chosen else np.empty(0, np.int64)
        step.shared[Known] = Known(k, found[every])
        return {"topk/index": index, "topk/shift": shift}

    def _per_step(self, step: StepShifts, found: Candidates, first_occurrence: int) -> dict[str, np.ndarray]:
        k, n_pool = self._kept, step.n_occurrences * self._n_entries
        keep = largest(found.shift, k)
        # One number for (occurrence, entry) makes the pool a single long row, in the order of ties.
        flat = found.occurrence[keep] * self._n_entries + found.entry[keep]
        flat, value = fill_with_zeros(flat, found.shift[keep], k, n_pool)
        occurrence = np.full((1, k), -1, np.int64)
        index = np.zeros((1, k), np.uint32 if self._n_entries < 2**32 - 1 else np.uint64)
        shift = np.zeros((1, k), np.float32)
        m = len(flat)
        occurrence[0, :m], index[0, :m] = flat // self._n_entries + first_occurrence, flat % self._n_entries
        shift[0, :m] = value
        return {"topk_step/occurrence": occurrence, "topk_step/index": index, "topk_step/shift": shift}

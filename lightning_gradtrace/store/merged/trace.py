"""The merged trace: the whole contract of `Trace` over the parts of all ranks, which are read where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from typing_extensions import override

from lightning_gradtrace.store.checked import CheckedArray
from lightning_gradtrace.store.inputs import Inputs
from lightning_gradtrace.store.merged.reading import (
    TOPK_STEP,
    merge_inputs,
    read_occurrences,
    read_steps,
    read_topk_step,
)
from lightning_gradtrace.store.merged.rows import Occurrences, Rows, StepRows
from lightning_gradtrace.store.parts import part_store
from lightning_gradtrace.store.reader import Trace
from lightning_gradtrace.store.schema import AXES
from lightning_gradtrace.store.target import ROOT, StoreError, Target, key_exists

if TYPE_CHECKING:
    import xarray as xr

    from lightning_gradtrace.store.verify import VerifyReport


class MergedTrace(Trace):
    """A training that several ranks recorded, as one trace.

    A step is visible when all ranks have committed it. Its occurrences are those of rank 0, then those of rank 1, and
    so on; what the parts number for themselves is numbered through. Rows of a step are merged: the loss is the mean
    over the ranks, counts are sums, the k largest shifts of a step are the k largest over all ranks. Everything else
    that belongs to a step is the same on all ranks. Weights are those of rank 0.

    Args:
        target: path, URL (fsspec) or zarr Store.

    Raises:
        StoreError: if there is no such trace, or its metadata are damaged.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        stores = [part_store(self.store, rank) for rank in range(int(self._attrs["ranks"]))]
        begun = all(key_exists(store, ROOT) for store in stores)
        # The root, which has no rows, stands in for parts of a run that ended while they were being made.
        self._parts = [Trace(store) for store in stores] if begun else [Trace(self.store)]
        self._rows: dict[str, Rows | StepRows] = {}
        self._attrs = {**self._attrs, **_ends([part.attrs for part in self._parts])}

    @property
    @override
    def attrs(self) -> dict[str, Any]:
        return {**self._attrs, "committed": dict(self._committed)}

    @property
    @override
    def parts(self) -> list[Trace]:
        return list(self._parts)

    @property
    @override
    def n_steps(self) -> int:
        return min(part.n_steps for part in self._parts)

    @property
    @override
    def n_occurrences(self) -> int:
        return len(self._places.rank)

    @cached_property
    def _committed(self) -> dict[str, int]:
        rows = {"step": self.n_steps, "occurrence": self.n_occurrences}
        ids = [part.read("inputs/sample_id") for part in self._parts if part.has("inputs/sample_id")]
        rows["sample"] = len(np.unique(np.concatenate(ids))) if ids else 0
        return {**rows, "snapshot": self._parts[0].committed["snapshot"]}

    @property
    @override
    def committed(self) -> dict[str, int]:
        return self._committed | {group: len(self._rows_of(group).labels) for group in sorted(self._with_own_rows)}

    # --- where rows lie -----------------------------------------------------------------------------------------

    @cached_property
    def _places(self) -> Occurrences:
        tables = [part.steps.iloc[: self.n_steps] for part in self._parts]
        for rank, table in enumerate(tables):
            if not table.index.equals(tables[0].index):
                raise StoreError(f"`{self._name}`: ranks 0 and {rank} hold different steps: the trace is damaged")
        return Occurrences.of(np.stack([table["n_occurrences"].to_numpy(np.int64) for table in tables], axis=1))

    @cached_property
    def _with_own_rows(self) -> set[str]:
        return {group for part in self._parts for group in part.committed} - set(AXES)

    def _rows_of(self, group: str) -> Rows | StepRows:
        """Say where the rows of a group with rows of its own lie."""
        if group not in self._rows:
            axis = self._axis_of(group)
            labels = [
                part.row_labels(group, axis) if group in part.committed else np.empty(0, np.int64)
                for part in self._parts
            ]
            self._rows[group] = (
                self._places.listed(labels)
                if axis == "occurrence"
                else StepRows.listed(labels, self.steps.index.to_numpy())
            )
        return self._rows[group]

    def _axis_of(self, group: str) -> str:
        listed = f"{group}/occurrence"
        return "occurrence" if self.has(listed) and self._holder(listed).checked(listed).ndim == 1 else "step"

    def _occurrence_rows(self, group: str) -> Rows:
        return cast(Rows, self._rows_of(group)) if group in self._with_own_rows else self._places.every

    def _step_rows(self, group: str) -> StepRows:
        if group in self._with_own_rows:
            return cast(StepRows, self._rows_of(group))
        return StepRows(self.steps.index.to_numpy(), np.tile(np.arange(self.n_steps), (len(self._parts), 1)))

    @override
    def row_labels(self, group: str, axis: str) -> np.ndarray:
        return (self._occurrence_rows(group) if axis == "occurrence" else self._step_rows(group)).labels

    # --- arrays -------------------------------------------------------------------------------------------------

    @override
    def has(self, path: str) -> bool:
        return any(part.has(path) for part in self._parts)

    @override
    def groups(self) -> list[str]:
        return sorted({group for part in self._parts for group in part.groups()})

    def _holder(self, path: str) -> Trace:
        """Return the first part that holds an array."""
        for part in self._parts:
            if part.has(path):
                return part
        raise KeyError(f"`{self._name}` holds no array `{path}`; it holds: {', '.join(self.groups())}")

    @override
    def array(self, path: str) -> Any:
        return self.checked(path)

    @override
    def checked(self, path: str) -> CheckedArray:
        return MergedArray(self, path)

    @override
    def committed_rows(self, path: str) -> int | None:
        axis, group = self._holder(path).checked(path).dims[0], path.rpartition("/")[0]
        if axis in AXES and group in self._with_own_rows:
            return len(self._rows_of(group).labels)
        if axis in ("step", "occurrence"):
            return self.n_steps if axis == "step" else self.n_occurrences
        return self._committed.get(axis)

    @override
    def read(self, path: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        group, _, name = path.rpartition("/")
        axis = self._holder(path).checked(path).dims[0]
        span = slice(start, self.committed_rows(path) if stop is None else stop)
        if axis == "sample":
            return np.asarray(getattr(self._inputs, name))[span]
        if axis in ("step", "occurrence") and path == f"{group}/{axis}" and group in self._with_own_rows:
            return self.row_labels(group, axis)[span]
        if axis == "occurrence":
            if group == "occurrences":
                return self.occurrences[name].to_numpy()[span]
            array = MergedArray(self, path)
            rows = self._occurrence_rows(group)
            return read_occurrences(self._parts, path, rows, span, array.shape[1:], array.fill_value)
        if axis == "step":
            if group == "steps":
                return self._step_column(name)[span]
            rows_of_steps = self._step_rows(group)
            if group == "topk_step":
                return read_topk_step(self._parts, rows_of_steps, self._places, span)[TOPK_STEP.index(name)]
            return read_steps(self._parts, path, rows_of_steps, span)
        return self._parts[0].read(path, start, stop)

    # --- tables -------------------------------------------------------------------------------------------------

    @cached_property
    def steps(self) -> pd.DataFrame:  # noqa: D102
        tables = [part.steps.iloc[: self.n_steps] for part in self._parts]
        merged = tables[0].copy()
        merged["loss"] = np.mean([table["loss"] for table in tables], axis=0)
        for name in ("nonfinite", "n_occurrences"):
            merged[name] = np.sum([table[name] for table in tables], axis=0).astype(merged[name].dtype)
        for name in ("half_precision", "skipped"):
            merged[name] = np.any([table[name] for table in tables], axis=0)
        return merged

    def _step_column(self, name: str) -> np.ndarray:
        if name == "step":
            return self.steps.index.to_numpy()
        if name in ("lr", "momentum"):  # one column for each parameter group
            return self.steps.filter(regex=rf"^{name}(_\d+)?$").to_numpy()
        return self.steps[name].to_numpy()

    @cached_property
    def occurrences(self) -> pd.DataFrame:  # noqa: D102
        tables = [part.occurrences for part in self._parts]
        columns = {}
        for name in tables[0].columns:
            column = np.empty(self.n_occurrences, tables[0][name].to_numpy().dtype)
            for numbers, table in zip(self._places.numbers, tables, strict=True):
                column[numbers] = table[name].to_numpy()[: len(numbers)]
            columns[name] = column
        return pd.DataFrame(columns).rename_axis("occurrence")

    @cached_property
    def _inputs(self) -> Inputs:
        return merge_inputs([part._inputs for part in self._parts])

    @property
    @override
    def weight_steps(self) -> np.ndarray:
        return self._parts[0].weight_steps

    @override
    def weights(self, param: str, step: int | None = None) -> np.ndarray:
        return self._parts[0].weights(param, step)

    @override
    def verify(self, **options: Any) -> VerifyReport:
        from lightning_gradtrace.store.merged.checks import verify_parts

        return verify_parts(self, **options)

    @override
    def to_xarray(self) -> xr.DataTree:
        from lightning_gradtrace.store.merged.tree import merged_tree

        return merged_tree(self)


def _ends(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Say how a run ended, given the attributes of its parts."""
    reasons = {rank: str(attrs["end_reason"]) for rank, attrs in enumerate(parts) if attrs.get("end_reason")}
    alike = set(reasons.values())
    listed = alike if len(alike) < 2 else (f"rank {rank}: {reason}" for rank, reason in reasons.items())
    complete = all(attrs.get("complete") is True for attrs in parts)
    return {"complete": complete, "end_reason": "; ".join(listed) or None}


class MergedArray(CheckedArray):
    """Rows of one array over the parts of all ranks; nothing is read until it is indexed.

    Args:
        trace: the merged trace.
        path: path of the array.
    """

    def __init__(self, trace: MergedTrace, path: str) -> None:
        arrays = [part.checked(path) for part in trace.parts if part.has(path)] or [trace._holder(path).checked(path)]
        one, n_rows = arrays[0], trace.committed_rows(path)
        tail = (max(lengths) for lengths in zip(*(array.shape[1:] for array in arrays), strict=True))
        self._trace, self._path = trace, path
        self.shape = (one.shape[0] if n_rows is None else n_rows, *tail)
        self.ndim, self.dtype, self.chunks, self.dims = one.ndim, one.dtype, one.chunks, one.dims
        self.attrs, self.fill_value = one.attrs, one.fill_value

    @override
    def read(self, start: int, stop: int) -> np.ndarray:
        return self._trace.read(self._path, start, stop)

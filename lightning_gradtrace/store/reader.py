"""Reading a trace: `open_trace` and what it returns."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.store.arrays import TraceArrays
from lightning_gradtrace.store.dense_view import DenseView
from lightning_gradtrace.store.factored_view import FactoredView
from lightning_gradtrace.store.inputs import Inputs
from lightning_gradtrace.store.norms_view import NormsView
from lightning_gradtrace.store.schema import CORE_SPECS, FACTORED_GROUPS, escape
from lightning_gradtrace.store.sketch_view import SketchView
from lightning_gradtrace.store.tables import locate_entries, read_occurrences, read_params, read_steps
from lightning_gradtrace.store.target import Target
from lightning_gradtrace.store.token_view import TokenGradsView
from lightning_gradtrace.store.views import TopKPerSample, TopKPerStep, TopKView

if TYPE_CHECKING:
    import os
    from pathlib import Path

    import xarray as xr

    from lightning_gradtrace.store.verify import VerifyReport


def open_trace(target: Target) -> Trace:
    """Open a trace for reading.

    Opening reads one small document; tables and arrays are read when they are asked for. A trace that is still being
    written, or whose run was killed, opens with the steps that were committed at this moment.

    Args:
        target: path, URL (fsspec) or zarr Store.

    Returns:
        The trace.

    Raises:
        StoreError: if there is no trace, or one of a newer format.
    """
    from lightning_gradtrace.store.merged import MergedTrace

    trace = Trace(target)
    return MergedTrace(target) if "ranks" in trace.attrs else trace


class Trace(TraceArrays):
    """A recorded training run.

    Args:
        target: path, URL (fsspec) or zarr Store.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._chosen: str | None = None

    def __repr__(self) -> str:
        """Name the trace and its size."""
        state = "complete" if self._attrs.get("complete") else "incomplete"
        records = ", ".join(self.records) or "no record"
        return f"<Trace {self._name}: {self.n_steps} steps, {self.n_occurrences} occurrences, {records}, {state}>"

    def _repr_html_(self) -> str:
        """Show the trace in a notebook."""
        from lightning_gradtrace.store.html import trace_html

        return trace_html(self)

    @property
    def name(self) -> str:
        """Path or URL of the trace."""
        return self._name

    @property
    def parts(self) -> list[Trace]:
        """The traces that the ranks of the training wrote; this one alone if there was one process."""
        return [self]

    @property
    def n_steps(self) -> int:
        """Number of recorded optimizer steps."""
        return self._committed["step"]

    @property
    def n_occurrences(self) -> int:
        """Number of recorded occurrences."""
        return self._committed["occurrence"]

    @property
    def n_entries(self) -> int:
        """Number of tracked weights, which global entry numbers count."""
        return int(self.params["numel"].sum())

    @property
    def records(self) -> list[str]:
        """Groups of the records that the trace holds."""
        fixed = {spec.group.partition("/")[0] for spec in CORE_SPECS}
        groups = {"factored" if name in FACTORED_GROUPS else name for name in self.groups()}
        return sorted(groups - fixed)

    def row_labels(self, group: str, axis: str) -> np.ndarray:
        """Say which steps or occurrences the rows of a group belong to.

        Args:
            group: group of a record, such as "topk" or "dense/<param>".
            axis: first axis of its arrays, "step" or "occurrence".

        Returns:
            Numbers of steps or occurrences, rising, shape (rows,).
        """
        path = f"{group}/{axis}"
        if group in self._committed:
            return self.read(path)
        return self.steps.index.to_numpy() if axis == "step" else np.arange(self.n_occurrences)

    @cached_property
    def params(self) -> pd.DataFrame:
        """Tracked parameters: param, shape, numel, offset, kind, module."""
        return read_params(self._group)

    def param(self, name: str) -> pd.Series[Any]:
        """Look up one tracked parameter.

        Args:
            name: its name.

        Returns:
            Its row of `params`.

        Raises:
            KeyError: if it is not tracked.
        """
        rows = self.params[self.params["param"] == name]
        if not len(rows):
            raise KeyError(
                f"`{name}` is no tracked parameter of this trace; it holds: {', '.join(self.params['param'])}"
            )
        return rows.iloc[0]

    def entries(self, entry_numbers: np.ndarray) -> pd.DataFrame:
        """Say which weights global entry numbers stand for.

        Args:
            entry_numbers: shape (n,).

        Returns:
            One row per number: param (categorical in the order of `params`) and index (flat, inside the parameter).

        Raises:
            IndexError: if a number is out of range.
        """
        return locate_entries(self.params, entry_numbers)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Recorded steps, by number: epoch, loss, lr (lr_1, ... for further groups), grad_norm, clip_factor, ..."""
        return read_steps(self._group, self.n_steps)

    @cached_property
    def occurrences(self) -> pd.DataFrame:
        """Recorded occurrences, by number: step, micro_batch, slot, rank, sample_id."""
        return read_occurrences(self._group, self.n_occurrences)

    @property
    def topk(self) -> TopKView:
        """The TopK record: per sample if there is one, else per step; or the one chosen with `using`."""
        group = self._chosen or ("topk" if "topk" in self.records or "topk_step" not in self.records else "topk_step")
        return self._view(TopKPerStep if group == "topk_step" else TopKPerSample)

    def using(self, record: str) -> Trace:
        """Return the same trace with another of its TopK records as `topk`, for analyses to read.

        Args:
            record: "topk" (per sample) or "topk_step" (per step).

        Raises:
            AttributeError: the trace holds no such record.
        """
        if record not in ("topk", "topk_step") or record not in self.records:
            raise self._no_record(f"`{record}`")
        other = copy.copy(self)
        other._chosen = record
        return other

    @property
    def topk_step(self) -> TopKView:
        """The TopK record per step."""
        return self._view(TopKPerStep)

    @property
    def token_grads(self) -> TokenGradsView:
        """The TokenGrads record: the largest shifts of single loss tokens."""
        return TokenGradsView(self._having("token_grads", "TokenGrads"))

    @property
    def dense(self) -> DenseView:
        """The Dense record: a lazy array (occurrence, *shape) for every parameter."""
        return DenseView(self._having("dense", "Dense"))

    @property
    def factored(self) -> FactoredView:
        """The Factored record: exact shifts of any occurrence, rebuilt from their factors."""
        return FactoredView(self._having("factored", "Factored"))

    @property
    def sketch(self) -> SketchView:
        """The Sketch record: inner products of the shifts of any two occurrences, estimated."""
        return SketchView(self._having("sketch", "Sketch"))

    @property
    def norms(self) -> NormsView:
        """The Norms record: the norm of every occurrence's shift of every parameter."""
        return NormsView(self._having("norms", "Norms"))

    def _having(self, group: str, kind: str) -> Trace:
        if group not in self.records:
            raise self._no_record(kind)
        return self

    def _view(self, view: type[TopKView]) -> TopKView:
        if view.group not in self.records:
            raise self._no_record(f'TopK(per="{view.per}")')
        return view(self)

    def _no_record(self, kind: str) -> AttributeError:
        return AttributeError(f"this trace holds no {kind} record; it holds: {', '.join(self.records) or 'none'}")

    @cached_property
    def _inputs(self) -> Inputs:
        return Inputs.read(self._group, self._committed["sample"])

    @property
    def vocab(self) -> list[str] | None:
        """Text of each token id, None if none was stored."""
        return self._inputs.vocab

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all stored inputs.

        Returns:
            Sample ids, shape (samples,), and token ids, padded with -1, shape (samples, positions).
        """
        return self._inputs.sample_id, self._inputs.tokens

    def inputs(self, sample_ids: Any) -> np.ndarray:
        """Return token ids of samples.

        Args:
            sample_ids: one id, or several.

        Returns:
            Shape (length,) for one id; (n, positions), padded with -1, for several.

        Raises:
            KeyError: if an id was never stored.
        """
        return self._inputs.of(sample_ids)

    def text(self, sample_id: int) -> str:
        """Return the text of one sample, its tokens joined by blanks.

        Raises:
            KeyError: if the sample or the vocabulary was not stored.
        """
        return self._inputs.text(sample_id)

    @cached_property
    def weight_steps(self) -> np.ndarray:
        """Steps before which the weights were kept, shape (snapshots,)."""
        n = self._committed["snapshot"]
        return self.read("weights/step") if n else np.empty(0, np.int64)

    def weights(self, param: str, step: int | None = None) -> np.ndarray:
        """Return the weights of a parameter as they were before a step ran.

        Args:
            param: name of the parameter.
            step: one of `weight_steps`; None takes the last snapshot.

        Returns:
            The weights, in the shape of the parameter.

        Raises:
            KeyError: if there is no such snapshot.
        """
        steps = self.weight_steps
        path = f"weights/values/{escape(param)}"
        if not len(steps) or not self.has(path):
            raise KeyError(
                f"no weights of `{param}` in this trace, which has {len(steps)} snapshots; "
                "record them with weights_every_n_steps"
            )
        rows = [len(steps) - 1] if step is None else np.flatnonzero(steps == step)
        if not len(rows):
            raise KeyError(f"no snapshot before step {step}; there are snapshots before steps {steps.tolist()}")
        return self.read(path, int(rows[0]), int(rows[0]) + 1)[0]

    def verify(self, **options: Any) -> VerifyReport:
        """Read everything and check it: see `lightning_gradtrace.store.verify.verify`."""
        from lightning_gradtrace.store.verify import verify

        return verify(self, **options)

    def to_zip(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Copy the trace into a zip file: see `lightning_gradtrace.store.packing.pack`."""
        from lightning_gradtrace.store.packing import pack

        return pack(self, path, overwrite=overwrite)

    def to_parquet(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write tables and TopK records as Parquet files: see `lightning_gradtrace.store.parquet.to_parquet`."""
        from lightning_gradtrace.store.parquet import to_parquet

        return to_parquet(self, folder)

    def to_xarray(self) -> xr.DataTree:
        """Return the trace as a DataTree: see `lightning_gradtrace.store.interop.to_xarray`."""
        from lightning_gradtrace.store.interop import to_xarray

        return to_xarray(self)

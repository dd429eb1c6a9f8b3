"""Writing a trace: steps come in on the training thread and go out on another one."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lightning_gradtrace.store.attributes import plain_attributes
from lightning_gradtrace.store.background import BackgroundThread
from lightning_gradtrace.store.commit import create_trace
from lightning_gradtrace.store.cursor import Cursor
from lightning_gradtrace.store.durable import DurableLocalStore
from lightning_gradtrace.store.lock import DirectoryLock
from lightning_gradtrace.store.opening import writable_store
from lightning_gradtrace.store.params import params_arrays, params_digest
from lightning_gradtrace.store.resuming import resume_trace
from lightning_gradtrace.store.rows import StepRows
from lightning_gradtrace.store.schema import (
    ENCODING_TYPE,
    ENCODING_VERSION,
    PARAM_SPECS,
    RANK_SPEC,
    VOCAB_SPEC,
    ArraySpec,
)
from lightning_gradtrace.store.target import StoreError, Target, describe

COMMIT_BYTES = 8_000_000
"""Raw bytes after which what was appended becomes visible, unless commits then took more than `COMMIT_SHARE`."""

COMMIT_SECONDS = 30.0
"""Time after which what was appended becomes visible, however little or much it is."""

COMMIT_SHARE = 0.05
"""Part of the time that commits may take: they wait for the disk some hundred times, however much is committed."""

_RESERVED = ("encoding-type", "encoding-version", "params_digest", "complete", "end_reason", "committed", "ranks")


class TraceWriter:
    """Writes one trace; every `append_step` is one atomic unit.

    Appending checks names and shapes, queues the arrays and returns. A background thread compresses them, puts whole
    chunks as they fill, and commits after `COMMIT_BYTES` or `COMMIT_SECONDS`, but spends at most `COMMIT_SHARE` of its
    time on commits. A run that is killed loses what came
    after the last commit and no more. An exception in the thread is raised by the next call of any method.

    Arrays handed over belong to the writer: don't change them afterwards.

    Args:
        target: path, URL (fsspec) or zarr Store.
        params: one row per tracked parameter: name, shape, numel, offset, kind, module.
        specs: arrays of the records, first axis "occurrence" or "step".
        attrs: JSON-like root attributes.
        n_groups: number of parameter groups of the optimizer.
        overwrite: whether a trace that is there may be replaced.
        queue_bytes: bytes that may wait for the thread; appending blocks beyond.
        vocab: text of each token id.
        commit_bytes: see `COMMIT_BYTES`.
        commit_seconds: see `COMMIT_SECONDS`.
        commit_share: see `COMMIT_SHARE`; 1 commits whenever there are `commit_bytes`.
        resume: go on with the trace that is there from this place, as `cursor` gave it; later rows are removed, and
            `overwrite` has no meaning.
        n_ranks: number of ranks that write parts below this trace, which then has no rows of its own; None for none.

    Raises:
        StoreError: if the target holds something already, is being written by another run, or can't be written; if
            `resume` doesn't fit the trace that is there, with the differences.
        ValueError: if the params table, the specs or the attributes don't make sense.
    """

    def __init__(
        self,
        target: Target,
        *,
        params: pd.DataFrame,
        specs: Sequence[ArraySpec],
        attrs: dict[str, Any],
        n_groups: int = 1,
        overwrite: bool = False,
        queue_bytes: int = 256 * 2**20,
        vocab: Sequence[str] | None = None,
        commit_bytes: int = COMMIT_BYTES,
        commit_seconds: float = COMMIT_SECONDS,
        commit_share: float = COMMIT_SHARE,
        resume: Cursor | None = None,
        n_ranks: int | None = None,
    ) -> None:
        reserved = [name for name in _RESERVED if name in attrs]
        if reserved:
            raise ValueError(f"`attrs` has {reserved}, which the writer sets itself; expected other names")
        table = params_arrays(params)
        attrs = plain_attributes(attrs)
        self._name = describe(target)
        self._rows = StepRows(specs, n_groups)
        self._n_occurrences = 0
        self._raised = False
        self._closed = self._ended = False
        self._commit_bytes, self._commit_seconds, self._commit_share = commit_bytes, commit_seconds, commit_share

        self._run_id = attrs.get("run_id") if resume is None else resume.run_id
        self._weights: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] | None = None
        self._stored_samples = np.empty(0, np.int64)
        once = {} if vocab is None else {VOCAB_SPEC: np.array(list(vocab), object)}
        once |= {} if n_ranks is None else {RANK_SPEC: np.arange(n_ranks, dtype=RANK_SPEC.dtype)}
        fixed = [*PARAM_SPECS, *self._rows.specs, *once]
        root = {"encoding-type": ENCODING_TYPE, "encoding-version": ENCODING_VERSION, **attrs}
        root |= {"params_digest": params_digest(table), "complete": False, "end_reason": None}
        root |= {} if n_ranks is None else {"ranks": n_ranks}
        store = writable_store(target)
        self._lock = DirectoryLock(store.root) if isinstance(store, DurableLocalStore) else None
        try:
            if resume is None:
                tables = table | {spec.path: rows for spec, rows in once.items()}
                self._committer = create_trace(store, self._name, root, fixed, tables, overwrite)
            else:
                self._committer, restored = resume_trace(store, self._name, root, fixed, table, resume)
                self._n_occurrences = resume.rows.get("occurrence", 0)
                self._rows.continue_after(restored.last_step, restored.records)
                self._stored_samples, self._weights = restored.sample_ids, restored.weights
        except BaseException as error:
            self._unlock()
            if isinstance(error, OSError):
                raise StoreError(f"`{self._name}` can't be written: {type(error).__name__}: {error}") from error
            raise
        self._thread = BackgroundThread(queue_bytes, self._commit_if_due, commit_seconds)

    @property
    def stored_samples(self) -> np.ndarray:
        """Ids of the samples whose inputs a resumed trace holds already, int64, shape (samples,)."""
        return self._stored_samples

    def cursor(self) -> Cursor:
        """Make everything appended so far visible, and return the place to go on from; also after the end.

        Returns:
            The place, which `resume` takes.

        Raises:
            StoreError: if the thread has failed.
        """
        if not self._closed:
            self.flush()
        return Cursor(self._committer.committed, self._committer.widths, self._run_id)

    @property
    def n_occurrences(self) -> int:
        """Occurrences appended so far: the global number of the next one."""
        return self._n_occurrences

    @property
    def blocked_seconds(self) -> float:
        """Time that calls have waited for the thread because the queue was full."""
        return self._thread.blocked_seconds

    def declare(self, specs: Sequence[ArraySpec]) -> None:
        """Add arrays that only the data of a step could declare, before the step that has their first rows.

        Args:
            specs: arrays with rows of their own, and the arrays that list these.

        Raises:
            StoreError: if the writer is closed or its thread has failed.
            ValueError: if an array is declared already, or has no rows of its own.
        """
        self._check_open()
        for spec in self._rows.declare(specs):
            self._put(functools.partial(self._committer.add, spec), 0)

    def append_step(
        self, step: dict[str, Any], occurrences: dict[str, np.ndarray], records: dict[str, np.ndarray]
    ) -> None:
        """Append one optimizer step.

        Args:
            step: scalars by name of an array in ``steps/``; `step` is needed, `lr` is a sequence of n_groups numbers,
                what is left out becomes padding.
            occurrences: arrays of n rows by name of an array in ``occurrences/``; `step` may be left out.
            records: rows by path: n of them for arrays along "occurrence", one for arrays along "step"; of a group
                with rows of its own at most as many, or none.

        Raises:
            StoreError: if the writer is closed or its thread has failed.
            ValueError: if names, types or shapes don't fit.
        """
        self._check_open()
        rows, n = self._rows.of(step, occurrences, records)
        self._put(lambda: self._write_rows(rows), sum(array.nbytes for array in rows.values()))
        self._n_occurrences += n

    def append_samples(self, sample_id: np.ndarray, tokens: np.ndarray, length: np.ndarray) -> None:
        """Append texts, each sample once.

        Args:
            sample_id: shape (n,).
            tokens: token ids, shape (n, positions), padded with -1; the number of positions may differ between calls.
            length: number of tokens of each sample, shape (n,).

        Raises:
            StoreError: if the writer is closed or its thread has failed.
            ValueError: if the shapes don't fit.
        """
        self._check_open()
        ids, lengths = np.asarray(sample_id, np.int64), np.asarray(length, np.int32)
        tokens = np.asarray(tokens, np.int32)
        if tokens.ndim != 2 or ids.shape != tokens.shape[:1] or lengths.shape != tokens.shape[:1]:
            raise ValueError(
                f"`append_samples` got sample_id {ids.shape}, tokens {tokens.shape}, length {lengths.shape}; "
                "expected (n,), (n, positions), (n,)"
            )
        self._put(lambda: self._write_samples(ids, tokens, lengths), ids.nbytes + tokens.nbytes + lengths.nbytes)

    def append_weights(self, step: int, values: dict[str, np.ndarray]) -> None:
        """Append a snapshot of the weights as they were before step number `step` ran.

        Args:
            step: the step that follows.
            values: weights by parameter, the same parameters at every call.

        Raises:
            StoreError: if the writer is closed or its thread has failed.
            ValueError: if parameters, shapes or types differ from the first snapshot.
        """
        self._check_open()
        found = {name: (value.shape, value.dtype) for name, value in values.items()}
        if self._weights is None:
            self._weights = found
        if found != self._weights:
            differing = sorted(n for n in found.keys() | self._weights.keys() if found.get(n) != self._weights.get(n))
            raise ValueError(
                f"snapshot of step {step} differs from the first one in {differing}; "
                "expected the same parameters, shapes and types in every snapshot"
            )
        self._put(lambda: self._write_weights(step, values), sum(value.nbytes for value in values.values()))

    def flush(self) -> None:
        """Wait until everything appended so far is on disk and visible to readers.

        Raises:
            StoreError: if the writer is closed or its thread has failed.
        """
        self._check_open()
        self._put(self._committer.commit, 0)
        try:
            self._thread.join()
        except BaseException as error:
            raise self._failure() from error

    def close(self, *, complete: bool, end_reason: str | None = None) -> None:
        """Write what is left and end the trace; a second call does nothing.

        After a failure of the thread only `end_reason` is written, and only if the store lets it; the trace then ends
        with its last commit.

        Args:
            complete: whether the training ran to its end.
            end_reason: why it didn't.

        Raises:
            StoreError: if the thread has failed and no call has said so yet.
        """
        if self._ended:
            return
        self._closed = True
        with contextlib.suppress(Exception):
            self._thread.put(lambda: self._committer.commit(complete=complete, end_reason=end_reason), 0)
        self._thread.stop()
        self._ended = True
        try:
            self._finish(end_reason)
        finally:
            self._unlock()

    def _finish(self, end_reason: str | None) -> None:
        if self._thread.error is None:
            return
        reason = end_reason or f"the trace could not be written: {self._thread.error!r}"
        with contextlib.suppress(Exception):
            self._committer.mark(complete=False, end_reason=reason)
        if not self._raised:
            raise self._failure() from self._thread.error

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"the trace `{self._name}` is closed; nothing can be appended to it")

    def _put(self, task: Any, nbytes: int) -> None:
        try:
            self._thread.put(task, nbytes)
        except BaseException as error:
            if error is not self._thread.error:
                raise
            raise self._failure() from error

    def _failure(self) -> StoreError:
        self._raised = True
        error = self._thread.error
        return StoreError(
            f"writing the trace `{self._name}` failed: {type(error).__name__}: {error}; "
            f"its first {self._committer.committed['step']} steps are on disk and readable"
        )

    def _write_rows(self, rows: dict[str, np.ndarray]) -> None:
        self._committer.append(rows)
        self._commit_if_due()

    def _write_samples(self, sample_id: np.ndarray, tokens: np.ndarray, length: np.ndarray) -> None:
        self._committer.append_samples(sample_id, tokens, length)

    def _write_weights(self, step: int, values: dict[str, np.ndarray]) -> None:
        self._committer.append_weights(step, values)

    def _commit_if_due(self) -> None:
        pending, since = self._committer.pending_bytes, time.monotonic() - self._committer.last_commit
        pause = self._committer.seconds_of_commit * (1 / self._commit_share - 1)
        if pending and (since >= self._commit_seconds or (pending >= self._commit_bytes and since >= pause)):
            self._committer.commit()

"""Stored inputs of a trace: token ids of every sample, and the vocabulary."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import zarr

from lightning_gradtrace.store.reading import read_rows
from lightning_gradtrace.store.target import StoreError


@dataclass(frozen=True)
class Inputs:
    """Texts of the samples.

    Attributes:
        sample_id: shape (samples,).
        length: number of tokens of each sample, shape (samples,).
        tokens: token ids, padded with -1, shape (samples, positions).
        vocab: text of each token id.
    """

    sample_id: np.ndarray
    length: np.ndarray
    tokens: np.ndarray
    vocab: list[str] | None

    @classmethod
    def read(cls, group: zarr.Group, n_samples: int) -> Inputs:
        """Read the inputs of a trace into memory.

        Args:
            group: root of the trace.
            n_samples: committed rows.

        Returns:
            The inputs; empty if none were kept.

        Raises:
            StoreError: if they are damaged.
        """
        vocab = [str(token) for token in read_rows(group, "inputs/vocab")] if "inputs/vocab" in group else None
        if not n_samples:
            none = np.empty(0, np.int64)
            return cls(none, none, np.empty((0, 0), np.int32), vocab)
        sample_id, length = (read_rows(group, f"inputs/{name}", 0, n_samples) for name in ("sample_id", "length"))

        def is_padding(region: tuple[slice, ...]) -> bool:
            """Rows of short texts have no chunk in columns that a longer text added later."""
            return region[1].start > 0 and bool((length[region[0]] <= region[1].start).all())

        tokens = read_rows(group, "inputs/tokens", 0, n_samples, is_padding)
        if (length < 0).any() or (length > tokens.shape[1]).any():
            raise StoreError(f"`inputs/length` is not within 0 to {tokens.shape[1]}: the trace is damaged")
        return cls(sample_id, length, tokens, vocab)

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.sample_id, kind="stable")

    def rows(self, sample_ids: np.ndarray) -> np.ndarray:
        """Find the rows of samples.

        Args:
            sample_ids: shape (n,).

        Returns:
            Row numbers, shape (n,).

        Raises:
            KeyError: if an id was never stored.
        """
        if not len(self.sample_id):
            raise KeyError("this trace holds no inputs; record them with inputs='auto' or a callable")
        at = np.searchsorted(self.sample_id, sample_ids, sorter=self._order)
        rows = self._order[np.minimum(at, len(self._order) - 1)]
        unknown = np.asarray(sample_ids)[self.sample_id[rows] != sample_ids]
        if len(unknown):
            raise KeyError(
                f"no inputs of samples {unknown[:5].tolist()} in this trace, which holds {len(self.sample_id)} samples"
            )
        return rows

    def of(self, sample_ids: Any) -> np.ndarray:
        """Return token ids: shape (length,) for one id, (n, positions) with padding for several."""
        ids = np.asarray(sample_ids, np.int64)
        rows = self.rows(np.atleast_1d(ids))
        return self.tokens[rows] if ids.ndim else self.tokens[rows[0], : self.length[rows[0]]]

    def text(self, sample_id: int) -> str:
        """Join the tokens of one sample by blanks.

        Raises:
            TypeError: if this is not one sample id.
            KeyError: if the sample or the vocabulary was not stored.
        """
        try:
            sample_id = operator.index(sample_id)
        except TypeError:
            raise TypeError(f"`sample_id` is {sample_id!r}, expected the id of one sample, a whole number") from None
        if self.vocab is None:
            raise KeyError("this trace holds no vocabulary; record it with vocab=..., or use the token ids of `inputs`")
        vocab = self.vocab
        return " ".join(vocab[t] if 0 <= t < len(vocab) else f"<{t}>" for t in self.of(sample_id).tolist())

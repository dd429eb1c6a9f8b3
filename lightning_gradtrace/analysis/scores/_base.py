"""What a method of finding notable tokens gets to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradtrace.analysis._access import IntArray
from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis._token_counts import Corpus, Counted


@dataclass(frozen=True)
class Candidates:
    """Pairs of a group and a token that may be notable, and the counts around them.

    Attributes:
        row: (m,) row of the chunk, ascending.
        column: (m,) column of `counts`.
        count: (m,) c(t).
        relative: (m,) relative(t).
        chunk: counts of all tokens of these groups.
        corpus: counts over everything.
    """

    row: IntArray
    column: IntArray
    count: FloatArray
    relative: FloatArray
    chunk: Counted
    corpus: Corpus

    @property
    def counts(self) -> npt.NDArray[Any]:
        """c(t) of all tokens: (row, distinct)."""
        return self.chunk.counts

    def share(self) -> FloatArray:
        """Return the background share q(t) = b(t) / sum b of every column: (distinct,)."""
        return self.corpus.texts.background / max(1, self.corpus.background_total)

    def relatives(self) -> FloatArray:
        """Return relative(t) of every group and token: (row, distinct)."""
        p = self.counts / np.maximum(self.chunk.total, 1e-300)[:, None]
        return p / self.share()


@dataclass(frozen=True)
class Method:
    """A method of finding notable tokens.

    Attributes:
        score: returns for each candidate its score (m,), the largest are notable.
        test: returns p-values (row, tested) of every group and token of the corpus, for methods that are tests.
        all_tokens: whether the score needs the counts of rare tokens too.
        needs_samples: whether it needs to know which samples are attributed to a group.
        weighted: whether it takes weighted counts.
    """

    score: Callable[[Candidates], FloatArray]
    test: Callable[[Counted, Corpus], FloatArray] | None = None
    all_tokens: bool = False
    needs_samples: bool = False
    weighted: bool = True

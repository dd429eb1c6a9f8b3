"""The univariate heuristic of the 2023 post (docs/concepts.md, 5, step 3)."""

from __future__ import annotations

from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis.scores._base import Candidates, Method


def univariate(candidates: Candidates) -> FloatArray:
    """Return c(t); that only the tokens of largest relative frequency take part is `notable_tokens`' business."""
    return candidates.count


METHOD = Method(univariate)

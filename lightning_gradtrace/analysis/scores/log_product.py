"""Log product: large where a token is both frequent and over-represented (docs/concepts.md, 5, step 5)."""

from __future__ import annotations

import numpy as np

from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis.scores._base import Candidates, Method


def log_product(candidates: Candidates) -> FloatArray:
    """Return (1 + ln c)(1 + ln relative).

    Below a relative frequency of 1/e the second factor is negative, and a frequent token scores less than a rare one.
    """
    return (1 + np.log(candidates.count)) * (1 + np.log(candidates.relative))


METHOD = Method(log_product)

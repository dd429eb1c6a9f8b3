"""What a user may give as `steps`: one number, several, or a slice of them that holds both its ends."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

import numpy as np
import pandas as pd


def step_numbers(steps: int | Iterable[int] | slice, known: pd.Index) -> np.ndarray:
    """Turn `steps` into numbers of steps, ascending and each once.

    Args:
        steps: number of a step, several of them, or a slice of them.
        known: the steps there are, which a slice chooses from.

    Returns:
        Shape (n,). Numbers that were given one by one need not be known.

    Raises:
        TypeError: these are no whole numbers.
        ValueError: a slice counts from the end, which step numbers can't.

    Example:
        >>> step_numbers(slice(2, 4), pd.RangeIndex(10))
        array([2, 3, 4])
    """
    if isinstance(steps, slice):
        bounds = [bound for bound in (steps.start, steps.stop, steps.step) if bound is not None]
        if not all(isinstance(bound, Integral) for bound in bounds):
            raise TypeError(f"`steps` is {steps}, expected a slice of whole step numbers")
        if any(bound < 0 for bound in bounds):
            raise ValueError(
                f"`steps` is {steps}, but a slice of step numbers can't count from the end; for the last five pass "
                "`trace.steps.index[-5:]`"
            )
        return pd.Series(known, known).loc[steps].to_numpy(np.int64)
    listed = list(steps) if isinstance(steps, Iterable) and not isinstance(steps, str) else [steps]
    if not all(isinstance(step, Integral) and not isinstance(step, bool) for step in listed):
        raise TypeError(f"`steps` is {steps!r}, expected a step number, several of them, a slice, or None for all")
    return np.unique(np.asarray(listed, np.int64))

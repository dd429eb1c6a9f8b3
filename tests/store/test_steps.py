"""What `steps` may be, and what is said about anything else."""

from __future__ import annotations

import pandas as pd
import pytest

from lightning_gradtrace.store.steps import step_numbers

KNOWN = pd.Index([0, 10, 20, 30])


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        (10, [10]),
        ([20, 0, 20], [0, 20]),
        (range(0, 30, 10), [0, 10, 20]),
        (KNOWN[-2:], [20, 30]),
        (slice(5, 20), [10, 20]),
        (slice(None, None, 2), [0, 20]),
    ],
)
def test_numbers_and_slices(steps, found):
    assert step_numbers(steps, KNOWN).tolist() == found


@pytest.mark.parametrize("steps", ["last", 1.5, [0.5], True, slice("a", None)])
def test_what_is_no_number_is_refused(steps):
    with pytest.raises(TypeError, match="expected a s"):
        step_numbers(steps, KNOWN)


def test_a_slice_from_the_end_is_refused_rather_than_read_as_all():
    with pytest.raises(ValueError, match="a slice of step numbers can't count from the end"):
        step_numbers(slice(-5, None), KNOWN)

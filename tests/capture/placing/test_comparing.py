"""Two runs are compared up to rounding, whatever else stands in a tensor."""

from __future__ import annotations

import pytest
import torch

from lightning_gradtrace.capture.placing.comparing import same

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [-INF, INF, -1e9, 1.7e9, torch.finfo(torch.bfloat16).min])
def test_entries_beside_a_mask_are_compared_by_their_own_size(mask: float, dtype: torch.dtype) -> None:
    one = torch.tensor([[1.0, 2.0, mask], [-3.0, 0.0, mask]], dtype=dtype)
    assert same(one, one.clone())
    assert not same(one, one.flip(0)) and not same(one.flip(0), one)
    assert not same(one, one.nan_to_num(posinf=5.0, neginf=5.0).clamp(-9, 9))
    assert not same(one.nan_to_num(posinf=5.0, neginf=5.0).clamp(-9, 9), one)
    assert same(one, one + torch.tensor([1e-6, -1e-6, 0.0], dtype=dtype))


def test_rounding_of_sums_that_vanish_is_told_by_the_largest_entry() -> None:
    assert same(torch.tensor([1e-7, 1.0]), torch.tensor([-1e-7, 1.0]))
    assert same(torch.tensor([1e-9, 1e-9, 99.0]), torch.tensor([-1e-9, 2e-9, 99.0]))
    assert not same(torch.tensor([1e-2, 1.0]), torch.tensor([-1e-2, 1.0]))
    assert same(torch.zeros(3), torch.zeros(3)) and not same(torch.zeros(3), torch.tensor([0.0, 0.0, 1e-9]))
    assert same(torch.zeros(0), torch.zeros(0)) and not same(torch.tensor([NAN]), torch.tensor([NAN]))
    assert same(torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64) + 1e-6j)

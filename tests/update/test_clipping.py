"""What was done to gradients before the step is measured, and told from what can't be divided."""

from __future__ import annotations

import pytest
import torch

from lightning_gradtrace.update.clipping import clip_factors, copy_gradient, projection


def test_norm_clipping_is_one_number_and_value_clipping_one_per_entry() -> None:
    torch.manual_seed(0)
    before = [torch.randn(4, 3), torch.randn(5)]
    assert clip_factors(before, [g * 0.25 for g in before]) == pytest.approx([0.25, 0.25])
    factors = clip_factors(before, [g.clamp(-0.1, 0.1) for g in before])
    for g, factor in zip(before, factors, strict=True):
        torch.testing.assert_close(g * factor, g.clamp(-0.1, 0.1))


def test_parameters_may_be_clipped_by_different_factors() -> None:
    before = [torch.randn(4, 3), torch.randn(5)]
    assert clip_factors(before, [before[0] * 0.5, before[1]]) == pytest.approx([0.5, 1.0])
    assert clip_factors(before, [before[0] * -2.0, before[1] * 0.0]) == pytest.approx([-2.0, 0.0])


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_or_columns_may_be_normalised(axis: int) -> None:
    g = torch.randn(4, 3)
    after = g / g.norm(dim=1 - axis, keepdim=True) * 3
    (factor,) = clip_factors([g], [after])
    assert factor.shape == ((4, 1) if axis == 0 else (1, 3))
    torch.testing.assert_close(g * factor, after)


def test_entries_may_be_masked() -> None:
    g, mask = torch.randn(4, 3), torch.rand(4, 3) < 0.5
    (factor,) = clip_factors([g], [g * mask])
    torch.testing.assert_close(g * factor, g * mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_added_is_no_factor(dtype: torch.dtype) -> None:
    """Noise divided by the gradient would close the ledger, with shares that mean nothing."""
    torch.manual_seed(0)
    g = torch.randn(40, 30).to(dtype)
    noise = torch.randn(40, 30).to(dtype)
    from_nothing = torch.cat([torch.zeros(1, 30), g[1:].float()]).to(dtype)
    assert clip_factors([g], [0.5 * g + noise]) == [None]
    assert clip_factors([g], [g - g.mean(1, keepdim=True)]) == [None]
    assert clip_factors([from_nothing], [g]) == [None]
    assert projection(g, 0.5 * g + noise) == pytest.approx(0.5, abs=0.1)
    assert projection(torch.zeros(3), torch.ones(3)) == 1.0


def test_gradients_that_are_not_finite_leave_the_factors_of_the_others_alone() -> None:
    before = [torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([3.0])]
    unclipped = clip_factors(before, [g.clone() for g in before])
    torch.testing.assert_close(torch.as_tensor(unclipped[0]) * torch.ones(3), torch.ones(3))
    assert unclipped[1] == pytest.approx(1.0)


def test_what_clipping_made_nan_stays_nan() -> None:
    """The norm of a gradient with a NaN is NaN, and so is everything that is clipped by it."""
    before = torch.tensor([1.0, float("nan"), 2.0])
    (factor,) = clip_factors([before], [before * float("nan")])
    assert factor.isnan().tolist() == [True, False, True]
    assert (before * factor).isnan().all()


def test_copies_are_copies_and_dense() -> None:
    gradients = [torch.randn(3, 2), torch.randn(4, dtype=torch.float64), torch.randn(5), torch.eye(3).to_sparse()]
    copies = [copy_gradient(gradient) for gradient in gradients]
    for gradient, copy in zip(gradients, copies, strict=True):
        torch.testing.assert_close(gradient.to_dense(), copy, rtol=0, atol=0)
        gradient.zero_()
        assert copy.any()

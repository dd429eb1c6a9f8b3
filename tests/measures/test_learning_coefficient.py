"""The local learning coefficient of potentials for which it is known."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from lightning_gradtrace.measures import local_learning_coefficient


class Point(nn.Module):
    """Weights in a potential, at its minimum."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n))


def test_a_regular_minimum_has_half_its_dimension() -> None:
    """Steps of finite size widen the distribution: d / 2 / (1 - lr n beta / 4) for a curvature of 1."""
    rate, n_beta, d = 0.004, 100.0, 30
    model = Point(d)
    found = local_learning_coefficient(
        model, lambda m: m.w.square().sum() / 2, 1000, lr=rate, n_beta=n_beta, n_draws=800, n_burn_in=60
    )
    assert found.shape == (4,)
    assert found.mean().item() == pytest.approx(d / 2 / (1 - rate * n_beta / 4), rel=0.06)
    assert not model.w.any() and model.w.grad is None


def test_a_degenerate_minimum_has_less() -> None:
    """Of w^4 it is a quarter for every weight, and directions that change nothing add nothing."""

    def quartic(model: Point) -> Tensor:
        return model.w[:30].pow(4).sum() / 4

    found = local_learning_coefficient(Point(50), quartic, 1000, lr=0.004, n_draws=1000, n_burn_in=150)
    assert found.mean().item() == pytest.approx(30 / 4, rel=0.1)


def test_a_place_that_is_no_minimum_shows_as_negative_and_seeds_repeat() -> None:
    def slope(model: Point) -> Tensor:
        return (model.w - 1).square().sum() / 2

    settings = {"lr": 1e-3, "n_draws": 50, "n_chains": 2}
    first = local_learning_coefficient(Point(3), slope, 500, **settings, seed=4)
    assert (first < 0).all()
    assert torch.equal(first, local_learning_coefficient(Point(3), slope, 500, **settings, seed=4))
    lower = local_learning_coefficient(Point(3), slope, 500, **settings, seed=4, n_beta=10.0, centre=1.0)
    higher = local_learning_coefficient(Point(3), slope, 500, **settings, seed=4, n_beta=10.0, centre=1.5)
    torch.testing.assert_close(lower - higher, torch.full((2,), 5.0, dtype=torch.float64))
    assert torch.equal(first[1:], local_learning_coefficient(Point(3), slope, 500, **settings, seed=5)[:1])


def test_localization_pulls_back_to_the_centre() -> None:
    free, bound = (
        local_learning_coefficient(
            Point(20), lambda m: m.w.square().sum() / 2, 100, lr=0.01, n_beta=10.0, localization=pull, n_draws=500
        ).mean()
        for pull in (0.0, 30.0)
    )
    assert bound < free / 2


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`n_draws` 0"):
        local_learning_coefficient(Point(2), lambda m: m.w.sum(), 10, lr=0.1, n_draws=0)
    monkeypatch.setitem(sys.modules, "devinterp.optim", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-gradtrace\[llc\]'"):
        local_learning_coefficient(Point(2), lambda m: m.w.sum(), 10, lr=0.1)

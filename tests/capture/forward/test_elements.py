"""Losses that return a sum or a mean of tracked tensors against the batch are split by their elements."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gradtrace.capture.forward.elements import LOSSES
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.placing.placement import UnattributableError
from tests.capture.test_attribution import Net, capture

C = 4
WEIGHTS = torch.linspace(0.5, 2, C).double()
Loss = Callable[..., Tensor]
"""Takes what is tracked, stretched over the samples, the batch, and how to reduce."""


def positive(x: Tensor) -> Tensor:
    return x.sigmoid() * 0.8 + 0.1


def signs(x: Tensor) -> Tensor:
    return x.detach().sign()


ELEMENTWISE: dict[str, Loss] = {
    "mse": lambda p, y, r: F.mse_loss(p, y, reduction=r),
    "mse, the other way round": lambda p, y, r: F.mse_loss(y, p, reduction=r),
    "mse, weights of elements": lambda p, y, r: F.mse_loss(p, y, reduction=r, weight=WEIGHTS.expand(y.shape)),
    "l1": lambda p, y, r: F.l1_loss(p, y, reduction=r),
    "smooth l1": lambda p, y, r: F.smooth_l1_loss(p, y, reduction=r, beta=0.7),
    "huber": lambda p, y, r: F.huber_loss(p, y, reduction=r, delta=0.5),
    "soft margin": lambda p, y, r: F.soft_margin_loss(p, signs(y), reduction=r),
    "bce": lambda p, y, r: F.binary_cross_entropy(positive(p), positive(y), reduction=r),
    "bce, weights of classes": lambda p, y, r: F.binary_cross_entropy(
        positive(p), positive(y), WEIGHTS.expand(y.shape), reduction=r
    ),
    "bce, weights of elements": lambda p, y, r: F.binary_cross_entropy(positive(p), positive(y), y.exp(), reduction=r),
    "bce with logits": lambda p, y, r: F.binary_cross_entropy_with_logits(p, positive(y), reduction=r),
    "bce with logits, weights of positives": lambda p, y, r: F.binary_cross_entropy_with_logits(
        p, positive(y), y.exp(), pos_weight=WEIGHTS, reduction=r
    ),
    "kl": lambda p, y, r: F.kl_div(p.log_softmax(-1), y.softmax(-1), reduction=r),
    "kl, logarithms": lambda p, y, r: F.kl_div(y.log_softmax(-1), p.log_softmax(-1), reduction=r, log_target=True),
    "poisson": lambda p, y, r: F.poisson_nll_loss(p, y.exp(), reduction=r, full=True),
    "gaussian": lambda p, y, r: F.gaussian_nll_loss(p, y, p.exp(), reduction=r, full=True),
    "hinge": lambda p, y, r: F.hinge_embedding_loss(p, signs(y), margin=0.3, reduction=r),
    "ranking": lambda p, y, r: F.margin_ranking_loss(p, y, signs(y), margin=0.2, reduction=r),
}
BY_ROWS: dict[str, Loss] = {
    "cosine": lambda p, y, r: F.cosine_embedding_loss(p, y, signs(y[:, 0]), margin=0.1, reduction=r),
    "triplets": lambda p, y, r: F.triplet_margin_loss(p, y, y.flip(1), reduction=r),
    "margin": lambda p, y, r: F.multi_margin_loss(p, y.argmax(1), weight=WEIGHTS, reduction=r),
    "margins": lambda p, y, r: F.multilabel_margin_loss(p, y.argsort(1), reduction=r),
    "soft margins": lambda p, y, r: F.multilabel_soft_margin_loss(p, positive(y), WEIGHTS, reduction=r),
    "classes": lambda p, y, r: F.cross_entropy(p, y.argmax(1), reduction=r, label_smoothing=0.1),
    "classes with probabilities": lambda p, y, r: F.cross_entropy(p, y.softmax(1), WEIGHTS, reduction=r),
    "probabilities that are tracked": lambda p, y, r: F.cross_entropy(y, p.softmax(1), reduction=r),
    "negative logarithms": lambda p, y, r: F.nll_loss(p.log_softmax(1), y.argmax(1), reduction=r),
}


def n_equal(m: nn.Module, y: Tensor, loss: Callable[[nn.Module, Tensor], Tensor], parts: Callable, n: int) -> int:
    """Compare shares with the parts of the loss, which add up to it, and return of how many parameters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using a target size|reduction: 'mean' divides")
        torch.testing.assert_close(parts().sum(), loss(m, y))
        shares = capture(m, y, loss, n=n).shares
        expected = per_sample_gradients(lambda i: parts()[i], n, dict(m.named_parameters()))
    for name, g in expected.items():
        torch.testing.assert_close(shares[name].dense(), g, msg=lambda text, name=name: f"{name}: {text}")
    return len(expected)


def stretched(m: nn.Module, y: Tensor) -> Tensor:
    """Stretch what a small network makes of constants over the samples."""
    return m.layer(m.code)[None].expand(y.shape)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Net(layer=nn.Linear(3, C), code=(3,)).double()


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")  # torch's huber_loss, for n = 1
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("n", [1, 2, C, 5, 2 * C])  # as many samples as classes, half and twice as many
@pytest.mark.parametrize("name", [*ELEMENTWISE, *BY_ROWS])
def test_one_number_is_split_by_its_elements(name: str, n: int, reduction: str) -> None:
    m, y = model(), torch.randn(n, C).double()
    run = ELEMENTWISE.get(name) or BY_ROWS[name]

    def parts() -> Tensor:
        elements = run(stretched(m, y), y, "none")
        total = WEIGHTS.expand(y.shape).sum() if name == "mse, weights of elements" else elements.numel()
        return elements.reshape(n, -1).sum(1) / (total if reduction == "mean" else 1)

    assert n_equal(m, y, lambda m, y: run(stretched(m, y), y, reduction), parts, n) > 0


def test_every_loss_is_compared() -> None:
    source = inspect.getsource(inspect.getmodule(test_every_loss_is_compared))
    public = {name.removesuffix("_loss").removesuffix("_nd").removesuffix("_loss") for name in LOSSES}
    assert not {name for name in public if f"F.{name}" not in source}


@pytest.mark.parametrize("n", [2, C, 5])
def test_a_mean_over_the_samples(n: int) -> None:
    m, y = model(), torch.randn(n, C).double()

    def parts() -> Tensor:
        return F.kl_div(stretched(m, y).log_softmax(1), y.softmax(1), reduction="none").sum(1) / n

    def loss(m: nn.Module, y: Tensor) -> Tensor:
        return 3 * F.kl_div(stretched(m, y).log_softmax(1), y.softmax(1), reduction="batchmean")

    assert n_equal(m, y, loss, lambda: 3 * parts(), n) > 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignored", [-100, 1])
@pytest.mark.parametrize(("n", "length"), [(2, 4), (4, 4), (5, 3)])
def test_a_mean_over_classes_counts_what_is_not_ignored(
    n: int, length: int, ignored: int, smoothing: float, weighted: bool
) -> None:
    """Positions that are ignored and weights of classes: the samples have unlike numbers of them."""
    m = model()
    y = torch.randint(C, (n, length))
    y[0, :2], y[-1, 0] = ignored, (ignored + 1) % C
    weight = WEIGHTS if weighted else torch.ones(C).double()

    def loss(m: nn.Module, y: Tensor, reduction: str = "mean") -> Tensor:
        logits = m.layer(m.code)[:, None].expand(len(y), C, length)
        return F.cross_entropy(
            logits, y, WEIGHTS if weighted else None, None, ignored, None, reduction, label_smoothing=smoothing
        )

    counted = (weight[y.clamp(min=0)] * (y != ignored)).sum()
    assert n_equal(m, y, loss, lambda: loss(m, y, "none").sum(1) / counted, n) > 0


@pytest.mark.parametrize("n", [2, C, 5, 2 * C])
def test_what_is_not_stretched_by_hand(n: int) -> None:
    """Broadcasting of either side; samples that are not on the first axis."""
    m, y = model(), torch.randn(n, C).double()
    assert (
        n_equal(
            m,
            y,
            lambda m, y: F.mse_loss(m.layer(m.code)[None], y),
            lambda: (m.layer(m.code) - y).square().mean(1) / n,
            n,
        )
        > 0
    )
    assert (
        n_equal(
            m,
            y,
            lambda m, y: F.l1_loss(y.T, m.layer(m.code)[:, None].expand(C, len(y))),
            lambda: (m.layer(m.code) - y).abs().mean(1) / n,
            n,
        )
        > 0
    )
    assert (
        n_equal(
            m,
            y,
            lambda m, y: F.huber_loss(m.layer(m.code).expand(3, len(y), C), y),
            lambda: F.huber_loss(m.layer(m.code).expand(n, C), y, reduction="none").mean(1) / n,
            n,
        )
        > 0
    )


@pytest.mark.parametrize("n", [3, C, 5])
def test_parts_of_the_batch(n: int) -> None:
    """Samples one by one, and elements picked by a mask."""
    m, y = model(), torch.randn(n, C).double()

    def one_by_one(m: nn.Module, y: Tensor) -> Tensor:
        return sum((i + 1) * F.mse_loss(m.layer(m.code), one) for i, one in enumerate(y))

    def picked(m: nn.Module, y: Tensor) -> Tensor:
        mask = y > 0
        return F.mse_loss(m.layer(m.code).expand(y.shape)[mask], y[mask], reduction="sum")

    assert n_equal(m, y, one_by_one, lambda: (m.layer(m.code) - y).square().mean(1) * torch.arange(1, n + 1), n) > 0
    assert n_equal(m, y, picked, lambda: ((m.layer(m.code) - y).square() * (y > 0)).sum(1), n) > 0


@pytest.mark.parametrize("n", [C, 5])
def test_against_a_statistic_of_the_batch_no_sample_is_named(n: int) -> None:
    m, y = model(), torch.randn(n, C).double()
    with pytest.raises(UnattributableError, match="can't attribute"):
        capture(m, y, lambda m, y: F.mse_loss(m.layer(m.code), y.mean(0)), n=n)


def test_a_penalty_on_a_tracked_tensor_is_named() -> None:
    m, y = model(), torch.randn(5, C).double()
    with pytest.raises(UnattributableError, match="`code`: the loss is computed from it by `add`"):
        capture(m, y, lambda m, y: F.mse_loss(stretched(m, y), y) + F.mse_loss(m.code, torch.ones(3).double()), n=5)


def test_learned_weights_of_classes() -> None:
    m, y = Net(layer=nn.Linear(C, C), weight=(C,)).double(), torch.rand(5, C).double()

    def loss(m: nn.Module, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(m.layer(y), y.softmax(1), m.weight.exp(), reduction=reduction)

    assert n_equal(m, y, loss, lambda: loss(m, y, "none") / 5, 5) > 0

"""A first batch proves nothing about later ones, which are picked, sorted, cropped and folded in other ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.placing.placement import UnattributableError
from lightning_gradtrace.capture.probing.probe import PermutationProbe, permutation
from tests.capture.test_attribution import Net, capture

LENGTH, WIDTH = 7, 6
Losses = Callable[[nn.Module, Tensor], Tensor]


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def layers() -> Net:
    return Net(first=nn.Linear(WIDTH, 5), last=nn.Linear(5, 3), places=nn.Embedding(LENGTH, 5))


def padded(lengths: Sequence[int]) -> Tensor:
    """Return a batch of texts of these lengths; the first feature says where there is text."""
    x = torch.randn(len(lengths), LENGTH, WIDTH)
    x[..., 0] = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    return x


def n_equal(model: nn.Module, engine: TapeEngine, losses: Losses, x: Tensor) -> int:
    """Capture a batch, compare it with autograd, sample by sample, and return of how many parameters."""
    shares = capture(model, x, lambda m, data: losses(m, data).sum(), engine, len(x)).shares
    used = {name: p for name, p in model.named_parameters() if name in shares}
    for name, wanted in per_sample_gradients(lambda i: losses(model, x)[i], len(x), used).items():
        torch.testing.assert_close(shares[name].dense(), wanted, msg=lambda text, name=name: f"{name}: {text}")
    return len(used)


def pooled(m: nn.Module, rows: Tensor, owners: Tensor, n: int) -> Tensor:
    return torch.zeros(n).index_add(0, owners, m.last(rows.tanh()).square().mean(1))


def by_mask(m: nn.Module, x: Tensor) -> Tensor:
    mask = x[..., 0] > 0
    return pooled(m, m.first(x)[mask], mask.nonzero()[:, 0], len(x))


def by_number(m: nn.Module, x: Tensor) -> Tensor:
    here = (x[..., 0] > 0).flatten().nonzero()[:, 0]
    return pooled(m, m.first(x).flatten(0, 1)[here], here // LENGTH, len(x))


def by_where(m: nn.Module, x: Tensor) -> Tensor:
    rows, columns = torch.where(x[..., 0] > 0)
    return pooled(m, m.first(x)[rows, columns] + m.places(columns), rows, len(x))


def by_masked_places(m: nn.Module, x: Tensor) -> Tensor:
    mask = x[..., 0] > 0
    places = torch.arange(LENGTH).expand(mask.shape)[mask]
    return pooled(m, m.first(x)[mask] + m.places(places), mask.nonzero()[:, 0], len(x))


def by_counts(m: nn.Module, x: Tensor) -> Tensor:
    mask = x[..., 0] > 0
    owners = torch.arange(len(x)).repeat_interleave(mask.sum(1))
    return pooled(m, m.first(x)[mask] + m.places(owners % LENGTH), owners, len(x))


def in_order_of_score(m: nn.Module, x: Tensor) -> Tensor:
    order = x[:, 0, 1].argsort(descending=True)
    return m.last(m.first(x[order]).tanh())[order.argsort()].square().mean((1, 2))


@pytest.mark.parametrize("losses", [by_mask, by_number, by_where])
@pytest.mark.parametrize("later", [(7, 5, 3, 1), (2, 0, 1, 1), (4, 4, 2, 2), (1, 1, 1, 1)], ids=str)
def test_texts_that_are_unpadded(losses: Losses, later: Sequence[int]) -> None:
    model, engine = layers(), TapeEngine()
    for lengths in ((7, 7, 7, 7), later, (7, 7, 7, 7), later[::-1]):
        assert n_equal(model, engine, losses, padded(lengths)) >= 4


FULL = (LENGTH,) * 4


@pytest.mark.parametrize("losses", [by_masked_places, by_counts])
@pytest.mark.parametrize("first", [(4, 2, 1, 2), (1, 1, 1, 1), FULL], ids=str)
@pytest.mark.parametrize("later", [(2, 0, 1, 1), (3, 1, 2, 2), (7, 5, 3, 1), (4, 4, 2, 2)], ids=str)
def test_rows_of_something_else_that_the_batch_picks(
    losses: Losses, first: Sequence[int], later: Sequence[int]
) -> None:
    model, engine = layers(), TapeEngine()
    for lengths in (first, later, later[::-1], first):
        assert n_equal(model, engine, losses, padded(lengths)) == 5


def test_samples_that_are_sorted_and_first_came_in_order() -> None:
    model, engine = layers(), TapeEngine()
    for scores in ((5.0, 3.0, 2.0, 1.0), (1.0, 2.0, 3.0, 4.0), (2.0, 9.0, 1.0, 4.0)):
        x = torch.randn(4, LENGTH, WIDTH)
        x[:, 0, 1] = torch.tensor(scores)
        assert n_equal(model, engine, in_order_of_score, x) >= 4


def by_fourier(m: nn.Module, x: Tensor) -> Tensor:
    """Rows of which nobody knows the owners any more."""
    mask = x[..., 0] > 0
    rows = torch.fft.rfft(m.first(x)[mask]).real
    return pooled(m, torch.cat([rows, rows[:, :2]], 1), mask.nonzero()[:, 0], len(x))


def by_running_sums(m: nn.Module, x: Tensor) -> Tensor:
    mask = x[..., 0] > 0
    rows = torch.logcumsumexp(m.first(x)[mask], 1)
    return pooled(m, rows, mask.nonzero()[:, 0], len(x))


@pytest.mark.parametrize("losses", [by_fourier, by_running_sums])
@pytest.mark.parametrize(
    "batches",
    [[(1, 1, 1, 1), (2, 0, 1, 1)], [(1, 1, 1), (0, 1, 2)], [(1,) * 6, (2, 0, 2, 1, 1, 0)], [(2, 0, 1, 1)]],
    ids=str,
)
def test_rows_that_are_lost_are_never_split_wrongly(losses: Losses, batches: Sequence[Sequence[int]]) -> None:
    model, engine = layers(), TapeEngine()
    with pytest.raises(UnattributableError, match=r"`last.weight`.*no axis was found"):
        for lengths in batches:
            assert n_equal(model, engine, losses, padded(lengths)) >= 4


@pytest.mark.parametrize("losses", [by_fourier, by_running_sums])
def test_rows_that_are_lost_are_confirmed_in_every_batch(losses: Losses) -> None:
    model, engine = layers(), TapeEngine()
    for n in (4, 4, 3, 5, 4):
        assert n_equal(model, engine, losses, padded((1,) * n)) >= 4


@pytest.mark.parametrize("n", range(4, 40))
def test_the_probe_keeps_no_samples_together(n: int) -> None:
    order = permutation(n)
    assert torch.equal(order.sort().values, torch.arange(n))
    assert not (order.diff() == 1).any()
    assert not any(order[:k].max() < k for k in range(1, n))


def test_samples_that_are_sorted_by_a_batch_as_long_as_the_texts() -> None:
    model, engine = layers(), TapeEngine()
    for scores in (torch.arange(4.0, 0.0, -1), torch.randn(LENGTH)):
        x = torch.randn(len(scores), LENGTH, WIDTH)
        x[:, 0, 1] = scores
        assert n_equal(model, engine, in_order_of_score, x) >= 4


@pytest.mark.parametrize("batch_first", [False, True])
def test_three_projections_are_no_three_samples(batch_first: bool) -> None:
    """Nobody follows them as parts of a batch of three, which leaves no doubt about places that are known."""
    model = Net(mix=nn.MultiheadAttention(8, 2, batch_first=batch_first), last=nn.Linear(8, 3))
    engine = TapeEngine()

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        y = x if batch_first else x.transpose(0, 1)
        y = m.last(m.mix(y, y, y, need_weights=False)[0])
        return (y if batch_first else y.transpose(0, 1)).square().mean((1, 2))

    n_equal(model, engine, losses, torch.randn(4, 5, 8))
    x = torch.randn(3, 5, 8)
    parameters = dict(model.named_parameters())
    with engine.tape(parameters, x, 3) as tape:
        loss = losses(model, x).sum()
    loss.backward()
    assert not any(use.is_routed for use in tape.uses)
    assert not engine.asks(tape, PermutationProbe(model, parameters, lambda b: losses(model, b), x, 3, 0))
    n_equal(model, engine, losses, x)


@pytest.mark.parametrize(
    "view",
    [
        lambda y: torch.flatten(input=y.unsqueeze(2), start_dim=2),
        lambda y: torch.reshape(input=y, shape=y.shape),
        lambda y: torch.clone(input=y),
    ],
)
def test_views_of_an_argument_that_is_named(view: Callable[[Tensor], Tensor]) -> None:
    model, engine = layers(), TapeEngine()
    assert n_equal(model, engine, lambda m, x: m.last(view(m.first(x))).square().sum((1, 2)), padded((1, 2, 3))) == 4


@pytest.mark.parametrize("need_weights", [False, True])
def test_windows_of_other_numbers(need_weights: bool) -> None:
    model, engine = Net(mix=nn.MultiheadAttention(8, 2, batch_first=True), last=nn.Linear(8, 3)), TapeEngine()

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        y = x.flatten(0, 1)  # sample and window
        return m.last(m.mix(y, y, y, need_weights=need_weights)[0]).unflatten(0, x.shape[:2]).square().mean((1, 2, 3))

    for windows in (4, 2, 3, 2):
        assert n_equal(model, engine, losses, torch.randn(4, windows, 5, 8)) >= 4


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_crops_that_a_step_draws(n: int) -> None:
    model, engine, drawn = layers(), TapeEngine(), list[int]()

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        return m.last(m.first(x[:, : drawn[-1]]).tanh()).square().mean((1, 2))

    for _ in range(4):
        x, n_drawn = torch.randn(n, LENGTH, WIDTH), len(drawn)

        def loss(m: nn.Module, data: Tensor) -> Tensor:
            drawn.append(int(np.random.randint(2, LENGTH)))
            return losses(m, data).sum()

        shares = capture(model, x, loss, engine, n).shares
        drawn[:] = drawn[: n_drawn + 1]
        for name, wanted in per_sample_gradients(
            lambda i: losses(model, x)[i],  # noqa: B023
            n,
            {name: p for name, p in model.named_parameters() if name in shares},
        ).items():
            torch.testing.assert_close(shares[name].dense(), wanted)


@pytest.mark.parametrize("longer", [0, 1])
def test_of_two_samples_the_longer_one_may_have_to_be_there(longer: int) -> None:
    """The permuted batch holds one of the two twice; here it must not be the shorter one."""
    x = torch.randn(2, WIDTH, WIDTH)
    x[1 - longer, 3:] = 0

    def losses(m: nn.Module, data: Tensor) -> Tensor:
        lengths = (data != 0).any(2).sum(1)
        if int(lengths.max()) < WIDTH:
            raise ValueError("targets are as long as the longest text was")
        return (m.last((m.first(data).flatten(0, 1) @ m.middle).tanh()).square().mean(1)).view(2, -1).mean(1)

    torch.manual_seed(0)
    model = Net(first=nn.Linear(WIDTH, 2), middle=(2, 2), last=nn.Linear(2, 2))
    assert n_equal(model, TapeEngine(), losses, x) == 5

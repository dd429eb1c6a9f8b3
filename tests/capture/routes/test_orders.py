"""What is sorted, counted or made distinct over the samples: values are followed, orders and counts are nobody's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.placing.placement import UnattributableError
from tests.capture.test_attribution import Net, capture

Batch = tuple[Tensor, Tensor]
"""Tokens, shape (sample, position), and numbers, shape (sample,)."""
Run = Callable[[nn.Module, Batch], Tensor]
"""Returns the losses of the samples, in their order."""

N_ROWS = 6


def distinct(m: nn.Module, b: Batch) -> Tensor:
    tokens, back = torch.unique(b[0], return_inverse=True)
    return m.layer(m.table(tokens)).tanh()[back].square().sum((1, 2))


def distinct_in_a_row(m: nn.Module, b: Batch) -> Tensor:
    tokens, back, counts = torch.unique_consecutive(b[0], return_inverse=True, return_counts=True)
    return (m.table(tokens) * counts[:, None])[back].square().sum((1, 2))


def distinct_rows(m: nn.Module, b: Batch) -> Tensor:
    rows, back = torch.unique(b[0][:, :1], dim=0, return_inverse=True)
    return m.layer(m.table(rows[:, 0]))[back].square().sum(1)


def weighted_by_frequency(m: nn.Module, b: Batch) -> Tensor:
    counts = torch.bincount(b[0].flatten(), minlength=N_ROWS)
    return (m.table.weight * m.layer(m.table(counts.clamp(max=N_ROWS - 1))))[b[0]].square().sum((1, 2))


def sorted_values(m: nn.Module, b: Batch) -> Tensor:
    values, order = b[1].sort(descending=True)
    places = torch.arange(1.0, len(order) + 1).double()
    return (m.scalar(values[:, None]).square().sum(1) * places)[order.argsort()]


def hardest(m: nn.Module, b: Batch) -> Tensor:
    k = len(b[1]) - 1
    values, order = b[1].topk(k)
    found = m.scalar(values[:, None]).square().sum(1) + m.table(b[0][order]).sum((1, 2)).sin()
    return torch.zeros(k + 1).double().index_add(0, order, found)


def numbered_by_rank(m: nn.Module, b: Batch) -> Tensor:
    rank = b[1].argsort().argsort().clamp(max=N_ROWS - 1)
    return (m.table(rank) * m.table(b[0][:, 0])).square().sum(1)


def numbered_in_order(m: nn.Module, b: Batch) -> Tensor:
    order = torch.argsort(b[1])
    found = (m.table(order.clamp(max=N_ROWS - 1)) * m.table(b[0][order][:, 0])).square().sum(1)
    return found[order.argsort()]


def sorted_positions(m: nn.Module, b: Batch) -> Tensor:
    values, order = m.table(b[0]).sum(-1).sort(1)
    return (m.scalar(values[..., None]) + m.table(order.clamp(max=N_ROWS - 1))).square().sum((1, 2))


def where_a_mask_holds(m: nn.Module, b: Batch) -> Tensor:
    mask = b[0] > 1
    sample, position = mask.nonzero(as_tuple=True)
    again = torch.argwhere(mask)[:, 1]
    found = m.table(position.clamp(max=N_ROWS - 1)) * m.table(b[0][mask]) + m.table(again.clamp(max=N_ROWS - 1)).sin()
    return torch.zeros(len(mask)).double().index_add(0, sample, found.square().sum(1))


def packed(m: nn.Module, b: Batch) -> Tensor:
    """Sequences that are sorted by length, positions first."""
    length = b[0].shape[1]
    sizes = b[1].argsort().argsort() % length + 1
    rows = nn.utils.rnn.pack_padded_sequence(m.table(b[0].T), sizes, enforce_sorted=False)
    out, _ = nn.utils.rnn.pad_packed_sequence(m.recurrent(rows)[0], total_length=length)
    return out.square().sum((0, 2))


def shared_patches(m: nn.Module, b: Batch) -> Tensor:
    torch.manual_seed(1)
    kept = torch.rand(b[0].shape[1]).argsort()[:3]
    return (m.table(b[0])[:, kept] + m.places[kept]).square().sum((1, 2))


def against(m: nn.Module, b: Batch, negatives: Tensor) -> Tensor:
    """Look up words and negatives at once; the negatives are all samples'."""
    found = m.table(torch.cat([b[0][:, 0], negatives]))
    words, others = found[: len(b[0])], found[len(b[0]) :]
    x = m.scalar(b[1][:, None])
    return (x @ others.T).logsumexp(1) - 2 * (x * words).sum(1)


def with_negatives(m: nn.Module, b: Batch) -> Tensor:
    return against(m, b, torch.arange(len(b[0])).clamp(max=N_ROWS - 1))


def with_equal_negatives(m: nn.Module, b: Batch) -> Tensor:
    return against(m, b, torch.ones(len(b[0]), dtype=torch.int64))


def with_drawn_negatives(m: nn.Module, b: Batch) -> Tensor:
    torch.manual_seed(1)
    return against(m, b, torch.randint(N_ROWS, (len(b[0]),)))


def with_negatives_of_its_own(m: nn.Module, b: Batch) -> Tensor:
    torch.manual_seed(1)
    found = m.table(torch.cat([b[0][:, 0], torch.randint(N_ROWS, (len(b[0]),))]))
    return (m.scalar(b[1][:, None]) * found[: len(b[0])] * found[len(b[0]) :]).sum(1).sin()


RUNS: list[Run] = [
    *(distinct, distinct_in_a_row, distinct_rows, weighted_by_frequency),
    *(sorted_values, hardest, numbered_by_rank, numbered_in_order, sorted_positions, where_a_mask_holds),
    *(shared_patches, packed),
    *(with_negatives, with_equal_negatives, with_drawn_negatives, with_negatives_of_its_own),
]


def model(length: int) -> nn.Module:
    return Net(
        table=nn.Embedding(N_ROWS, 4),
        layer=nn.Linear(4, 4),
        scalar=nn.Linear(1, 4),
        recurrent=nn.GRU(4, 3),
        places=(length, 4),
    ).double()


@pytest.mark.parametrize("n_tokens", [2, 3, 4, N_ROWS])  # as many distinct ones as samples, or twice as many
@pytest.mark.parametrize(("n", "length"), [(2, 4), (3, 4), (4, 4), (5, 7), (6, 3)])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_shares_are_those_of_autograd(run: Run, n: int, length: int, n_tokens: int) -> None:
    torch.manual_seed(3)
    batch = (torch.randint(n_tokens, (n, length)), torch.randn(n).double())
    m = model(length)
    weight = torch.linspace(0.5, 2, n).double()
    shares = capture(m, batch, lambda m, b: run(m, b) @ weight, n=n).shares
    used = {name: p for name, p in m.named_parameters() if name in shares}
    assert used
    for name, g in per_sample_gradients(lambda i: run(m, batch)[i] * weight[i], n, used).items():
        torch.testing.assert_close(shares[name].dense(), g, msg=lambda text, name=name: f"{name}: {text}")


def test_distinct_values_that_meet_no_samples_are_named() -> None:
    torch.manual_seed(0)
    m, tokens = model(4), torch.tensor([[0, 1], [1, 2], [2, 3]])
    with pytest.raises(UnattributableError, match="the loss is computed from it by `embedding`"):
        capture(m, tokens, lambda m, x: m.table(torch.unique(x)).square().sum(), n=3)


def test_numbers_that_are_strung_along_the_axis_of_the_texts_are_the_samples() -> None:
    m = model(8)
    tokens, first = torch.randint(N_ROWS, (5, 7)), torch.zeros(5, 1, dtype=torch.int64)

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m.table(torch.cat([first, x], axis=1)).square().sum()

    shares = capture(m, tokens, loss, n=5).shares
    parts = torch.cat([first, tokens], 1)
    wanted = per_sample_gradients(lambda i: m.table(parts[i]).square().sum(), 5, {"": m.table.weight})
    torch.testing.assert_close(shares["table.weight"].dense(), wanted[""])


@pytest.mark.parametrize("drawn", [False, True])
def test_words_that_meet_nothing_but_negatives_are_named(drawn: bool) -> None:
    torch.manual_seed(0)
    m, words, listed = model(4), torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        found = m.table(torch.cat([x, torch.randint(N_ROWS, (3,)) if drawn else listed]))
        return (found[:3] @ found[3:].T).logsumexp(1).sum()

    with pytest.raises(UnattributableError, match=r"`table.weight`: the loss is computed from it"):
        capture(m, words, loss, n=3)


def test_noise_is_that_of_the_samples_also_beside_what_is_nobodys() -> None:
    m, tokens, drawn = model(7), torch.randint(N_ROWS, (5, 7)), []

    def losses(m: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
        distinct, back = torch.unique(x, return_inverse=True)
        return (m.table(distinct)[back].sum(1) * m.layer(noise)).square().sum(1)

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        drawn.append(torch.unique(x))  # before the draw
        drawn.append(torch.randn(5, 4, dtype=torch.float64))
        return losses(m, x, drawn[-1]).sum()

    shares = capture(m, tokens, loss, n=5).shares
    used = {name: p for name, p in m.named_parameters() if name in shares}
    assert len(used) == 3
    for name, g in per_sample_gradients(lambda i: losses(m, tokens, drawn[1])[i], 5, used).items():
        torch.testing.assert_close(shares[name].dense(), g)


@pytest.mark.parametrize("shared", [False, True])
def test_sorted_noise_is_that_of_the_samples_it_meets(shared: bool) -> None:
    """Times of the samples that were drawn in order, or a grid of times for all of them."""
    m, x = Net(layer=nn.Linear(1, 3)).double(), torch.randn(4, 3).double()

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        times = m.layer(torch.rand(4, 1).double().sort(0).values)
        return (x @ times.T).tanh().sum(1) if shared else (times * x).square().sum(1)

    shares = capture(m, x, lambda m, x: losses(m, x).sum()).shares
    for name, g in per_sample_gradients(lambda i: losses(m, x)[i], 4, dict(m.named_parameters())).items():
        torch.testing.assert_close(shares[name].dense(), g)

"""Parts of the batch: loops over samples, chunks, ragged lists. Whoever picks some of the samples is followed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gradtrace.capture.intake.batch import holds_one_each
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.placing.placement import UnattributableError
from tests.capture.test_attribution import N, Net, capture

Run = Callable[[nn.Module, Tensor], Tensor]


def net(m: nn.Module, x: Tensor) -> Tensor:
    return m.second(torch.tanh(m.first(x)))


def conv(m: nn.Module, x: Tensor) -> Tensor:
    return m.conv(x.flatten()[None])


PARTS: dict[str, Run] = {
    "loop": lambda m, x: torch.stack([net(m, one) for one in x]),
    "by number": lambda m, x: torch.stack([net(m, x[i]) for i in range(len(x))]),
    "backwards": lambda m, x: torch.stack([net(m, x[i]) for i in reversed(range(len(x)))]).flip(0),
    "slices of one": lambda m, x: torch.cat([net(m, x[i : i + 1]) for i in range(len(x))]),
    "halves": lambda m, x: torch.cat([net(m, x[: N // 2]), net(m, x[N // 2 :])]),
    "chunks": lambda m, x: torch.cat([net(m, part) for part in x.chunk(2)]),
    "split": lambda m, x: torch.cat([net(m, part) for part in x.split([1, N - 1])]),
    "unbound activations": lambda m, x: torch.stack([net(m, one) for one in m.before(x).unbind()]),
    "sums of loops": lambda m, x: torch.stack([net(m, one).sum() + m.bias.exp() for one in x]),
    "a layer that mixes a sample": lambda m, x: torch.stack([conv(m, one) for one in x]),
    "dot": lambda m, x: torch.stack([torch.dot(one.flatten()[:5], m.vector) for one in x]),
    "flipped": lambda m, x: net(m, torch.flip(x, dims=[0])),
    "flipped and back": lambda m, x: net(m, m.before(x.flip(0)).flip(0)),
    "rolled": lambda m, x: net(m, m.before(x).roll(1, 0)),
    "unlike treatment": lambda m, x: torch.stack([net(m, one) * (i + 1) for i, one in enumerate(x)])[
        torch.tensor([2, 0, 3, 1])
    ],
}

ORDERS = {"flipped": [3, 2, 1, 0], "rolled": [3, 0, 1, 2], "unlike treatment": [2, 0, 3, 1]}
"""Whose the rows of the output are."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return Net(
        before=nn.Linear(5, 5),
        first=nn.Linear(5, 6),
        second=nn.Linear(6, 3),
        conv=nn.Conv1d(1, 3, 2),
        bias=(),
        vector=(5,),
    ).double()


@pytest.mark.parametrize("positions", [None, 3, N])  # without positions, with some, and with as many as samples
@pytest.mark.parametrize("run", PARTS.values(), ids=PARTS.keys())
def test_parts_of_a_batch_belong_to_their_samples(run: Run, positions: int | None) -> None:
    m = model()
    x = torch.randn(N, *(() if positions is None else (positions,)), 5).double()
    weight = torch.linspace(0.5, 2, N).double()

    def losses(m: nn.Module, x: object) -> Tensor:
        return run(m, x).sin().reshape(N, -1).sum(1) * weight

    shares = capture(m, x, lambda m, x: losses(m, x).sum()).shares
    name = next(name for name, found in PARTS.items() if found is run)
    order = ORDERS.get(name, [0, 1, 2, 3])
    used = {name: p for name, p in m.named_parameters() if name in shares}
    assert used
    for name, g in per_sample_gradients(lambda i: losses(m, x)[order.index(i)], N, used).items():
        torch.testing.assert_close(shares[name].dense(), g, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("lengths", [(2, 5, 3, 1), (N, 3, 2 * N, 2), (3, 3, 3, 3)])
def test_lists_of_one_tensor_for_each_sample(lengths: tuple[int, ...], kind: type) -> None:
    m = model()
    batch = {"texts": kind(torch.randn(length, 5).double() for length in lengths), "y": torch.randn(N, 3).double()}

    def one(m: nn.Module, text: Tensor, y: Tensor) -> Tensor:
        return (net(m, text).mean(0) - y).square().sum()

    shares = capture(m, batch, lambda m, b: sum(one(m, t, y) for t, y in zip(b["texts"], b["y"], strict=True))).shares
    used = {name: p for name, p in m.named_parameters() if name in shares}
    expected = per_sample_gradients(lambda i: one(m, batch["texts"][i], batch["y"][i]), N, used)
    for name, g in expected.items():
        torch.testing.assert_close(shares[name].dense(), g)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ([torch.zeros(3, 5), torch.zeros(7, 5)], True),
        ([torch.zeros(3, 5), torch.zeros(3, 5)], True),
        ([torch.zeros(2, 5), torch.zeros(2, 5)], False),  # two fields of two samples
        ([torch.zeros(9, 2), torch.zeros(9, 2)], False),  # the same, positions first
        ([torch.zeros(2, 5), torch.zeros(2)], False),
        ([torch.zeros(3, 5), torch.zeros(7, 4)], False),
        ([torch.zeros(3, 5)], False),
        ([torch.zeros(3, 5), "text"], False),
        ([torch.zeros(1, 5, 4), torch.zeros(1, 3, 7)], True),  # images
        ([torch.zeros(3, 5, 4), torch.zeros(1, 5, 4)], True),
        ([torch.zeros(3, 5, 4), torch.zeros(1, 3, 7)], False),
        ((torch.zeros(9), torch.zeros(2)), False),  # texts that are strung together, and their lengths
        ([torch.zeros(9), torch.zeros(2)], True),  # two texts
    ],
)
def test_lists_of_fields_are_no_lists_of_samples(batch: Sequence[object], expected: bool) -> None:
    assert holds_one_each(batch, 2, is_whole=True) is expected
    assert not isinstance(batch, tuple) or holds_one_each(batch, 2)  # in a batch of other fields


@pytest.mark.parametrize("first", ["cut", "embedded"])
@pytest.mark.parametrize("lengths", [(4, 6, 5, 8, 6), (4, 6, 7), (5, 5, 5, 5, 5), (3, 9, 3), (2, 2, 7)], ids=str)
def test_texts_that_are_strung_together_and_cut_apart_again(lengths: tuple[int, ...], first: str) -> None:
    """A text may be as long as the samples are many, and there may be as many fields."""
    torch.manual_seed(0)
    n = len(lengths)
    model = Net(table=nn.Embedding(11, 7), out=nn.Linear(7, 3)).double()
    flat, targets = torch.randint(11, (sum(lengths),)), torch.arange(n) % 3

    def losses(m: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        flat, lengths, targets = batch
        texts = flat.split(lengths.tolist()) if first == "cut" else m.table(flat).split(lengths.tolist())
        each = [m.table(t) if first == "cut" else t for t in texts]
        return torch.stack([F.cross_entropy(m.out(t.tanh().mean(0)), targets[i]) for i, t in enumerate(each)])

    batch = flat, torch.tensor(lengths), targets
    try:
        shares = capture(model, batch, lambda m, b: losses(m, b).sum(), n=n).shares
    except UnattributableError as error:
        assert sum(lengths) % n == 0 and "can't attribute" in str(error)  # any factor may hold samples
        return
    for name, wanted in per_sample_gradients(
        lambda i: losses(model, batch)[i], n, dict(model.named_parameters())
    ).items():
        torch.testing.assert_close(shares[name].dense(), wanted)

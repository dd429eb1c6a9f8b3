"""What one look at the model leaves open is asked again: as in training, on other weights, in evaluation mode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gradtrace.capture.oracle import per_sample_gradients
from tests.capture.test_attribution import Net, capture

Losses = Callable[[nn.Module, Tensor], Tensor]
LENGTH, WIDTH = 12, 6
SIZES = [2, 3, 4, 6, 12]


def squares(y: Tensor) -> Tensor:
    return y.square().flatten(1).sum(1)


def deep_supervision(m: nn.Module, x: Tensor) -> Tensor:
    """In training the head sees all three layers, (layer, sample, ...), in evaluation the last one alone."""
    one = m.first(x)
    two = m.second(one.tanh())
    layers = [one, two, m.third(two.tanh())]
    if not m.training:
        return squares(m.head(layers[-1]))
    return m.head(torch.stack(layers)).square().sum((0, 2, 3))


def another_layout(m: nn.Module, x: Tensor) -> Tensor:
    y = m.first(x)
    return squares(m.head(y.transpose(0, 1)).transpose(0, 1) if m.training else m.head(y))


def another_function(m: nn.Module, x: Tensor) -> Tensor:
    """A product with one-hot codes in training, a look-up in evaluation."""
    y = m.first(x)
    nearest = torch.cdist(y, m.codes.detach()[None]).argmin(-1)
    found = F.one_hot(nearest, len(m.codes)).to(y) @ m.codes if m.training else F.embedding(nearest, m.codes)
    return squares(m.head(found + y))


def zeros_first(m: nn.Module, x: Tensor) -> Tensor:
    """What comes of a layer that begins with zeros is the same along all axes."""
    y = m.first(x)
    return squares(m.head(y * (1 + m.scale * (y @ m.zeros).tanh())))


def frozen_positions(m: nn.Module, x: Tensor) -> Tensor:
    """A class token with a frozen position, expanded over the batch."""
    token = (m.token + m.frozen[:, :1]).expand(len(x), -1, -1)
    return squares(m.head(torch.cat([token, m.first(x) + m.frozen[:, 1:]], 1)))


def even_attention(m: nn.Module, x: Tensor) -> Tensor:
    """All positions are nearly the same, in any order."""
    y = m.first(x)
    weights = (y @ (1e-6 * y).mT).softmax(-1)
    return squares(m.head((weights @ y).reshape(len(x) * 2, LENGTH // 2, -1)).unflatten(0, (-1, 2)).flatten(1)[:, None])


def rotated(m: nn.Module, x: Tensor) -> Tensor:
    """Halves of the features are taken, as many as there are samples, and joined again."""
    y = m.first(x)
    a, b = y[..., : WIDTH // 2], y[..., WIDTH // 2 :]
    return squares(m.head(torch.cat([-b, a], -1) + y))


def even_shares(m: nn.Module, x: Tensor) -> Tensor:
    """The largest features, as many as there are samples, are divided by their sum."""
    largest = m.first(x).flatten(0, 1).softmax(-1).topk(2, -1).values
    return squares(m.pair((largest / largest.sum(-1, keepdim=True)).view(len(x), -1, 2)))


def first_of_each(m: nn.Module, x: Tensor) -> Tensor:
    """Words of a batch whose positions come first, as many as there are samples."""
    words = (x[..., 0] * 9).long().remainder(WIDTH).t()
    return squares(m.codes[words[0]]) + squares(m.first(x))


def sorted_by_name(m: nn.Module, x: Tensor) -> Tensor:
    """Arguments by their names, and a number that is sorted all alone."""
    y = m.first(x)
    values = torch.sort(input=y, dim=-1).values + torch.topk(input=y, k=1, dim=-1).values
    return squares(m.head(values)) + y.sum().sort(dim=-1).values.detach() * 0


RUNS: list[Losses] = [
    *(deep_supervision, another_layout, another_function, zeros_first, frozen_positions),
    *(even_attention, rotated, even_shares, first_of_each),
]


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = {name: nn.Linear(WIDTH, WIDTH) for name in ("first", "second", "third")}
    found = Net(
        **layers,
        head=nn.Linear(WIDTH, 3),
        pair=nn.Linear(2, 3),
        codes=(WIDTH, WIDTH),
        zeros=(WIDTH, WIDTH),
        scale=(),
        token=(1, 1, WIDTH),
        frozen=(1, LENGTH + 1, WIDTH),
    ).double()
    nn.init.zeros_(found.zeros)
    found.frozen.requires_grad_(False)
    return found


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_shares_are_those_of_autograd(run: Losses, n: int) -> None:
    m, x = model(), torch.randn(n, LENGTH, WIDTH).double()
    weights = torch.linspace(0.5, 2, n).double()
    shares = capture(m, x, lambda m, x: run(m, x) @ weights, n=n).shares
    used = {name: p for name, p in m.named_parameters() if name in shares and p.requires_grad}
    assert len(used) >= 2
    for name, wanted in per_sample_gradients(lambda i: run(m, x[i : i + 1]).sum() * weights[i], n, used).items():
        torch.testing.assert_close(shares[name].dense(), wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("std", [0.02, 0.2])
def test_a_deep_network_with_batch_norm_lets_something_through_in_training(std: float, n: int) -> None:
    torch.manual_seed(0)
    blocks = [[nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()] for _ in range(10)]
    m = nn.Sequential(*[layer for block in blocks for layer in block], nn.Flatten(), nn.Linear(4 * 16, 2)).double()
    for layer in m:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=std)
    x, twin = torch.randn(n, 4, 4, 4).double(), copy.deepcopy(m)
    twin(x)
    assert len(capture(m, x, lambda m, x: m(x).square().sum(), n=n).shares) == len(list(m.parameters()))
    for (name, now), then in zip(m.named_buffers(), twin.buffers(), strict=True):  # statistics are those of one step
        assert torch.equal(now, then), name

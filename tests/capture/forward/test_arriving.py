"""What is written into a result of a use, of any kind, leaves the cotangent that the use had."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.placing.placement import UnattributableError
from tests.capture.test_attribution import Net, capture

N, LENGTH, WIDTH = 4, 6, 5


def divided(q: Tensor) -> Tensor:
    q /= 2.0
    return q


def first_set(q: Tensor) -> Tensor:
    q[:, 0] = 0.0
    return q


def part_scaled(q: Tensor) -> Tensor:
    q[..., 1:3].mul_(3)
    return q


def twice(q: Tensor) -> Tensor:
    q += 1
    return torch.relu_(q)


def read_before(q: Tensor) -> Tensor:
    before = q * 1
    return before + q.sigmoid_()


def stacked(q: Tensor) -> Tensor:
    """Its cotangent begins in the middle of a tensor."""
    return torch.stack([q * 1, q.relu_(), q])[1:].sum(0)


def joined(q: Tensor) -> Tensor:
    return torch.cat([q.detach() * 2, q.mul_(2), q.detach()], 0)[len(q) : 2 * len(q)]


WRITES: list[Callable[[Tensor], Tensor]] = [divided, first_set, part_scaled, twice, read_before, stacked, joined]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(N, WIDTH), (N, LENGTH, WIDTH), (LENGTH, N, WIDTH)], ids=str)
@pytest.mark.parametrize("adds", [False, True], ids=["linear", "added in place"])
def test_what_is_written_into_a_result(
    shape: tuple[int, ...], bias: bool, adds: bool, write: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    model, axis = Net(first=nn.Linear(WIDTH, 7, bias=bias), offset=(7,), out=nn.Linear(7, 2)).double(), shape.index(N)

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        q = m.first(x)
        if adds:
            q += m.offset  # a use in place of a view
        return m.out(write(q).tanh()).square().movedim(axis, 0).flatten(1).sum(1)

    x = torch.randn(shape, dtype=torch.float64)
    shares = capture(model, x, lambda m, x: losses(m, x).sum(), n=N).shares
    for name, wanted in per_sample_gradients(
        lambda i: losses(model, x)[i], N, {n: p for n, p in model.named_parameters() if adds or n != "offset"}
    ).items():
        torch.testing.assert_close(shares[name].dense(), wanted)


def as_real(q: Tensor, factor: Tensor) -> Tensor:
    return torch.view_as_real(torch.fft.rfft(q)).mul_(factor)


def real_part(q: Tensor, factor: Tensor) -> Tensor:
    c = torch.fft.rfft(q)
    c.real.mul_(factor)
    return torch.view_as_real(c)


def conjugated(q: Tensor, factor: Tensor) -> Tensor:
    return torch.view_as_real(torch.fft.rfft(q).conj().mul_(factor).resolve_conj())


@pytest.mark.parametrize("write", [as_real, real_part, conjugated], ids=lambda write: write.__name__)
def test_views_of_other_numbers_than_those_of_their_base(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Net(first=nn.Linear(WIDTH, 7), factor=()).double()

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        return write(m.first(x), m.factor + 2).tanh().flatten(1).sum(1)

    x = torch.randn(N, WIDTH, dtype=torch.float64)
    try:
        shares = capture(model, x, lambda m, x: losses(m, x).sum(), n=N).shares
    except UnattributableError as error:  # the hook of a view that is written into, see above
        assert write is real_part and "don't add up" in str(error)
        return
    for name, wanted in per_sample_gradients(lambda i: losses(model, x)[i], N, dict(model.named_parameters())).items():
        torch.testing.assert_close(shares[name].dense(), wanted)

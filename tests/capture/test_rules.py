"""Every rule, and the general rule, on uses that the models of cases.py don't make; compared with the oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gradtrace.capture.engine import MicroBatch, TapeEngine
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.placement import UnattributableError
from lightning_gradtrace.capture.probe import PermutationProbe
from lightning_gradtrace.capture.rules import registered

N = 3

# name: (makes the module, makes the input, axis of the samples in the input)
USES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "linear, rows only": (lambda: nn.Linear(4, 5), lambda: torch.randn(N, 4), 0),
    "linear, four axes": (lambda: nn.Linear(4, 5), lambda: torch.randn(N, 2, 5, 4), 0),
    "linear, samples third": (lambda: _Third(nn.Linear(4, 5)), lambda: torch.randn(N, 2, 5, 4), 0),
    "linear, no bias": (lambda: nn.Linear(4, 5, bias=False), lambda: torch.randn(N, 7, 4), 0),
    "embedding, rows only": (lambda: nn.Embedding(9, 4), lambda: torch.randint(9, (N,)), 0),
    "embedding, repeated and padded": (
        lambda: nn.Embedding(4, 5, padding_idx=-1),
        lambda: torch.randint(4, (N, 8)),
        0,
    ),
    "layer norm, two feature axes": (lambda: nn.LayerNorm((4, 5)), lambda: torch.randn(N, 2, 4, 5), 0),
    "layer norm, no bias": (lambda: nn.LayerNorm(4, bias=False), lambda: torch.randn(7, N, 4), 1),
    "general rule: prelu": (lambda: nn.PReLU(4), lambda: torch.randn(N, 4, 5), 0),
    "general rule: convolution": (lambda: nn.Conv1d(4, 5, 2), lambda: torch.randn(N, 4, 7), 0),
    "general rule: bilinear": (lambda: _Twice(nn.Bilinear(4, 4, 5)), lambda: torch.randn(N, 4), 0),
    "general rule: group norm": (lambda: nn.GroupNorm(2, 4), lambda: torch.randn(N, 4, 5), 0),
    "general rule: einsum of a bare parameter": (lambda: _Heads(), lambda: torch.randn(N, 5, 4), 0),
    "derived: transposed matrix": (lambda: _Transposed(), lambda: torch.randn(N, 5, 4), 0),
    "derived: blocks of rows": (lambda: _Blocks(), lambda: torch.randn(N, 5, 4), 0),
    "derived: product of two parameters": (lambda: _LowRank(), lambda: torch.randn(N, 5, 4), 0),
    "derived: weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)),
        lambda: torch.randn(N, 7, 4),
        0,
    ),
    "attention, other key and value widths": (lambda: _Attention(kdim=6, vdim=2), lambda: torch.randn(N, 5, 4), 0),
}


class _Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.cos())


class _Third(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(0, 2))


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bpd,hde->bphe", x, self.W)


class _Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W.T)


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(6, 4))
        self.b = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        (w1, w2), (b1, b2) = self.W.split([2, 4]), self.b.split([2, 4])
        return torch.cat([F.linear(x, w1, b1).cos(), F.linear(x, w2, b2).sin()], -1)


class _LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 5)
        self.A, self.B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.B @ self.A, self.base.bias)


class _Attention(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        key, value = torch.cat([x, x[..., :2]], -1), x[..., 2:].cos()
        return self.attention(x, key, value, need_weights=True)[0]


def capture(model: nn.Module, x: Tensor, axis: int = 0) -> MicroBatch:
    engine, parameters = TapeEngine(), dict(model.named_parameters())
    tape = engine.tape(parameters)
    with tape:
        loss = model(x).square().sum()
    loss.backward()
    return engine.collect(tape, N, PermutationProbe(model, parameters, model, x, N, axis))


@pytest.mark.parametrize("name", USES)
def test_shares_equal_the_oracle(name: str) -> None:
    torch.manual_seed(0)
    build, draw, axis = USES[name]
    model, x = build().double(), draw()
    x = x.double() if x.is_floating_point() else x
    micro_batch = capture(model, x, axis)

    def contribution(i: int) -> Tensor:
        return model(x.narrow(axis, i, 1)).square().sum()

    expected = per_sample_gradients(contribution, N, dict(model.named_parameters()))
    assert set(micro_batch.shares) == set(expected)
    for parameter, gradients in expected.items():
        share = micro_batch.shares[parameter]
        torch.testing.assert_close(share.dense(), gradients, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(share.dense(slice(1, 2)), gradients[1:2], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(share.total(), gradients.sum(0), rtol=1e-10, atol=1e-12)


def test_embedding_scaled_by_frequency_adds_up_to_its_gradient() -> None:
    """With `scale_grad_by_freq` samples are coupled; the share is that of the decomposition (docs/concepts.md, 2)."""
    torch.manual_seed(0)
    model = nn.Embedding(5, 3, scale_grad_by_freq=True).double()
    micro_batch = capture(model, torch.randint(5, (N, 7)))
    torch.testing.assert_close(micro_batch.shares["weight"].total(), model.weight.grad)


def test_half_precision_shares_are_summed_in_single_precision() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 6).bfloat16(), torch.randn(N, 9, 8).bfloat16()
    share = capture(model, x).shares["weight"]
    assert share.dense().dtype == torch.float32
    torch.testing.assert_close(share.total(), model.weight.grad.float(), rtol=2e-2, atol=2e-1)


def test_what_the_general_rule_can_not_run_is_named() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.token.expand(N, 4)], -1)

    with pytest.raises(UnattributableError, match=r"can't attribute `token`: use 0 \(`cat` of `token`\) has no closed"):
        capture(Strange(), torch.randn(N, 4))


def test_every_rule_is_exercised() -> None:
    names = {function.__name__ for function in registered()}
    assert names <= {use.split(",")[0].replace(" ", "_") for use in USES}, "add the new rule's uses to USES"

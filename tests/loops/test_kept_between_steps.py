"""Models that keep something from step to step: the probe begins with what they kept when the step began."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradtrace import GradTrace
from lightning_gradtrace.capture.oracle import per_sample_gradients
from tests.compatibility.cells import Kept
from tests.loops import losses
from tests.loops.models import check_nothing_left, fit

LENGTH, WIDTH = 4, 6


class Keeping(nn.Module):
    """Returns the losses of the samples of a batch of shape (sample, position, feature)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.first, self.last = nn.Linear(WIDTH, n), nn.Linear(n, 1)  # as wide as there are samples
        self.middle = nn.Parameter(torch.randn(n, n))

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.change(self.first(x)) @ self.middle).tanh()).square().mean((1, 2))

    def change(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class Recurrent(Keeping):
    """Goes on with the hidden state of the text before, place by place."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.cells = nn.LSTM(n, n, batch_first=True)
        self.hidden: tuple[Tensor, ...] | None = None

    def change(self, h: Tensor) -> Tensor:
        found, hidden = self.cells(h, self.hidden)
        self.hidden = tuple(one.detach() for one in hidden)
        return found


class Remembering(Keeping):
    """Attends to the text before as well, as Transformer-XL does."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.memories: list[Tensor] = []
        self.attention = nn.MultiheadAttention(n, 1, batch_first=True)

    def change(self, h: Tensor) -> Tensor:
        seen = torch.cat([*self.memories, h], 1)
        self.memories = [h.detach()]
        return self.attention(h, seen, seen, need_weights=False)[0]


class Buffered(Keeping):
    """Keeps a state in a buffer, which it assigns."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.register_buffer("state", torch.zeros(n, n))

    def change(self, h: Tensor) -> Tensor:
        h = h + self.middle.exp()[0] * self.state[: len(h), None]
        self.state = h.detach().mean(1)
        return h


class Alternating(Keeping):
    """Works on features of every position in one step, and of every sample in the next."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.count = 0
        self.across = nn.Linear(LENGTH, LENGTH)

    def change(self, h: Tensor) -> Tensor:
        self.count += 1
        return h if self.count % 2 else self.across(h.mT).mT


class Codes(Keeping):
    """Looks up the nearest code; codes follow what is looked up, and at first all go to one."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.register_buffer("codes", torch.randn(7, n))
        self.register_buffer("counts", torch.zeros(7))

    def change(self, h: Tensor) -> Tensor:
        flat = h.detach().reshape(-1, self.n)
        chosen = (flat.square().sum(1, keepdim=True) - 2 * flat @ self.codes.T + self.codes.square().sum(1)).argmin(1)
        found = F.embedding(chosen.view(h.shape[:2]), self.codes)
        which = F.one_hot(chosen, 7).to(h)
        self.counts.mul_(0.9).add_(which.sum(0), alpha=0.1)
        self.codes.data.copy_((0.9 * self.codes + 0.1 * which.T @ flat) / (self.counts + 1e-5)[:, None])
        return h + (found - h).detach()


class Attacked(Keeping):
    """Moves its inputs by a gradient first, with a backward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            moved = x.clone().requires_grad_()
            super().forward(moved).sum().backward(inputs=[moved])
        return super().forward((x + 0.1 * moved.grad.sign()).detach())

    def change(self, h: Tensor) -> Tensor:
        return h


class Recording(Keeping):
    """Sets up hooks in the first pass, as recorders of hidden states do, and counts on what they record."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.seen: list[Tensor] = []
        self.ready = False

    def change(self, h: Tensor) -> Tensor:
        if not self.ready:
            self.ready = True
            self.last.register_forward_pre_hook(self.record)
        found, self.seen = self.seen, []
        assert len(found) <= 1, "recorded twice"
        return h

    def record(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen.append(args[0].detach())


class Training(losses.Training):
    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).sum()


class Oracle(pl.Callback):
    """Takes the gradient of the loss of each sample before the step, each from a copy of the model."""

    def __init__(self) -> None:
        self.shares: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        shares = []
        for i in range(len(batch[0])):
            net = copy.deepcopy(pl_module.net)
            loss = net(batch[0])[i]
            shares.append(per_sample_gradients(lambda _, loss=loss: loss, 1, dict(net.named_parameters())))
        self.shares.append({name: torch.cat([share[name] for share in shares]) for name in shares[0]})


@pytest.mark.filterwarnings("ignore:.*took no part in the loss")
@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", [Recurrent, Remembering, Buffered, Alternating, Codes, Attacked, Recording])
def test_shares_are_exact_and_training_is_unchanged(tmp_path: Path, kind: type[Keeping], n: int) -> None:
    torch.manual_seed(0)
    net = kind(n).double()
    loader = DataLoader(TensorDataset(torch.randn(4 * n, LENGTH, WIDTH).double()), batch_size=n)
    plain, traced = Training(copy.deepcopy(net)), Training(net)
    fit(plain, loader=loader, max_epochs=1)
    oracle, kept = Oracle(), Kept()
    trace = GradTrace(tmp_path / "a.zarr", record=kept, params="*", quantity="gradient", ledger_every_n_steps=1)
    trainer = fit(traced, trace, oracle, loader=loader, max_epochs=1)
    assert len(net.last._forward_pre_hooks) == (kind is Recording)
    net.last._forward_pre_hooks.clear()
    check_nothing_left(traced, trainer)
    for (name, a), b in zip(plain.state_dict().items(), traced.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert len(kept.shares) == len(oracle.shares) == 4
    for found, expected in zip(kept.shares, oracle.shares, strict=True):
        for name, wanted in expected.items():
            share = found.get(f"net.{name}", torch.zeros_like(wanted))
            torch.testing.assert_close(share, wanted, msg=lambda text, name=name: f"{name}: {text}")

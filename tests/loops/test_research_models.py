"""Steps as models of research packages make them, in small: every share is the oracle's, training is as it was."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from tests.loops.losses import check

LENGTH, WIDTH, N_BATCHES = 6, 8, 3

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @torch.jit.script
    def scripted(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class OfTexts(nn.Module):
    """Reads a batch of texts (sample, position, feature) with their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        h = self.change(self.first(batch["x"]), batch["length"])
        return self.last(h).square().flatten(1).mean(1)

    def change(self, h: Tensor, lengths: Tensor) -> Tensor:
        raise NotImplementedError


class LastState(OfTexts):
    """Uses the last state alone of a recurrent layer, as classifiers of texts do."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def change(self, h: Tensor, lengths: Tensor) -> Tensor:
        return self.cells(h)[1][0][0]


class PackedWithState(LastState):
    """Packs texts of unlike lengths, with an initial state for each, as a temporal fusion transformer does."""

    is_sorted = False

    def change(self, h: Tensor, lengths: Tensor) -> Tensor:
        state = h.mean(1)[None]
        packed = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=self.is_sorted)
        packed, state = self.cells(packed, (state, state.tanh()))
        seen = F.glu(torch.cat([pad_packed_sequence(packed, batch_first=True)[0]] * 2, -1), -1)
        return torch.cat([seen, state[0].transpose(0, 1)], 1)


class PackedLongestFirst(PackedWithState):
    """Asks that texts come by falling lengths; then samples can't be put in any other order."""

    is_sorted = True


class Ghosts(OfTexts):
    """Normalises parts of the batch by themselves, as TabNet does; in evaluation mode, where samples are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH).requires_grad_(False)

    def change(self, h: Tensor, lengths: Tensor) -> Tensor:
        self.norm.eval()
        return torch.cat([self.norm(part) for part in h.mean(1).chunk(2)])


class Inside(OfTexts):
    """Picks from a parameter that was expanded over the batch by a mask, as splines of flows do inside their bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.knots = nn.Parameter(torch.randn(WIDTH, 5))

    def change(self, h: Tensor, lengths: Tensor) -> Tensor:
        h = h.mean(1)
        inside = h.abs() < 0.3
        knots = self.knots.expand(len(h), WIDTH, 5)
        out = h.clone()
        out[inside] = F.softmax(knots[inside, :], -1)[:, 0] * h[inside]
        return out


class Scripted(OfTexts):
    """Passes activations through a function of TorchScript."""

    def change(self, h: Tensor, lengths: Tensor) -> Tensor:
        return scripted(h)


class Vectorised(OfTexts):
    """Takes all rows of a Jacobian in one backward pass, and does not learn through it."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.enable_grad():
            x = batch["x"].mean(1).requires_grad_()
            y = self.first(x).tanh()
            rows = torch.eye(WIDTH, dtype=x.dtype).unsqueeze(1).expand(WIDTH, *y.shape)
            (jacobian,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
        return (self.last(y)[:, 0] + jacobian.square().sum((0, 2))).square()


class Even(OfTexts):
    """Divides by a learned number in every row that a mask picks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def change(self, h: Tensor, lengths: Tensor) -> Tensor:
        there = torch.arange(LENGTH) < lengths[:, None]
        out = torch.zeros_like(h)
        out[there] = h[there] / self.scale + self.scale / (2 + h[there].square())
        return out


def items(n: int, longest_first: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, LENGTH + 1, (N_BATCHES, n), generator=generator)
    lengths[:, 0] = LENGTH
    lengths = lengths.sort(descending=True).values if longest_first else lengths
    x = torch.randn(N_BATCHES * n, LENGTH, 3, generator=generator).double()
    return [{"x": one, "length": length} for one, length in zip(x, lengths.flatten(), strict=True)]


KINDS = [LastState, PackedWithState, PackedLongestFirst, Ghosts, Inside, Scripted, Vectorised, Even]


@pytest.mark.filterwarnings("ignore:.*took no part in the loss")
@pytest.mark.parametrize("n", [3, 4, 6, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_exact_and_training_is_unchanged(tmp_path: Path, kind: type[OfTexts], n: int) -> None:
    torch.manual_seed(0)
    data = items(n, kind is PackedLongestFirst)
    check(kind(), lambda: DataLoader(data, batch_size=n), tmp_path)


class Experts(OfTexts):
    """Sends each position to two of as many experts as there are samples, one after the other, as litgpt does."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.gate, self.n = nn.Linear(WIDTH, n), n
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(n))

    def change(self, h: Tensor, lengths: Tensor) -> Tensor:
        x = h.flatten(0, 1)
        weights, chosen = self.gate(x).topk(2)
        masks = (chosen.unsqueeze(-1) == torch.arange(self.n)).permute(2, 0, 1)
        y = torch.zeros_like(x)
        for mask, expert in zip(masks, self.experts, strict=True):
            token, choice = torch.where(mask)
            y[token] += weights.softmax(-1)[token, choice, None] * expert(x[token])
        return y.view_as(h)


@pytest.mark.filterwarnings("ignore:.*took no part in the loss")
@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_experts_that_are_as_many_as_the_samples(tmp_path: Path, n: int) -> None:
    torch.manual_seed(0)
    check(Experts(n), lambda: DataLoader(items(n, False), batch_size=n), tmp_path)


class Spikes(OfTexts):
    """Subtracts a learned threshold where a neuron fires: nowhere, or everywhere."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.threshold, self.level = nn.Parameter(torch.tensor(0.8)), level

    def change(self, h: Tensor, lengths: Tensor) -> Tensor:
        h = h.mean(1)
        return h - (h > self.level).to(h) * self.threshold


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("level", [-1e3, 0.0, 1e3])
def test_neurons_that_never_or_always_fire(tmp_path: Path, level: float, n: int) -> None:
    torch.manual_seed(0)
    check(Spikes(level), lambda: DataLoader(items(n, False), batch_size=n), tmp_path)

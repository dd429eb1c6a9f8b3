"""Mixtures of experts with room for so many tokens each: whose a slot is depends on the tokens before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradtrace.capture.placing.placement import UnattributableError
from tests.loops.losses import check

LENGTH, WIDTH, N_EXPERTS, ROOM = 5, 8, 3, 3


class Experts(nn.Module):
    """Classifies texts; the tokens that find no room go on as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(6, WIDTH), nn.Linear(WIDTH, N_EXPERTS)
        self.up = nn.Parameter(torch.randn(N_EXPERTS, WIDTH, WIDTH) / 3)
        self.bias = nn.Parameter(torch.randn(N_EXPERTS, 1, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(N_EXPERTS, WIDTH, WIDTH) / 3)
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        h = self.first(batch[0])
        tokens = h.flatten(0, 1)
        chance, expert = self.router(tokens).softmax(-1).max(-1)
        chosen = F.one_hot(expert, N_EXPERTS)
        slot = ((chosen.cumsum(0) - 1) * chosen).sum(-1)
        new = self.mixed(tokens, chance, expert, slot).unflatten(0, (-1, LENGTH))
        return (self.last(self.norm(h + new))[..., 0].mean(1) - batch[1]).square()

    def think(self, slots: Tensor) -> Tensor:
        """Let all experts work, on slots of shape (expert, slot, feature)."""
        return torch.relu(slots @ self.up + self.bias) @ self.down

    def mixed(self, tokens: Tensor, chance: Tensor, expert: Tensor, slot: Tensor) -> Tensor:
        raise NotImplementedError


def table(tokens: Tensor, expert: Tensor, slot: Tensor) -> Tensor:
    places = F.one_hot(slot.clamp(max=ROOM - 1), ROOM) * (slot < ROOM)[:, None]
    return (F.one_hot(expert, N_EXPERTS)[:, :, None] * places[:, None]).to(tokens)


class ByTable(Experts):
    """Sends tokens by products with a table (Mesh TensorFlow, GShard, DeepSpeed)."""

    def mixed(self, tokens: Tensor, chance: Tensor, expert: Tensor, slot: Tensor) -> Tensor:
        there = table(tokens, expert, slot)
        slots = torch.einsum("tes,td->esd", there, tokens)
        return torch.einsum("tes,esd->td", there * chance[:, None, None], self.think(slots))


class OneByOne(Experts):
    """Lets the experts work one after the other."""

    def mixed(self, tokens: Tensor, chance: Tensor, expert: Tensor, slot: Tensor) -> Tensor:
        there = table(tokens, expert, slot).flatten(1)
        slots = (there.T @ tokens).unflatten(0, (N_EXPERTS, ROOM))
        of_all = zip(slots.unbind(0), self.up, self.bias, self.down, strict=True)
        done = torch.stack([torch.relu(one @ up + bias) @ down for one, up, bias, down in of_all])
        return (there * chance[:, None]) @ done.flatten(0, 1)


class Written(Experts):
    """Writes tokens into slots, and reads them back."""

    def mixed(self, tokens: Tensor, chance: Tensor, expert: Tensor, slot: Tensor) -> Tensor:
        stays = slot < ROOM
        place = (expert * ROOM + slot)[stays]
        done = self.think(self.write(tokens, stays, place).unflatten(0, (N_EXPERTS, ROOM))).flatten(0, 1)
        out = torch.zeros_like(tokens)
        out[stays] = done[place] * chance[stays, None]
        return out

    def write(self, tokens: Tensor, stays: Tensor, place: Tensor) -> Tensor:
        slots = tokens.new_zeros(N_EXPERTS * ROOM, WIDTH)
        slots[place] = tokens[stays]
        return slots


class Added(Written):
    """Adds them to zeros."""

    def write(self, tokens: Tensor, stays: Tensor, place: Tensor) -> Tensor:
        return tokens.new_zeros(N_EXPERTS * ROOM, WIDTH).index_add(0, place, tokens[stays])


class ExpertByExpert(Written):
    """Writes the tokens of every expert by themselves."""

    def mixed(self, tokens: Tensor, chance: Tensor, expert: Tensor, slot: Tensor) -> Tensor:
        slots = tokens.new_zeros(N_EXPERTS, ROOM, WIDTH)
        for e in range(N_EXPERTS):
            mine = (expert == e) & (slot < ROOM)
            self.fill(slots, e, slot[mine], tokens[mine])
        done, stays = self.think(slots), slot < ROOM
        out = torch.zeros_like(tokens)
        out[stays] = done[expert[stays], slot[stays]] * chance[stays, None]
        return out

    def fill(self, slots: Tensor, e: int, places: Tensor, tokens: Tensor) -> None:
        slots[e, places] = tokens


class ThroughViews(ExpertByExpert):
    """Writes into views of the slots; what comes of these is not followed."""

    def fill(self, slots: Tensor, e: int, places: Tensor, tokens: Tensor) -> None:
        slots[e][places] = tokens


class Scattered(Experts):
    """Has one more slot, for those who find no room."""

    def mixed(self, tokens: Tensor, chance: Tensor, expert: Tensor, slot: Tensor) -> Tensor:
        place = torch.where(slot < ROOM, expert * ROOM + slot, N_EXPERTS * ROOM)
        slots = tokens.new_zeros(N_EXPERTS * ROOM + 1, WIDTH).scatter(0, place[:, None].expand(-1, WIDTH), tokens)
        done = self.think(slots[:-1].view(N_EXPERTS, ROOM, WIDTH)).view(-1, WIDTH)
        return torch.cat([done, done.new_zeros(1, WIDTH)])[place] * (chance * (slot < ROOM))[:, None]


class Choosing(Experts):
    """Lets every expert choose its tokens."""

    def mixed(self, tokens: Tensor, chance: Tensor, expert: Tensor, slot: Tensor) -> Tensor:
        chances, chosen = self.router(tokens).softmax(-1).T.topk(ROOM, -1)
        done = self.think(tokens[chosen]) * chances[..., None]
        return torch.zeros_like(tokens).index_add(0, chosen.flatten(), done.flatten(0, 1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [ByTable, OneByOne, Written, Added, ExpertByExpert, Scattered, Choosing])
def test_every_token_belongs_to_its_sample(tmp_path: Path, kind: type[Experts], seed: int) -> None:
    """No other size is that of the batch: what finds room depends on the order of the samples, so no probe helps."""
    torch.manual_seed(seed)
    texts = TensorDataset(torch.randn(12, LENGTH, 6).double(), torch.randn(12).double())
    check(kind(), lambda: DataLoader(texts, batch_size=4), tmp_path)


def test_slots_that_are_filled_through_views_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    texts = TensorDataset(torch.randn(12, LENGTH, 6).double(), torch.randn(12).double())
    with pytest.raises(UnattributableError, match=r"can't attribute `net.up`"):
        check(ThroughViews(), lambda: DataLoader(texts, batch_size=4), tmp_path)

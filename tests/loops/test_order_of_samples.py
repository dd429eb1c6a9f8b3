"""A collate function that gives the samples another order would give shares to the wrong ids: it is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

from lightning_gradtrace import GradTrace, TopK, open_trace
from tests.loops.losses import Training
from tests.loops.models import fit

LONGER = [torch.arange(1, n + 1) * (i + 1) for i, n in enumerate((2, 5, 3, 4, 1, 6))]


def padded(items: list[Any]) -> Tensor:
    return pad_sequence([torch.as_tensor(item) for item in items], batch_first=True)


def by_length(items: list[Any]) -> Tensor:
    items.sort(key=len, reverse=True)
    return padded(items)


def packed_by_length(items: list[Tensor]) -> tuple[Tensor, PackedSequence]:
    items.sort(key=len, reverse=True)
    return torch.zeros(len(items)), pack_sequence(items)


def of_tokenizer(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    labels = [item.pop("label") for item in sorted(items, key=lambda item: -len(item["input_ids"]))]
    items.sort(key=lambda item: -len(item["input_ids"]))
    return {"input_ids": padded([item["input_ids"] for item in items]), "labels": torch.tensor(labels)}


def beside_a_roll(items: list[Tensor]) -> tuple[Tensor, Tensor]:
    return padded(items).roll(1, 0), padded(items)


class Embedded(nn.Module):
    """Embeds words, however they come."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 4)

    def forward(self, batch):
        words = batch["input_ids"] if isinstance(batch, dict) else batch[-1] if isinstance(batch, tuple) else batch
        words = pad_packed_sequence(words, batch_first=True)[0] if isinstance(words, PackedSequence) else words
        return self.table(words).square().flatten(1).mean(1)


TOKENS = [{"input_ids": text.tolist(), "label": 1} for text in LONGER]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("data", "collate"),
    [(LONGER, by_length), (LONGER, packed_by_length), (TOKENS, of_tokenizer)],
    ids=["sorted", "packed", "tokenizer"],
)
def test_a_collate_function_that_sorts_is_refused(data: Any, collate: Any, workers: int, tmp_path: Path) -> None:
    load = DataLoader(copy.deepcopy(data), batch_size=3, collate_fn=collate, num_workers=workers)
    trace = GradTrace(tmp_path / "a.zarr", TopK(10), params="*")
    with pytest.raises(ValueError, match=r"gives the samples of a batch another order: number 0 .* stands in slot 2"):
        fit(Training(Embedded()), trace, loader=load, max_epochs=1)
    assert load.collate_fn is collate


@pytest.mark.parametrize("collate", [padded, beside_a_roll])
def test_a_collate_function_that_keeps_the_order_is_taken(collate: Any, tmp_path: Path) -> None:
    load = DataLoader(LONGER, batch_size=3, collate_fn=collate)
    fit(Training(Embedded()), GradTrace(tmp_path / "a.zarr", TopK(10), params="*"), loader=load, max_epochs=1)
    assert open_trace(tmp_path / "a.zarr").attrs["complete"]
    assert load.collate_fn is collate


def test_a_training_that_must_go_on_is_not_stopped_by_the_order(tmp_path: Path) -> None:
    load = DataLoader([text.clone() for text in LONGER], batch_size=3, collate_fn=by_length)
    trace = GradTrace(tmp_path / "a.zarr", TopK(10), params="*", on_error="disable")
    trainer = fit(Training(Embedded()), trace, loader=load, max_epochs=1)
    assert trainer.global_step == len(open_trace(tmp_path / "a.zarr").steps) == 2

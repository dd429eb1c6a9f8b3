"""Batches as people hand them over: whatever holds the tensors, trace and training are those of a plain tuple."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import BatchFeature
from transformers.modeling_outputs import ModelOutput
from transformers.tokenization_utils_base import BatchEncoding

from lightning_gradtrace import GradTrace, TopK, Trace, open_trace
from lightning_gradtrace.capture.intake.batch import map_tensors, tensors, token_ids
from lightning_gradtrace.capture.intake.permuting import permute_samples
from tests.loops.models import check_nothing_left, fit

VOCAB, LENGTH, N_SAMPLES = 11, 4, 10
BATCH = LENGTH  # as many samples as positions, so that sizes leave doubt and the batch is permuted


class Sentences(Dataset):
    """Pairs of tokens and labels, or mappings of them, of which the last tokens are padding."""

    def __init__(self, as_item: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        generator = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(VOCAB, (N_SAMPLES, LENGTH + 1), generator=generator)
        self.lengths = torch.randint(2, LENGTH + 1, (N_SAMPLES,), generator=generator)
        self.as_item = as_item

    def __len__(self) -> int:
        return N_SAMPLES

    def __getitem__(self, i: int) -> Any:
        mask = (torch.arange(LENGTH) < self.lengths[i]).long()
        return self.as_item(self.tokens[i, :-1], self.tokens[i, 1:], mask)


class Pair(NamedTuple):
    attention_mask: Tensor
    input_ids: Tensor
    labels: dict[str, Tensor]


@dataclass
class Data:
    labels: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    derived: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.derived = self.labels.sum(1)


@dataclass
class Output(ModelOutput):
    input_ids: Tensor | None = None
    labels: Tensor | None = None
    attention_mask: Tensor | None = None


Read = Callable[[Any], tuple[Tensor, Tensor, Tensor]]


def keys(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    return batch["input_ids"], batch["labels"], batch["attention_mask"]


def attributes(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    return batch.input_ids, batch.labels, batch.attention_mask


def named(x: Tensor, y: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"attention_mask": mask, "labels": y, "input_ids": x}


KINDS: dict[str, tuple[Callable[..., Any], Read]] = {
    "dict": (named, keys),
    "defaultdict": (lambda *all_: defaultdict(list, named(*all_)), keys),
    "BatchEncoding": (lambda *all_: BatchEncoding(named(*all_)), attributes),
    "BatchFeature": (lambda *all_: BatchFeature(named(*all_)), attributes),
    "ModelOutput": (lambda *all_: Output(**named(*all_)), attributes),
    "namedtuple": (lambda x, y, mask: Pair(mask, x, {"y": y}), lambda b: (b.input_ids, b.labels["y"], b[0])),
    "dataclass": (lambda x, y, mask: Data(y, x, mask), attributes),
    "object": (lambda *all_: SimpleNamespace(**named(*all_)), attributes),
    "nested": (
        lambda x, y, mask: [{"labels": ([y], "a text")}, (BatchEncoding({"input_ids": x, "attention_mask": mask}),)],
        lambda b: (b[1][0].input_ids, b[0]["labels"][0][0], b[1][0]["attention_mask"]),
    ),
}
"""How a batch is made of its three tensors, and how they are taken out of it."""


class Reader(pl.LightningModule):
    """A language model with a bare table of positions, whose use sizes alone don't explain."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.read = read
        self.embedding, self.head = nn.Embedding(VOCAB, 6), nn.Linear(6, VOCAB)
        self.places = nn.Parameter(torch.randn(LENGTH, 6))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, mask = self.read(batch)
        logits = self.head((self.embedding(x) + self.places).tanh())
        return F.cross_entropy(logits.flatten(0, 1), y.masked_fill(mask == 0, -100).flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.5)


def train(path: Path, read: Read, loader: DataLoader[Any], **options: Any) -> tuple[Trace, nn.Module]:
    pl.seed_everything(3, verbose=False)
    model = Reader(read)
    trainer = fit(model, GradTrace(path, TopK(40), params="*", **options), loader=loader)
    check_nothing_left(model, trainer)
    trace = open_trace(path)
    assert trace.attrs["complete"] and trace.verify().ok
    return trace, model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, nn.Module]:
    loader = DataLoader(Sentences(named), BATCH, shuffle=True, collate_fn=lambda items: keys(default_collate(items)))
    return train(tmp_path_factory.mktemp("plain") / "a.zarr", lambda batch: batch, loader, inputs=inputs)


def inputs(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return batch[0].masked_fill(batch[2] == 0, -1)


def check_same(found: tuple[Trace, nn.Module], plain: tuple[Trace, nn.Module]) -> None:
    (trace, model), (expected, same) = found, plain
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert trace.occurrences.equals(expected.occurrences)
    assert trace.topk.frame().equals(expected.topk.frame())
    ids = range(N_SAMPLES)
    assert (trace.inputs(ids) == expected.inputs(ids)).all() and (trace.inputs(ids) == -1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_any_kind_gives_the_trace_of_a_tuple(kind: str, plain, tmp_path: Path) -> None:
    make, read = KINDS[kind]
    loader = DataLoader(
        Sentences(named), BATCH, shuffle=True, collate_fn=lambda items: make(*keys(default_collate(items)))
    )
    check_same(train(tmp_path / "a.zarr", read, loader), plain)


def test_items_of_a_tokenizer_are_collated_and_their_ids_are_found_under_a_key(plain, tmp_path: Path) -> None:
    items = Sentences(lambda *all_: BatchEncoding(named(*all_)))
    check_same(train(tmp_path / "a.zarr", attributes, DataLoader(items, BATCH, shuffle=True)), plain)

    class Numbered(Sentences):
        def __getitem__(self, i: int) -> Any:
            return {**super().__getitem__(i), "number": 100 + i}

    loader = DataLoader(Numbered(named), BATCH, shuffle=True, collate_fn=lambda b: BatchEncoding(default_collate(b)))
    trace, _ = train(tmp_path / "b.zarr", attributes, loader, sample_ids="number", batch_axis=0)
    assert (trace.occurrences["sample_id"] == plain[0].occurrences["sample_id"] + 100).all()


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor


class Caching:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    @cached_property
    def twice(self) -> Tensor:
        return 2 * self.x


class Wrapped(Mapping[str, Tensor]):
    """A mapping around a dict: a shallow copy of it shares the dict."""

    def __init__(self, items: Mapping[str, Tensor]) -> None:
        self.items_ = dict(items)

    def __getitem__(self, key: str) -> Tensor:
        return self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


def caching(x: Tensor) -> Caching:
    made = Caching(x)
    assert made.twice is made.twice
    return made


class One(NamedTuple):
    first: Tensor
    second: Tensor
    third: Tensor


MORE: dict[str, Callable[[Tensor], Any]] = {
    "frozen": Frozen,
    "caching": caching,
    "mapping": lambda x: Wrapped({"x": x}),
    "one tensor each in a namedtuple": lambda x: {"a": One(*x)},
    "one tensor each in an object": lambda x: SimpleNamespace(a=list(x)),
}


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_permuted_samples_leave_the_batch_alone(kind: str) -> None:
    order = torch.tensor([2, 0, 1])
    x = torch.arange(6).view(3, 2)
    batch = KINDS[kind][0](x, x + 10, x > 1) if kind in KINDS else MORE[kind](x)
    before = [t.clone() for t in tensors(batch)]
    permuted = permute_samples(batch, order, 3, 0)
    assert type(permuted) is type(batch)
    assert all(torch.equal(a, b) for a, b in zip(tensors(batch), before, strict=True))
    stacked = "one tensor each" in kind
    wanted = [torch.stack(before)[order]] if stacked else [t[order] for t in before]
    found = [torch.stack(list(tensors(permuted)))] if stacked else list(tensors(permuted))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    doubled = map_tensors(lambda t: 2 * t, batch)
    assert all(torch.equal(a, 2 * b) for a, b in zip(tensors(doubled), before, strict=True))


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (["a", "b", "c"], ["c", "a", "b"]),
        ([[1], [2, 3], []], [[], [1], [2, 3]]),
        ((("x", 1), ("y", 2), ("z", 3)), (("z", 3), ("x", 1), ("y", 2))),
        ([{"box": torch.zeros(2, 4)}, {}, {"box": torch.ones(1, 4)}], None),
        (np.arange(6).reshape(3, 2), [[4, 5], [0, 1], [2, 3]]),
        ([7, 8, 9], [9, 7, 8]),
        ((7, 8, 9), (7, 8, 9)),  # a shape
        (["a", "b"], ["a", "b"]),  # of something else
        (["a", 1, None], ["a", 1, None]),
        ([{"x": torch.arange(3)}, {"x": torch.arange(3)}, {"x": torch.arange(3)}], None),  # three views of all samples
    ],
    ids=str,
)
def test_lists_of_something_else_for_each_sample_follow_the_samples(part: Any, expected: Any) -> None:
    permuted = permute_samples({"x": torch.arange(3), "part": part}, torch.tensor([2, 0, 1]), 3, 0)
    found = permuted["part"]
    assert permuted["x"].tolist() == [2, 0, 1] and type(found) is type(part)
    if expected is not None:
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == expected
    elif len(part[1]) == 0:
        assert found[0] is part[2] and found[1] is part[0]
    else:
        assert [one["x"].tolist() for one in found] == [[2, 0, 1]] * 3


def test_fields_of_a_tuple_are_no_lists_of_samples() -> None:
    """Two views of two samples, each with words of its own."""
    batch = ({"text": ["a", "b"]}, {"text": ["c", "d"]})
    permuted = permute_samples(batch, torch.tensor([1, 0]), 2, 0)
    assert permuted == ({"text": ["b", "a"]}, {"text": ["d", "c"]})


def test_what_a_tokenizer_says_beside_the_tensors_is_kept() -> None:
    batch = BatchEncoding({"input_ids": torch.arange(6).view(3, 2)}, n_sequences=1)
    permuted = permute_samples(batch, torch.tensor([1, 2, 0]), 3, 0)
    assert permuted.n_sequences == 1 and permuted.input_ids.tolist() == [[2, 3], [4, 5], [0, 1]]


def test_padding_of_a_square_batch_whose_samples_stand_along_the_second_axis() -> None:
    tokens, mask = torch.arange(9).view(3, 3), torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1]])
    found = token_ids({"attention_mask": mask, "input_ids": tokens}, 3, 1)
    assert found is not None and found.tolist() == [[0, 3, -1], [1, -1, -1], [2, 5, 8]]

"""Samples that are strung together: whose rows are, and the same batch with its samples in another order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gradtrace.capture.intake.permuting import permute_samples
from lightning_gradtrace.capture.intake.strung import Strung, strung_in
from lightning_gradtrace.capture.probing.probe import permutation

Item = dict[str, Tensor]


def graphs(sizes: Sequence[int]) -> list[Item]:
    """Return graphs with so many nodes; each has more edges than nodes, or none if it has one node."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for size in sizes:
        n_edges = 0 if size == 1 else 2 * size + 1
        edges = torch.randint(size, (2, n_edges), generator=generator)
        back = torch.randperm(n_edges, generator=generator)
        x = torch.randn(size, len(sizes), generator=generator)  # as many features as samples
        y = torch.randn(1, generator=generator)
        found.append(
            {"x": x, "edges": edges, "weights": torch.randn(n_edges, generator=generator), "back": back, "y": y}
        )
    return found


def strung(items: Sequence[Item], *, vector: bool = True, offsets: bool = False) -> dict[str, Any]:
    """String graphs together: nodes and edges one after the other, ends of edges counted through all nodes."""
    counts = torch.tensor([len(one["x"]) for one in items])
    n_edges = torch.tensor([one["edges"].shape[1] for one in items])
    first, first_edge = counts.cumsum(0) - counts, n_edges.cumsum(0) - n_edges
    batch = {name: torch.cat([one[name] for one in items]) for name in ("x", "weights", "y")}
    batch["edges"] = torch.cat([one["edges"] + int(at) for one, at in zip(items, first, strict=True)], 1)
    batch["back"] = torch.cat([one["back"] + int(at) for one, at in zip(items, first_edge, strict=True)])
    if vector:
        batch["owner"] = torch.arange(len(items)).repeat_interleave(counts)
    if offsets:
        batch["offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return batch


KINDS = [{"vector": True}, {"vector": False, "offsets": True}, {"vector": True, "offsets": True}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sizes", [(3, 5), (4, 4), (2, 1, 6), (3, 5, 2, 4), (1, 1, 7, 1, 3)], ids=str)
def test_the_permuted_batch_is_that_of_the_permuted_samples(sizes: Sequence[int], kind: dict[str, bool]) -> None:
    items = graphs(sizes)
    batch = strung(items, **kind)
    for order in (permutation(len(sizes)), torch.arange(len(sizes)).flip(0)):
        expected = strung([items[i] for i in order.tolist()], **kind)
        found = permute_samples(batch, order, len(sizes), 0)
        assert found.keys() == expected.keys()
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name], wanted, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sizes", [(3, 5), (2, 1, 6), (3, 5, 2, 4)], ids=str)
def test_every_row_has_an_owner(sizes: Sequence[int], kind: dict[str, bool]) -> None:
    items = graphs(sizes)
    batch = strung(items, **kind)
    found = {id(tensor): owners for tensor, owners in Strung(batch, len(sizes)).owners()}
    for name, axis in {"x": 0, "edges": 1, "weights": 0, "back": 0}.items():
        owners = found.pop(id(batch[name]))
        counts = torch.tensor([one[name].shape[axis] for one in items])
        whose = torch.arange(len(items)).repeat_interleave(counts)
        assert owners.shape == batch[name].shape
        assert (owners.movedim(axis, -1) == whose).all(), name
    assert found.keys() == ({id(batch["owner"])} if kind["vector"] else set())


def padded(n: int) -> dict[str, Tensor]:
    return {"tokens": torch.arange(n * 7).view(n, 7) % 5, "labels": torch.arange(n) % 3}


@pytest.mark.parametrize(
    "batch",
    [
        padded(4),
        {"tokens": torch.arange(28).view(7, 4), "lengths": torch.tensor([7, 5, 3, 1])},
        {"x": torch.randn(4, 3), "grid": torch.linspace(0, 1, 9), "numbers": torch.arange(9)},
        {"x": torch.randn(4, 3), "sorted words": torch.tensor([0, 2, 5, 9, 11, 12])},
        {"x": torch.randn(4, 7, 3), "segment": torch.tensor([0, 0, 1, 1, 2, 3, 3])},
        {"x": torch.randn(7, 4, 3), "segment": torch.tensor([0, 0, 1, 1, 2, 3, 3]), "grid": torch.randn(7)},
        {"x": torch.randn(11, 4, 3), "boundaries": torch.tensor([0, 2, 5, 8, 11])},
        {"x": torch.randn(16, 3), "view": torch.arange(4).repeat_interleave(4), "y": torch.randn(4)},
        {"x": torch.randn(7, 3), "class": torch.tensor([0, 0, 1, 1, 2, 3, 3]), "n": torch.tensor([1, 3, 1, 2])},
        {"a": torch.randn(7, 3), "one": torch.arange(7), "b": torch.randn(4, 3), "two": torch.tensor([0, 1, 1, 2, 3])},
    ],
    ids=["padded", "time first", "shared", "words", "segments", "of time", "boundaries", "views", "classes", "pairs"],
)
def test_nothing_else_is_taken_for_strung(batch: dict[str, Tensor]) -> None:
    assert not Strung(batch, 4)
    assert not strung_in(batch, 4)
    assert not strung_in(batch, None)


def test_sorted_classes_of_pairs_are_no_samples() -> None:
    classes = torch.arange(4).repeat_interleave(3)
    pairs = {"x": torch.randn(12, 5), "x class": classes, "y": torch.randn(12, 5), "y class": classes.clone()}
    assert not strung_in(pairs, None)
    assert not strung_in(pairs, 12)


def test_edges_that_are_as_many_as_the_samples_are_not_taken_for_one_of_each() -> None:
    owner = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    edges = torch.tensor([[1, 2, 5], [1, 2, 4]])
    batch = {"x": torch.randn(10, 5), "edges": edges, "owner": owner, "length": torch.randn(3), "y": torch.randn(3)}
    found = Strung(batch, 3)
    assert [id(tensor) for tensor in found.doubtful] == [id(batch["length"]), id(batch["y"])]


def test_rows_of_two_kinds_of_the_same_number_are_told_apart_by_what_points_where() -> None:
    owner = torch.tensor([0, 0, 0, 1, 1])
    edges = torch.tensor([[0, 3, 4, 3, 4], [1, 4, 3, 3, 4]])  # one in the first sample, four in the second
    batch = {"x": torch.randn(5, 3), "edges": edges, "owner": owner}
    known = Strung(batch, 2)
    owners = {id(tensor): found for tensor, found in known.owners()}
    assert torch.equal(owners[id(owner)].long(), owner)
    assert torch.equal(owners[id(edges)][0].long(), torch.tensor([0, 1, 1, 1, 1]))
    assert id(batch["x"]) not in owners  # it may hold a row for each node, or for each edge


def test_without_ids_an_index_vector_counts_the_samples() -> None:
    assert strung_in(strung(graphs((3, 5, 2))), None).n_samples == 3
    assert not strung_in({"x": torch.randn(6, 2), "labels": torch.tensor([0, 0, 1, 1, 1, 2])}, None)

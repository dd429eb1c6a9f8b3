"""Embeddings and embedding bags."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.rules.uses._base import Function, N, layer, on, use


def _bags(m: nn.Module, x: Tensor) -> Tensor:
    """Bags of unlike sizes: the first index of each row says how many it has."""
    sizes = [int(row[0]) % 5 for row in x]
    indices = torch.cat([row[1 : 1 + size] for row, size in zip(x, sizes, strict=True)])
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return m(indices, offsets if m.include_last_offset else offsets[:-1])


def _weighted(m: nn.Module, x: Tensor) -> Tensor:
    return m(x, per_sample_weights=(x + 1.5).to(m.weight.dtype))


def _learned_weights(m: nn.Module, x: Tensor) -> Tensor:
    """Bags of unlike sizes, each row with a weight from a second table."""
    sizes = [int(row[0]) % 5 for row in x]
    indices = torch.cat([row[1 : 1 + size] for row, size in zip(x, sizes, strict=True)])
    offsets = torch.tensor([0, *sizes]).cumsum(0)[:-1]
    return F.embedding_bag(
        indices, m.rows, offsets, mode="sum", padding_idx=m.padding, per_sample_weights=m.weights.tanh()[indices]
    )


def _bags_with_weights(padding: int | None) -> nn.Module:
    module = Function({"rows": (9, 4), "weights": (9,)}, _learned_weights)
    module.padding = padding
    return module


EMBEDDING = [
    layer("embedding: rows only", lambda: nn.Embedding(9, 4), (N,), classes=9),
    layer(
        "embedding: repeated and padded",
        lambda: nn.Embedding(4, 5, padding_idx=-1),
        (N, 8),
        classes=4,
        share="RowShare",
    ),
    use("__getitem__: rows of a bare table", {"w": (9, 4)}, lambda m, x: m.w[x], (N, 7), classes=9, share="RowShare"),
    use("__getitem__: from the end", {"w": (9, 4)}, lambda m, x: m.w[x - 9], (7, N), axis=1, classes=9),
    use("__getitem__: three axes", {"w": (9, 4, 2)}, lambda m, x: m.w[x], (N, 7), classes=9, closed=False),
    use("__getitem__: tuple", {"w": (9, 4)}, lambda m, x: m.w[x, 2], (N, 7), classes=9, closed=False),
    layer("embedding: renormalised", lambda: nn.Embedding(4, 5, max_norm=1.0), (N, 8), classes=4),
    *[
        layer(
            f"embedding_bag: {mode}",
            lambda mode=mode: nn.EmbeddingBag(9, 4, mode=mode),
            (N, 7),
            classes=9,
            share="RowShare",
        )
        for mode in ("sum", "mean", "max")
    ],
    *[
        layer(
            f"embedding_bag: {mode}, unlike sizes, {'last offset' if last else 'first offsets'}",
            on(
                lambda mode=mode, last=last: nn.EmbeddingBag(9, 4, mode=mode, padding_idx=2, include_last_offset=last),
                _bags,
            ),
            (N, 7),
            classes=9,
        )
        for mode in ("sum", "mean", "max")
        for last in (False, True)
    ],
    layer("embedding_bag: weighted", on(lambda: nn.EmbeddingBag(9, 4, mode="sum"), _weighted), (N, 7), classes=9),
    *[
        layer(
            f"embedding_bag: learned weights of rows, padding {padding}",
            lambda padding=padding: _bags_with_weights(padding),
            (N, 8),
            classes=9,
        )
        for padding in (None, 2)
    ],
    layer("embedding_bag: renormalised", lambda: nn.EmbeddingBag(9, 4, max_norm=1.0), (N, 7), classes=9),
    layer(
        "embedding_bag: two bags of a sample",
        on(lambda: nn.EmbeddingBag(9, 4), lambda m, x: m(x.flatten(0, 1)).unflatten(0, (-1, 2))),
        (N, 2, 7),
        classes=9,
    ),
]

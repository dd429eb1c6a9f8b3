"""Texts that a collate function has packed (`PackedSequence` of torch): their words lie time step by time step.

The longest text stands first, and ``sorted_indices`` tells which of the samples that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_gradtrace.capture.intake.batch import parts_of


def packed_in(batch: Any) -> Iterator[PackedSequence]:
    """Yield the packed texts of a batch."""
    if isinstance(batch, PackedSequence):
        yield batch
    else:
        for part in (parts_of(batch) or {}).values():
            yield from packed_in(part)


def owners_of(packed: PackedSequence) -> Tensor:
    """Return whose every entry of the packed data is, int16 of its shape."""
    sizes = packed.batch_sizes
    ranks = torch.cat([torch.arange(int(size), device="cpu") for size in sizes])
    order = packed.sorted_indices
    owners = ranks if order is None else order.cpu()[ranks]
    rows = owners.to(packed.data.device, torch.int16)
    return rows.view(-1, *[1] * (packed.data.dim() - 1)).expand(packed.data.shape)


def permuted_texts(packed: PackedSequence, order: Tensor) -> PackedSequence:
    """Return the texts in another order.

    Args:
        packed: the texts.
        order: which samples the permuted batch holds.
    """
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    texts = padded.index_select(0, order.to(padded.device))
    return pack_padded_sequence(texts, lengths[order], batch_first=True, enforce_sorted=False)

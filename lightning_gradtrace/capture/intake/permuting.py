"""The same batch with its samples in another order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_gradtrace.capture.intake.batch import holds_one_each, lists_one_each, parts_of, rebuilt, sample_axis_of
from lightning_gradtrace.capture.intake.packed import permuted_texts
from lightning_gradtrace.capture.intake.strung import Strung, permuted_offsets, slices_of


def has_lists(batch: Any, n_samples: int, is_whole: bool = True) -> bool:
    """Say whether a batch lists something else than tensors with as many entries as there are samples."""
    if lists_one_each(batch, n_samples, is_whole):
        return True
    return any(has_lists(part, n_samples, is_whole=False) for part in (parts_of(batch) or {}).values())


def permute_samples(
    batch: Any, order: Tensor, n_samples: int, batch_axis: int, strung: Strung | None = None, with_lists: bool = True
) -> Any:
    """Return the batch with its samples in another order.

    Args:
        batch: the batch, or a part of it.
        order: a permutation of ``range(n_samples)``.
        n_samples: number of samples.
        batch_axis: axis of the samples in the batch's tensors.
        strung: samples that are strung together in the batch; None for a whole batch, to find out.
        with_lists: let lists and arrays follow that hold something else for each sample, or happen to be as long.

    Returns:
        A batch of the same structure; tensors without samples are the same objects.
    """
    is_whole, strung = strung is None, Strung(batch, n_samples) if strung is None else strung
    if isinstance(batch, Tensor):
        moved = strung.permuted(batch, order)
        axis = sample_axis_of(batch, n_samples, batch_axis)
        if moved is not None or axis is None:
            return batch if moved is None else moved
        return batch.index_select(axis, order.to(batch.device))
    if isinstance(batch, PackedSequence):
        return permuted_texts(batch, order)
    follows = with_lists and lists_one_each(batch, n_samples, is_whole)
    if follows and isinstance(batch, np.ndarray):
        return batch[order.numpy()]
    if follows or holds_one_each(batch, n_samples, is_whole):
        return rebuilt(batch, dict(enumerate(batch[i] for i in order.tolist())))
    parts = parts_of(batch)
    if parts is None:
        return batch
    of = (order, n_samples, batch_axis, strung, with_lists)
    twin = rebuilt(batch, {key: permute_samples(part, *of) for key, part in parts.items()})
    slices = slices_of(batch)
    if slices is not None:
        twin._slice_dict = permuted_offsets(slices, order)
    return twin


def own_part(batch: Any, n_samples: int, batch_axis: int, strung: Strung | None = None) -> Any:
    """Return what of a batch is the samples' own: with None in the place of tensors that do not follow their order.

    These are constants, as a buffer is: a grid, positions, a table.

    Args:
        batch: the batch, or a part of it.
        n_samples: number of samples; all is the own of a single one.
        batch_axis: axis of the samples in the batch's tensors.
        strung: samples that are strung together in the batch; None for a whole batch, to find out.
    """
    if n_samples < 2:
        return batch
    is_whole, strung = strung is None, Strung(batch, n_samples) if strung is None else strung
    if isinstance(batch, Tensor):
        is_plain = batch.layout is torch.strided and not batch.is_nested
        has_axis = not is_plain or sample_axis_of(batch, n_samples, batch_axis) is not None
        return batch if has_axis or strung.says_of(batch) else None
    listed = holds_one_each(batch, n_samples, is_whole) or lists_one_each(batch, n_samples, is_whole)
    parts = None if listed or isinstance(batch, PackedSequence) else parts_of(batch)
    if parts is None:
        return batch
    own = {key: own_part(part, n_samples, batch_axis, strung) for key, part in parts.items()}
    return batch if all(own[key] is part for key, part in parts.items()) else rebuilt(batch, own)

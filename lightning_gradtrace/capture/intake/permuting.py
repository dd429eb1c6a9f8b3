"""The same batch with its samples in another order."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from torch import Tensor

from lightning_gradtrace.capture.intake.batch import holds_one_each, parts_of, rebuilt, sample_axis_of, tensors, without
from lightning_gradtrace.capture.intake.strung import Strung, permuted_offsets, slices_of


def _lists_one_each(part: Any, n_samples: int, is_whole: bool) -> bool:
    """Say whether a part of a batch lists something else than a tensor for each sample: its text, a tree, a name."""
    if isinstance(part, np.ndarray):
        return part.ndim > 0 and len(part) == n_samples > 1
    if not isinstance(part, (list, tuple)) or hasattr(part, "_asdict") or (is_whole and isinstance(part, tuple)):
        return False
    if len(part) != n_samples or n_samples < 2 or len(set(map(type, part))) > 1 or isinstance(part[0], Tensor):
        return False
    if isinstance(part, tuple) and isinstance(part[0], (bool, int, float)):
        return False  # a shape, a range
    return not any(n_samples in tensor.shape[:2] for tensor in tensors(part))


def has_lists(batch: Any, n_samples: int, is_whole: bool = True) -> bool:
    """Say whether a batch lists something else than tensors with as many entries as there are samples."""
    if _lists_one_each(batch, n_samples, is_whole):
        return True
    return any(has_lists(part, n_samples, is_whole=False) for part in (parts_of(batch) or {}).values())


def permute_samples(
    batch: Any,
    order: Tensor,
    n_samples: int,
    batch_axis: int,
    strung: Strung | None = None,
    with_lists: bool = True,
    common: Collection[Tensor] = (),
) -> Any:
    """Return the batch with its samples in another order.

    Args:
        batch: the batch, or a part of it.
        order: a permutation of ``range(n_samples)``.
        n_samples: number of samples.
        batch_axis: axis of the samples in the batch's tensors.
        strung: samples that are strung together in the batch; None for a whole batch, to find out.
        common: tensors that stay as they are, because all samples have them in common.
        with_lists: let lists and arrays follow that hold something else for each sample, or happen to be as long.

    Returns:
        A batch of the same structure; tensors without samples are the same objects.
    """
    is_whole, strung = strung is None, Strung(without(batch, common), n_samples) if strung is None else strung
    if isinstance(batch, Tensor):
        if any(batch is tensor for tensor in common):
            return batch
        moved = strung.permuted(batch, order)
        axis = sample_axis_of(batch, n_samples, batch_axis)
        if moved is not None or axis is None:
            return batch if moved is None else moved
        return batch.index_select(axis, order.to(batch.device))
    follows = with_lists and _lists_one_each(batch, n_samples, is_whole)
    if follows and isinstance(batch, np.ndarray):
        return batch[order.numpy()]
    if follows or holds_one_each(batch, n_samples, is_whole):
        return rebuilt(batch, dict(enumerate(batch[i] for i in order.tolist())))
    parts = parts_of(batch)
    if parts is None:
        return batch
    of = (order, n_samples, batch_axis, strung, with_lists, common)
    twin = rebuilt(batch, {key: permute_samples(part, *of) for key, part in parts.items()})
    slices = slices_of(batch)
    if slices is not None:
        twin._slice_dict = permuted_offsets(slices, order)
    return twin

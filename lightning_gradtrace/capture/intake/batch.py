"""What a batch holds: its tensors, its number of samples, and where these are."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


def parts_of(batch: Any) -> dict[Any, Any] | None:
    """Return what a batch is put together from, by key, index or attribute; None for a leaf."""
    if isinstance(batch, Mapping):
        return dict(batch.items())
    if isinstance(batch, (tuple, list)):
        return batch._asdict() if hasattr(batch, "_asdict") else dict(enumerate(batch))
    if isinstance(batch, (Tensor, type)):
        return None
    if dataclasses.is_dataclass(batch):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return fields | getattr(batch, "__dict__", {})  # the latter also holds what properties cache
    if hasattr(batch, "__dict__") and not isinstance(batch, (torch.nn.Module, *_FUNCTIONS)):
        return dict(vars(batch))  # an object of a user's class
    return None


def rebuilt(batch: Any, parts: Mapping[Any, Any]) -> Any:
    """Return a batch of the same kind from other parts; what else it holds (encodings of a tokenizer) is kept."""
    if isinstance(batch, dict) or (isinstance(batch, Mapping) and hasattr(type(batch), "__copy__")):
        twin = copy.copy(batch)
        for key, value in parts.items():
            twin[key] = value  # type: ignore[index]
        return twin
    if isinstance(batch, Mapping):  # a shallow copy may share what it keeps its items in
        return type(batch)(parts)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_make"):
        return batch._make(parts.values())
    if isinstance(batch, (tuple, list)):
        return type(batch)(parts.values())
    twin = copy.copy(batch)
    for name, value in parts.items():
        object.__setattr__(twin, name, value)  # also where the class is frozen
    return twin


def tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, however tuples, lists, mappings, dataclasses and plain objects are nested in it."""
    return (tensor for _, tensor in leaves(batch))


def leaves(batch: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield the tensors of a batch as `tensors` does, each after the keys, indices and names that lead to it."""
    if isinstance(batch, Tensor):
        yield path, batch
    for key, part in (parts_of(batch) or {}).items():
        yield from leaves(part, (*path, key))


def holds_one_each(part: Any, n_samples: int, is_whole: bool = False) -> bool:
    """Say whether a list holds one tensor for each sample, as texts or images of unlike sizes come.

    The tensors of fields hold the samples along axis 0; where they are the whole batch, along one of the first two axes
    and with as many positions. Of a tuple that is the whole batch it is enough if one does (texts that are strung
    together, their lengths, their labels).

    Args:
        part: a part of a batch.
        n_samples: number of samples.
        is_whole: whether it is all of the batch.
    """
    if not isinstance(part, (tuple, list)) or len(part) != n_samples or n_samples < 2:
        return False
    if not all(isinstance(value, Tensor) and value.dim() > 0 for value in part):
        return False
    if not any(len({(v.dtype, v.dim(), common(v.shape)) for v in part}) == 1 for common in (_of_text, _of_image)):
        return False
    if is_whole and isinstance(part, tuple):
        return not any(n_samples in value.shape[:2] for value in part)
    if is_whole and len({value.shape[0] for value in part}) == 1:
        return not all(n_samples in value.shape[:2] for value in part)
    return not all(value.shape[0] == n_samples for value in part)


def lists_one_each(part: Any, n_samples: int, is_whole: bool) -> bool:
    """Say whether a part of a batch lists something else than a tensor for each sample: its text, a tree, its boxes.

    Args:
        part: a part of a batch.
        n_samples: number of samples.
        is_whole: whether it is all of the batch.
    """
    if isinstance(part, np.ndarray):
        return part.ndim > 0 and len(part) == n_samples > 1
    if not isinstance(part, (list, tuple)) or hasattr(part, "_asdict") or (is_whole and isinstance(part, tuple)):
        return False
    if len(part) != n_samples or n_samples < 2 or len(set(map(type, part))) > 1 or isinstance(part[0], Tensor):
        return False
    if isinstance(part, tuple) and isinstance(part[0], (bool, int, float)):
        return False  # a shape, a range
    found = [tensor.shape for tensor in tensors(part) if tensor.dim()]
    if isinstance(part[0], Mapping):  # batches of several dataloaders hold the samples along axis 0
        return not found or not all(shape[0] == n_samples for shape in found)
    return not any(n_samples in shape[:2] for shape in found)


def _of_text(shape: torch.Size) -> Any:
    """Return what texts of unlike lengths have in common, shape (position, ...)."""
    return shape[1:]


def _of_image(shape: torch.Size) -> Any:
    """Return what images of unlike sizes have in common, shape (channel, ..., height, width)."""
    return shape[:-2] or shape


def pieces(batch: Any, n_samples: int, is_whole: bool = True) -> Iterator[tuple[int, Tensor]]:
    """Yield the tensors of a batch, or of a part of it, that belong to one sample alone, after its number."""
    if holds_one_each(batch, n_samples, is_whole):
        yield from enumerate(batch)
    elif isinstance(batch, (list, tuple)) and lists_one_each(batch, n_samples, is_whole):
        yield from ((sample, tensor) for sample, part in enumerate(batch) for tensor in tensors(part))
    else:
        for part in (parts_of(batch) or {}).values():
            yield from pieces(part, n_samples, is_whole=False)


def holds_only_tensors(batch: Any) -> bool:
    """Say whether every leaf of a batch is a tensor, so that all samples reach the model through tensors."""
    parts = parts_of(batch)
    if parts is None:
        return isinstance(batch, Tensor) or batch is None
    return all(holds_only_tensors(part) for part in parts.values())


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return a batch of the same structure with ``function`` applied to each of its tensors."""
    if isinstance(batch, Tensor):
        return function(batch)
    parts = parts_of(batch)
    if parts is None:
        return batch
    return rebuilt(batch, {key: map_tensors(function, part) for key, part in parts.items()})


def copied(batch: Any) -> Any:
    """Return a batch with the same tensors in containers of its own, which a step may take something out of.

    Some classes of batches can't be put together again; these come as they are.
    """
    try:
        return map_tensors(lambda tensor: tensor, batch)
    except Exception:
        return batch


def _describe(batch: Any) -> str:
    shapes = [tuple(t.shape) for t in tensors(batch)]
    return f"tensors of shapes {shapes}" if shapes else f"no tensors (a `{type(batch).__name__}`)"


def count_samples(batch: Any, batch_axis: int | None, n_ids: int | None) -> int:
    """Return the number of samples in a batch.

    Args:
        batch: what the training dataloader yielded.
        batch_axis: axis of the batch's tensors that holds the samples, None to find out.
        n_ids: number of sample ids that are known for the batch, None when there are none.

    Returns:
        The number of samples, 1 or more.

    Raises:
        ValueError: the batch holds no samples, or its tensors fit neither ``batch_axis`` nor the sample ids.
    """
    shapes = [t.shape for t in tensors(batch) if t.dim() > 0]
    axes = [0, 1] if batch_axis is None else [batch_axis]
    if n_ids is not None and any(len(s) > a and s[a] == n_ids for s in shapes for a in axes):
        n = n_ids
    elif n_ids == 1 and shapes:  # everything is its own, as the nodes of a graph are
        n = 1
    elif n_ids is not None and any(pieces(batch, n_ids)):  # lists of images, and of targets
        n = n_ids
    elif n_ids is not None:
        raise ValueError(
            f"GradTrace: the batch has {_describe(batch)}, and {n_ids} sample ids are known for it, but no tensor has "
            f"{n_ids} entries along {'axis 0 or 1' if batch_axis is None else f'axis {batch_axis}'}. If the collate "
            "function drops or adds samples, give `sample_ids=` a key of the batch or a callable(batch) -> ids; if "
            "another axis holds the samples, give `batch_axis=`."
        )
    else:
        sizes = [s[axes[0]] for s in shapes if len(s) > axes[0]]
        if not sizes:
            raise ValueError(
                f"GradTrace: no samples found in the batch: it has {_describe(batch)}, expected at least one tensor "
                f"with an axis {axes[0]}. Return a tensor, tuple or dict of tensors from the dataloader, or give "
                "`sample_ids=callable(batch) -> ids`."
            )
        n = sizes[0]
    if n == 0:
        raise ValueError(
            f"GradTrace: the batch is empty: {_describe(batch)}, expected at least one sample. "
            "Drop empty batches in the dataloader or its collate function."
        )
    return int(n)


def find_batch_axis(
    batch: Any, n_samples: int, items: Callable[[], Sequence[Any]] | None, strung: Container[Tensor] = ()
) -> int:
    """Find out which axis of the batch's tensors holds the samples.

    Args:
        batch: a batch.
        n_samples: its number of samples.
        items: returns the first few items of the batch as the data set holds them, asked only when axes 0 and 1 of
            the first tensor have the same size; None if there is no data set to ask.
        strung: tensors of samples that are strung together, which have no axis for them.

    Returns:
        0 or 1: the axis of the first tensor that has one of the right size; of one of shape (1, n, ...), which may be
        the same for all samples, only if there is no other.

    Raises:
        ValueError: both axes are possible and the items can't tell them apart.
    """
    untold: Tensor | None = None
    few: Sequence[Any] | None = None
    for tensor in sorted(tensors(batch), key=lambda tensor: tensor.shape[:1] == (1,)):
        axes = [a for a in range(min(tensor.dim(), 2)) if tensor.shape[a] == n_samples and tensor not in strung]
        if axes and (n_samples == 1 or (len(axes) == 1 and untold is None)):
            return axes[0]
        if axes:
            few = few if few is not None or items is None else items()
            found = {a for a in axes if _holds_items(tensor, a, few or ())}
            if len(found) == 1:
                return found.pop()
            untold = tensor if untold is None else untold
    if untold is None:
        return 0
    raise ValueError(
        f"GradTrace: axes 0 and 1 of a batch tensor of shape {tuple(untold.shape)} both have {n_samples} entries, as "
        "many as the batch has samples, and the items of the data set don't tell which it is. Say which axis holds the "
        "samples: `GradTrace(..., batch_axis=0)` or `batch_axis=1`."
    )


def _holds_items(tensor: Tensor, axis: int, items: Sequence[Any]) -> bool:
    """Say whether the first slices of a tensor along an axis are tensors of the first items."""
    return bool(items) and all(
        any(
            part.shape == tensor.select(axis, slot).shape and torch.equal(part.to(tensor), tensor.select(axis, slot))
            for part in tensors(item)
        )
        for slot, item in enumerate(items)
    )


def sample_axis_of(tensor: Tensor, n_samples: int, batch_axis: int) -> int | None:
    """Return the axis of one tensor of a batch that holds the samples, None if it has none.

    That is ``batch_axis`` if its size fits, else the only other one among axes 0 and 1 whose size does (labels of
    shape (sample,) beside tokens of shape (position, sample)). What has the shape (1, n) where the samples stand along
    axis 0 is broadcast over them, as positions are.
    """
    if batch_axis == 0 and tensor.dim() == 2 and tensor.shape[0] == 1 < n_samples:
        return None
    axes = [a for a in range(min(tensor.dim(), 2)) if tensor.shape[a] == n_samples]
    if batch_axis in axes:
        return batch_axis
    return axes[0] if axes else None


def token_ids(batch: Any, n_samples: int, batch_axis: int) -> Tensor | None:
    """Return the token ids of a batch, shape (sample, position), or None if nothing in it looks like tokens.

    What is called ``input_ids`` is taken first, wherever it stands, else the first integer tensor with two axes of
    which one holds the samples. Where the ``attention_mask`` beside it says that there is no token, it is -1.
    """
    found = [one for one in _named(batch) if one[0] != "attention_mask"]
    for _, tensor, mask in [one for one in found if one[0] == "input_ids"] or found:
        axis = sample_axis_of(tensor, n_samples, batch_axis)
        if axis is not None and tensor.dim() == 2 and tensor.dtype in (torch.int64, torch.int32, torch.int16):
            masked = isinstance(mask, Tensor) and mask.shape == tensor.shape
            return (tensor.masked_fill(mask == 0, -1) if masked else tensor).movedim(axis, 0)
    return None


def _named(batch: Any, name: Any = None, mask: Any = None) -> Iterator[tuple[Any, Tensor, Any]]:
    """Yield the tensors of a batch, each with its own name and the ``attention_mask`` beside it."""
    if isinstance(batch, Tensor):
        yield name, batch, mask
    parts = parts_of(batch) or {}
    for key, part in parts.items():
        yield from _named(part, key, parts.get("attention_mask"))

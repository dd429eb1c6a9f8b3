"""Tensors of batches that are known to be shared by all samples, although they are as long as these are many."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_shared: Any = WeakIdKeyDictionary()


def note_shared(tensor: Tensor) -> None:
    """Remember of a tensor, as long as it lives, that all samples share it."""
    _shared[tensor] = True


def is_shared(tensor: Tensor) -> bool:
    """Say whether a tensor of a batch is known to be shared by all samples."""
    return tensor in _shared

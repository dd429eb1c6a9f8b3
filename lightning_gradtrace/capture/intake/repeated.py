"""A word about what is the same in two batches of different samples, and may be shared by all of them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradtrace.capture.intake.batch import leaves, sample_axis_of

_MOST_LOOKS = 8  # a training may always show the same samples


class Repeated:
    """Compares two of the first batches, that hold equally many, and other samples."""

    def __init__(self) -> None:
        self._ids: np.ndarray | None = None
        self._first: dict[tuple[Any, ...], Tensor] = {}
        self._looks_left = _MOST_LOOKS
        self._found: list[tuple[tuple[Any, ...], Tensor, Tensor]] = []

    def look_at(self, batch: Any, ids: np.ndarray, batch_axis: int) -> None:
        """Look for tensors that count as the samples' own because of their length, and did not change with them.

        Whole numbers in one axis may be classes in an order that a sampler keeps. Nothing is read here, so that nothing
        waits for a device; see `tell`.

        Args:
            batch: a batch.
            ids: its sample ids, int64, shape (sample,).
            batch_axis: axis of the samples in its tensors.
        """
        if not self._looks_left or len(ids) < 2:
            return
        self._looks_left -= 1
        found = {
            path: (tensor, axis)
            for path, tensor in leaves(batch)
            if tensor.layout is torch.strided
            and not tensor.is_nested
            and (tensor.dim() > 1 or tensor.is_floating_point())
            and (axis := sample_axis_of(tensor, len(ids), batch_axis)) is not None
        }
        if self._ids is None or len(self._ids) != len(ids):
            self._ids = ids.copy()
            self._first = {path: tensor.detach().clone() for path, (tensor, _) in found.items()}
        elif not np.intersect1d(self._ids, ids).size:
            self._looks_left = 0
            for path, (tensor, axis) in found.items():
                before = self._first.get(path)
                if before is not None and before.shape == tensor.shape:
                    varies = (tensor != tensor.narrow(axis, 0, 1)).any()
                    self._found.append((path, tensor, (before == tensor).all() & varies))
        if not self._looks_left:
            self._first = {}

    def tell(self) -> None:
        """Warn of what was found; called when the training on a batch is over."""
        found, self._found = self._found, []
        for path, tensor, is_repeated in found:
            if is_repeated:
                _warn(path, tensor)


def _warn(path: tuple[Any, ...], tensor: Tensor) -> None:
    warnings.warn(
        f"GradTrace: tensor {'.'.join(map(str, path))} of the batch, of shape {tuple(tensor.shape)}, is the same in "
        "two batches of different samples. It is as long as they are many, so it counts as one entry for each. If all "
        "samples share it (a grid, names of classes, negatives), what it led to went to the wrong samples: keep it in "
        "a buffer of the model, or let its length be another.",
        stacklevel=2,
    )

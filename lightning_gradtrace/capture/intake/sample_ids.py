"""Which sample of the data set stands in which slot of a batch."""

from __future__ import annotations

import random
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from typing_extensions import override

from lightning_gradtrace.capture.intake.collating import OrderedCollate


class IdSource(ABC):
    """Gives the sample ids of every batch, in the order of the batches."""

    @abstractmethod
    def ids(self, batch: Any) -> np.ndarray | None:
        """Return the ids of the next batch, int64, shape (sample,); None if it can't tell and slots are numbered."""

    def items(self, ids: np.ndarray) -> list[Any]:
        """Return the items with these ids as the data set holds them; an empty list if that can't be known."""
        return []


class RecordingBatchSampler(BatchSampler):
    """Hands on the batches of another batch sampler and remembers their indices.

    The batch sampler runs in the main process, however many workers load the data, and batches arrive in its order;
    so the oldest remembered batch is the next one to arrive. Every other attribute is that of the wrapped sampler.

    Args:
        inner: the batch sampler of the user's dataloader.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.pending: deque[list[Any]] = deque()
        self.arrived = False
        self.restored = False

    def __iter__(self) -> Iterator[Any]:
        self.pending.clear()  # what an abandoned epoch had fetched ahead never arrives
        self.arrived = self.restored = False
        batches = iter(self.inner)
        return (_StatefulBatches if _keeps_state(batches) else _Batches)(self, batches)

    def next_arrival(self, loader: Any) -> list[Any] | None:
        """Return the indices of the batch that arrives now, None if it never was given out."""
        if not self.arrived and not self.restored:
            # A resumable dataloader goes over the batches before its place again if their sampler keeps no state.
            skipped = getattr(getattr(loader, "_iterator", None), "_num_yielded", 1) - 1
            for _ in range(min(skipped, len(self.pending))):
                self.pending.popleft()
        self.arrived = True
        return self.pending.popleft() if self.pending else None

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "pending"):  # not yet set: copying and unpickling ask before __init__ has run
            raise AttributeError(name)
        return getattr(self.inner, name)


class _StatefulRecordingBatchSampler(RecordingBatchSampler):
    """The same around a sampler with a state; resumable dataloaders look for these methods on the class."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self.inner.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


class _Batches(Iterator[Any]):
    """One pass over the batches."""

    def __init__(self, recorder: RecordingBatchSampler, batches: Iterator[Any]) -> None:
        self._recorder, self._batches = recorder, batches

    @override
    def __next__(self) -> Any:
        batch = next(self._batches)
        self._recorder.pending.append(list(batch))
        return batch


class _StatefulBatches(_Batches):
    """One pass that a resumable dataloader can go on with in the middle, as it could without the recorder."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self._batches.state_dict())  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._recorder.restored = True
        self._batches.load_state_dict(state)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not yet set
            raise AttributeError(name)
        return getattr(self._batches, name)


def _keeps_state(thing: Any) -> bool:
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


class SamplerIds(IdSource):
    """Dataset indices, read off the batch sampler of the training dataloader.

    Args:
        loader: a dataloader with a map-style data set and a batch sampler.
        strict: refuse a collate function that gives the samples another order.
    """

    def __init__(self, loader: DataLoader[Any], strict: bool = True) -> None:
        self._loader = loader
        inner = loader.batch_sampler
        self._recorder = (_StatefulRecordingBatchSampler if _keeps_state(inner) else RecordingBatchSampler)(inner)
        # DataLoader refuses to replace its batch sampler; the replacement yields the same batches.
        object.__setattr__(loader, "batch_sampler", self._recorder)
        self._collate = loader.collate_fn
        if strict and OrderedCollate.applies_to(self._collate):
            loader.collate_fn = OrderedCollate(self._collate)

    @staticmethod
    def applies_to(loader: Any) -> bool:
        """Say whether a dataloader tells which items it batches."""
        return (
            isinstance(loader, DataLoader)
            and not isinstance(loader.dataset, IterableDataset)
            and loader.batch_sampler is not None
            and getattr(loader, "in_order", True)
        )

    @override
    def ids(self, batch: Any) -> np.ndarray | None:
        found = self._recorder.next_arrival(self._loader)
        if found is None:
            raise RuntimeError(
                "GradTrace: a batch arrived that the batch sampler of the training dataloader never gave out, so its "
                "sample ids are unknown. Give `sample_ids=` a key of the batch or a callable(batch) -> ids."
            )
        return as_ids(found, "the batch sampler")

    @override
    def items(self, ids: np.ndarray) -> list[Any]:
        # A data set may draw random numbers; training must not notice that it was asked.
        states = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                return [self._loader.dataset[i] for i in ids.tolist()]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    def restore(self) -> None:
        """Give the dataloader its own batch sampler back."""
        object.__setattr__(self._loader, "batch_sampler", self._recorder.inner)
        self._loader.collate_fn = self._collate


class KeyIds(IdSource):
    """Ids that a batch carries under a key, for batches that are mappings.

    Args:
        key: the key.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    @override
    def ids(self, batch: Any) -> np.ndarray | None:
        if not isinstance(batch, Mapping) or self.key not in batch:
            found = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a `{type(batch).__name__}`"
            raise ValueError(
                f"GradTrace: `sample_ids={self.key!r}` names a key of the batch, but the batch has {found}. Return a "
                "dict with that key from the dataloader, or give a callable(batch) -> ids."
            )
        return as_ids(batch[self.key], f"batch[{self.key!r}]")


class CallableIds(IdSource):
    """Ids that a user's function finds in a batch.

    Args:
        function: callable(batch) -> ids, one per sample.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    @override
    def ids(self, batch: Any) -> np.ndarray | None:
        return as_ids(self.function(batch), "`sample_ids(batch)`")


class UnknownIds(IdSource):
    """No ids are known: every occurrence is numbered in the order of arrival, as a sample of its own."""

    @override
    def ids(self, batch: Any) -> np.ndarray | None:
        return None


class DataloaderWatch:
    """Records the batch sampler of each training dataloader from its first batch on.

    Lightning makes the first epoch's iterator, and workers begin to fetch, before `on_train_start`. The strategy's
    ``process_dataloader`` is where a loader passes after Lightning has finished it and before it is iterated.
    """

    def __init__(self) -> None:
        self._samplers: list[SamplerIds] = []
        self._strategy: Any = None

    def start(self, strategy: Any, is_training: Callable[[], bool], strict: bool = True) -> None:
        """Begin to watch.

        Args:
            strategy: Lightning's strategy; its ``process_dataloader`` is replaced on this one object until `stop`.
            is_training: says whether the loader being processed is one for training.
            strict: see `SamplerIds`.
        """
        self.stop()
        original = strategy.process_dataloader

        def process_dataloader(loader: object) -> object:
            loader = original(loader)
            if is_training() and SamplerIds.applies_to(loader):
                self._samplers.append(SamplerIds(loader, strict))  # type: ignore[arg-type]
            return loader

        strategy.process_dataloader = process_dataloader
        self._strategy = strategy

    def stop(self) -> None:
        """Give the strategy and the dataloaders back what is theirs; idempotent."""
        if self._strategy is not None:
            self._strategy.__dict__.pop("process_dataloader", None)
            self._strategy = None
        for sampler in self._samplers:
            sampler.restore()
        self._samplers.clear()

    def source(self) -> IdSource:
        """Return the ids of the one dataloader seen; else, with a warning, numbers in order of arrival."""
        if len(self._samplers) == 1:
            return self._samplers[0]
        what = "several training dataloaders" if self._samplers else "a training dataloader without dataset indices"
        warnings.warn(
            f"GradTrace: {what}: samples are numbered in the order of their arrival, every occurrence as a sample of "
            "its own. Give `sample_ids=` a key of the batch or a callable(batch) -> ids to tell samples apart.",
            stacklevel=2,
        )
        return UnknownIds()


def as_ids(found: Any, where: str) -> np.ndarray:
    """Return ids as an int64 array.

    Raises:
        ValueError: they are not whole numbers in one row.
    """
    array = found.detach().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
    if array.ndim == 1 and array.dtype == object and all(isinstance(i, (int, np.integer, Tensor)) for i in array):
        array = np.asarray([int(i) for i in array], dtype=np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"GradTrace: sample ids must be whole numbers, one per sample; {where} gave an array of dtype "
            f"{array.dtype} and shape {array.shape}. Give `sample_ids=` a callable(batch) -> whole numbers."
        )
    return array.astype(np.int64)

"""Who puts a batch together: torch stacks one entry of each sample, a function of the user's may add something else."""

from __future__ import annotations

from typing import Any

from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, default_collate

_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_KNOWN = ("lightning", "torch_geometric")


def may_hold_more(trainer: Any, pl_module: Any) -> bool:
    """Say whether batches may hold something else than one entry for each sample.

    Args:
        trainer: Lightning's trainer, for its dataloaders and its datamodule.
        pl_module: the LightningModule, which may change batches on their way to the device.
    """
    holders = [pl_module, getattr(trainer, "datamodule", None)]
    hooks = [getattr(holder, name) for holder in holders if holder is not None for name in _TRANSFERS]
    if any(hook.__module__.partition(".")[0] != "lightning" for hook in hooks):
        return True
    return not all(map(_stacks, tree_leaves(getattr(trainer.train_dataloader, "iterables", trainer.train_dataloader))))


def _stacks(loader: Any) -> bool:
    """Say whether a dataloader leaves it to torch to make batches of items, or to `torch_geometric`."""
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        return False
    collate = loader.collate_fn
    return collate is default_collate or type(collate).__module__.partition(".")[0] == "torch_geometric"

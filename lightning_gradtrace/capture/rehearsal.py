"""Run the user's training step for its forward pass only, for the permutation probe."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def rehearse(trainer: Any, pl_module: Any, batch_idx: int, batch: Any) -> None:
    """Run `training_step` on a batch; what it logs goes nowhere.

    Args:
        trainer: Lightning's trainer, for the precision of its forward pass.
        pl_module: the LightningModule.
        batch_idx: index of the batch.
        batch: the batch.

    Raises:
        ValueError: with manual optimization, where a training step can't be run without training.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(
            "GradTrace: sizes don't tell which axis holds the samples, and with manual optimization the forward pass "
            "can't be repeated to find out. Use a batch size that is no size of another axis."
        )
    takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1
    with _silenced(pl_module), trainer.precision_plugin.train_step_context():
        pl_module.training_step(batch, batch_idx) if takes_index else pl_module.training_step(batch)


def loss_factor(trainer: Any) -> float:
    """Return what the training multiplies the user's loss by before the backward pass.

    Lightning divides the loss by the number of accumulated micro-batches; fp16 AMP multiplies it by the loss scale.
    With manual optimization the user does what there is to do.

    Args:
        trainer: Lightning's trainer.

    Returns:
        The factor.
    """
    automatic = trainer.lightning_module.automatic_optimization
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    return scale / (trainer.accumulate_grad_batches if automatic else 1)


@contextmanager
def _silenced(pl_module: Any) -> Iterator[None]:
    """Let `self.log` and `self.log_dict` do nothing for a while."""
    names = ("log", "log_dict")
    for name in names:
        object.__setattr__(pl_module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name in names:
            with suppress(AttributeError):
                object.__delattr__(pl_module, name)

"""A small transformer and its task's loss as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from typing_extensions import override

from examples.models.circuits import CircuitTransformer

IGNORE = -100
"""Target of positions that the loss leaves out."""

_ADAMW = partial(AdamW, lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0)


class CircuitModel(L.LightningModule):
    """Predicts ``targets`` from ``tokens``, (batch, position) each; the loss is the mean over the targets that count.

    Args:
        optimizer: makes the optimizer from the parameters. Default: AdamW as in Nanda et al., 2023.
        warm_up: steps over which the learning rate rises linearly to its value.
        **network: see `CircuitTransformer`.
    """

    def __init__(self, optimizer: Callable[..., Optimizer] = _ADAMW, warm_up: int = 10, **network: Any) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        self.network = CircuitTransformer(**network)
        self.warm_up = warm_up
        self._optimizer = optimizer

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, position, token) for `tokens` (batch, position)."""
        return self.network(tokens)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over the targets of `batch`."""
        tokens, targets = batch
        loss = F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(tokens))
        return loss

    @override
    def configure_optimizers(self) -> Any:
        """Return the optimizer and its warm-up, stepped at every step."""
        optimizer = self._optimizer(self.parameters())
        schedule: LRScheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(self.warm_up, 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

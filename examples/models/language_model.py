"""A next-token language model as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler
from torchmetrics.text import Perplexity
from typing_extensions import override

from examples.models.transformer import ReferenceTransformer

Batch = tuple[Tensor, Tensor]

# The optimizer of the reference experiment.
_SGD = partial(SGD, lr=5.0)
_DECAY = partial(ExponentialLR, gamma=0.95)


class LanguageModel(L.LightningModule):
    """Predicts token t + 1 from the tokens up to t; batches are (tokens, targets), both (position, batch).

    Optimisation is automatic, the loss is the mean over all tokens of the batch, the validation metric is perplexity.

    Args:
        n_tokens: size of the vocabulary.
        width: features of the residual stream.
        n_heads: attention heads.
        hidden: neurons between the two linear maps of a layer.
        n_layers: encoder layers.
        dropout: probability.
        optimizer: makes the optimizer from the parameters. Default: SGD with learning rate 5.
        scheduler: makes the schedule from the optimizer, stepped once per epoch. Default: times 0.95.
    """

    def __init__(
        self,
        n_tokens: int,
        width: int = 200,
        n_heads: int = 4,
        hidden: int = 200,
        n_layers: int = 3,
        dropout: float = 0.2,
        optimizer: Callable[..., Optimizer] = _SGD,
        scheduler: Callable[..., LRScheduler] = _DECAY,
    ) -> None:
        super().__init__()
        # The two factories are code, not numbers: left out, a checkpoint loads with `weights_only=True`.
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.network = ReferenceTransformer(n_tokens, width, n_heads, hidden, n_layers, dropout)
        self.perplexity = Perplexity()
        self._optimizer = optimizer
        self._scheduler = scheduler

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (position, batch, token) for `tokens` (position, batch)."""
        return self.network(tokens)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss over the tokens of `batch`."""
        tokens, targets = batch
        loss = F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())
        self.log("train_loss", loss, prog_bar=True, batch_size=tokens.shape[1])
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add `batch` to the perplexity of the validation split."""
        self._measure(batch, "val_perplexity")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add `batch` to the perplexity of the test split."""
        self._measure(batch, "test_perplexity")

    @override
    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        optimizer = self._optimizer(self.parameters())
        return [optimizer], [self._scheduler(optimizer)]

    def _measure(self, batch: Batch, name: str) -> None:
        tokens, targets = batch
        self.perplexity.update(self(tokens), targets)
        self.log(name, self.perplexity, prog_bar=True, on_step=False, on_epoch=True, batch_size=tokens.shape[1])


def batch_first_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return logits (batch, position, token) for `tokens` (batch, position): the layout in which a trace keeps samples.

    Args:
        model: a language model that is position first inside.
        tokens: token ids, (batch, position).
    """
    with torch.no_grad():
        return model(tokens.T).transpose(0, 1)

"""What capture hands on of one micro-batch: the shares of its samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lightning_gradtrace.capture.shares import Share


@dataclass
class TokenPass:
    """Shares of one loss token of every sample (docs/concepts.md, 2).

    Attributes:
        position: position of the token in the loss of every sample, -1 where none was chosen; shape (sample,), int32.
        token: the token that is predicted there, -1 for none; shape (sample,), int32.
        shares: by parameter.
    """

    position: np.ndarray
    token: np.ndarray
    shares: dict[str, Share]


@dataclass
class MicroBatch:
    """Per-sample gradients of one micro-batch: what capture hands to update.

    Attributes:
        n_samples: number of samples.
        shares: the share of every tracked parameter that the loss reached, by name.
        sample_ids: id of every sample, in slot order; shape (sample,). Filled in by the caller.
        tokens: shares of chosen loss tokens: the first of every sample, the second, and so on.
        n_chosen: number of loss tokens that were chosen in every sample, also those beyond `tokens`; shape (sample,).
        unlike: parameters that were used as they never were before, whose sums are to be checked.
        precision: coarsest dtype that the gradient of each parameter passed while it was computed, by name: how
            closely sums can agree.
    """

    n_samples: int
    shares: dict[str, Share]
    sample_ids: Any = None
    tokens: list[TokenPass] = field(default_factory=list)
    n_chosen: Any = None
    unlike: set[str] = field(default_factory=set)
    precision: dict[str, torch.dtype] = field(default_factory=dict)

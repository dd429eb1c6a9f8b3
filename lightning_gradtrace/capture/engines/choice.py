"""Which engine a run needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from lightning_gradtrace.capture.engines._base import Engine
from lightning_gradtrace.capture.engines.functional import FunctionalEngine
from lightning_gradtrace.capture.engines.loss_tokens import TokenChoice, TokenEngine
from lightning_gradtrace.capture.engines.sample_losses import PerSampleLoss
from lightning_gradtrace.capture.engines.tape import TapeEngine


def make_engine(
    module: nn.Module,
    choices: Sequence[TokenChoice | None] = (),
    per_sample_loss: PerSampleLoss | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    low_precision: bool = False,
) -> Engine[Any]:
    """Return the functional engine for a per-sample loss, else the tape engine, with loss tokens if any are wanted.

    Args:
        module: the model.
        choices: which loss tokens each record needs, None for none.
        per_sample_loss: the user's function.
        context: makes the context in which forward passes run (autocast).
        low_precision: whether forward passes run in half precision.

    Returns:
        The engine.

    Raises:
        ValueError: loss tokens are wanted from the functional engine, or different ones by two records.
    """
    wanted = {choice for choice in choices if choice is not None}
    if not wanted:
        if per_sample_loss is None:
            return TapeEngine()
        return FunctionalEngine(module, per_sample_loss, context, low_precision)
    if per_sample_loss is not None or len(wanted) > 1:
        found = "engine='functional'" if per_sample_loss is not None else f"{len(wanted)} different choices of tokens"
        raise ValueError(
            f"`GradTrace(record=TokenGrads(...))` found {found}, expected `engine='tape'` and one choice of tokens: "
            "loss tokens are told apart in the real backward pass."
        )
    return TokenEngine(choice=wanted.pop())

"""Moments of a step: the end of its closure, and steps within steps, for which torch runs its step hooks twice."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

_TORCH_OPTIMIZER_FILE = inspect.getfile(Optimizer)


def in_outermost_step(optimizer: Optimizer) -> bool:
    """Say, inside a step hook, whether it is the hook of the whole step of the optimizer, not of a step within it.

    Torch wraps `step` of every class to run the hooks. ``class Mine(SGD)`` with ``super().step()`` and something after
    it runs them when the parent's step is done and the weights are not yet where they will be. The wrappers that are
    still running are looked for on the stack, which holds up when a step ends in an exception.
    """
    frame, running = inspect.currentframe(), 0
    while frame is not None and running < 2:
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == _TORCH_OPTIMIZER_FILE:
            running += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return running < 2


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def before_use_of_gradients(note: Callable[[], None]) -> Callable[..., Arguments | None]:
    """Return a step hook that calls a function when a step is about to use its gradients: once its closure has run.

    Lightning clips gradients at the end of the closure, so that no hook of its own stands between clipping and step.
    """

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            note()
            return None

        @functools.wraps(closure)
        def watched(*inner: Any, **named: Any) -> Any:
            result = closure(*inner, **named)
            note()
            return result

        if len(args) > 1:
            return (args[0], watched, *args[2:]), kwargs
        return args, {**kwargs, "closure": watched}

    return hook

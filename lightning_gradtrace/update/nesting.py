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


def after_closure(then: Callable[[], None]) -> Callable[..., Any]:
    """Return a hook before a step that calls something when the step is about to use its gradients.

    That is once the step's closure has run, and at once without a closure.

    Args:
        then: what to call.
    """

    def hook(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            then()
            return None

        @functools.wraps(closure)
        def watched(*inner: Any, **named: Any) -> Any:
            result = closure(*inner, **named)
            then()
            return result

        return ((args[0], watched, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": watched})

    return hook

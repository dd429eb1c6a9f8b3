"""Moments of a step: the end of its closure, what comes right after it, and steps within steps.

Torch runs step hooks for the parent's step within a step as well, and for some optimizers it runs none at all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch.optim import Optimizer

_TORCH_OPTIMIZER_FILE = inspect.getfile(Optimizer)
Moment = Callable[[Optimizer], None]


class Removable(Protocol):
    """A hook that can be taken back."""

    def remove(self) -> None:
        """Take it back."""


def watch_steps(
    optimizer: Optimizer, before: Callable[..., Any], final: Callable[[], None], made: Moment, after: Moment
) -> list[Removable]:
    """Call something at four moments of every step of an optimizer.

    Args:
        optimizer: the optimizer.
        before: called with (optimizer, args, kwargs) before a step.
        final: called when the step is about to use its gradients.
        made: called when the step is done, before all step hooks of others: those may zero the gradients.
        after: called after the step hooks that were there before: what they do to the weights is part of the step.

    Returns:
        What takes all of it back.
    """
    if not _runs_hooks(optimizer):
        return [_Substitute(optimizer, before, after_closure(final), made, after)]
    register = optimizer.register_step_post_hook
    first, last = register(_outermost(made)), register(_outermost(after))
    optimizer._optimizer_step_post_hooks.move_to_end(first.id, last=False)  # type: ignore[attr-defined]
    return [optimizer.register_step_pre_hook(before), _LastHook(optimizer, after_closure(final)), first, last]


def come_last(hooks: Iterable[Removable]) -> None:
    """Let the hooks before a step that see the final gradients come after those that others have registered since.

    Args:
        hooks: from `watch_steps`; not while an optimizer steps.
    """
    for hook in hooks:
        if isinstance(hook, _LastHook):
            hook.come_last()


class _LastHook:
    """A hook before the steps of an optimizer that can come last again."""

    def __init__(self, optimizer: Optimizer, hook: Callable[..., Any]) -> None:
        self._handle = optimizer.register_step_pre_hook(hook)
        self._hooks: Any = optimizer._optimizer_step_pre_hooks  # an `OrderedDict`

    def come_last(self) -> None:
        self._hooks.move_to_end(self._handle.id)

    def remove(self) -> None:
        self._handle.remove()


def _runs_hooks(optimizer: Optimizer) -> bool:
    """Say whether torch runs step hooks; not for a wrapper of an optimizer that does not call `Optimizer.__init__`."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return getattr(type(optimizer).step, "hooked", False) and all(hasattr(optimizer, name) for name in names)


def _outermost(moment: Moment) -> Callable[..., None]:
    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if in_outermost_step(optimizer):
            moment(optimizer)

    return hook


class _Substitute:
    """Stands in for the `step` of one optimizer, for which torch runs no hooks; see `watch_steps`."""

    def __init__(
        self, optimizer: Optimizer, before: Callable[..., Any], final: Callable[..., Any], made: Moment, after: Moment
    ) -> None:
        self._optimizer, self._own = optimizer, vars(optimizer).get("step")
        self._watching, step = True, optimizer.step

        @functools.wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._watching:
                return step(*args, **kwargs)
            before(optimizer, (optimizer, *args), kwargs)
            given, kwargs = final(optimizer, (optimizer, *args), kwargs) or ((optimizer, *args), kwargs)
            result = step(*given[1:], **kwargs)
            made(optimizer)
            after(optimizer)
            return result

        self._step = vars(optimizer)["step"] = watched

    def remove(self) -> None:
        """Put the `step` back, unless somebody has wrapped it since; then it only passes calls on."""
        self._watching, attributes = False, vars(self._optimizer)
        if attributes.get("step") is self._step:
            if self._own is None:
                del attributes["step"]
            else:
                attributes["step"] = self._own


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

"""When a hook of the callback fails, the trace ends with the reason, and `on_error` decides about the training."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")


class Guarded(Protocol):
    """A callback whose hooks are guarded."""

    _run: Any
    _state: dict[str, Any]

    @property
    def on_error(self) -> str:
        """What to do about an error: "raise" or "disable"."""

    def _close(self, *, complete: bool, reason: str | None = None) -> None:
        """End the trace."""


G = TypeVar("G", bound=Guarded)


def guarded(hook: Callable[Concatenate[G, P], None]) -> Callable[Concatenate[G, P], None]:
    """Run a hook only while a trace is being written, and treat its errors as `on_error` says."""

    @functools.wraps(hook)
    def run(self: G, *args: P.args, **kwargs: P.kwargs) -> None:
        if self._run is None:
            return
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._close(complete=False, reason=reason)
            if self.on_error == "raise":
                raise
            self._state["ended"] = reason
            warnings.warn(f"GradTrace stopped recording, training goes on: {reason}", stacklevel=2)

    return run


def refuse_to_resume(path: Any, state: dict[str, Any], on_error: str) -> dict[str, Any]:
    """Go on without a trace, or not at all: the one of the checkpoint ended before the checkpoint was made.

    Args:
        path: where the trace is.
        state: what the checkpoint holds of the callback; ``ended`` says why the trace ended.
        on_error: "raise" or "disable".

    Returns:
        The state of a callback that records nothing, for later checkpoints.

    Raises:
        ValueError: if ``on_error`` says so.
    """
    message = (
        f"GradTrace stopped recording `{path}` before this checkpoint was made ({state['ended']}), so the trace can't "
        "be resumed without a gap. Resume from an earlier checkpoint, or give `GradTrace` a new path to record what "
        "comes now"
    )
    if on_error == "raise":
        raise ValueError(message)
    warnings.warn(f"{message}. Training goes on without recording", stacklevel=3)
    return state

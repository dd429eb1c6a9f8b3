"""Look inside torch's Python-level functions while a function mode is active, and take a mode off for a while.

`torch.nn.functional.multi_head_attention_forward` and its like begin by handing themselves to the active mode, so
that a mode that calls them again is handed the same call for ever. The twin of such a function has the same code but
is told that nobody overrides it: its body runs, and every built-in function inside reaches the mode as usual.
Nothing global is replaced.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _nobody_overrides(*_: Any) -> bool:
    return False


@functools.cache
def opened(func: types.FunctionType) -> Callable[..., Any]:
    """Return the twin of a Python-level torch function whose body runs under an active function mode.

    Args:
        func: a function written in Python that dispatches through ``has_torch_function``.

    Returns:
        A function with the same code, defaults and closure.
    """
    namespace = dict(func.__globals__)
    namespace.update(dict.fromkeys(_CHECKS, _nobody_overrides))
    twin = types.FunctionType(func.__code__, namespace, func.__name__, func.__defaults__, func.__closure__)
    twin.__kwdefaults__ = func.__kwdefaults__
    return twin


def deactivate(mode: TorchFunctionMode) -> None:
    """Take a mode off the stack of active function modes, wherever it stands; nothing happens if it is not there."""
    if not any(active is mode for active in _get_current_function_mode_stack()):
        return
    above = []
    while (active := _pop_mode()) is not mode:
        above.append(active)
    for active in reversed(above):
        _push_mode(active)

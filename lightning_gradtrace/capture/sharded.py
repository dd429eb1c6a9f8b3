"""Parameters that FSDP2 swaps: modules hold pieces, and whole tensors only while they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.overrides import _get_current_function_mode_stack

from lightning_gradtrace.capture.tape import Tape


def bring_to_rest(module: nn.Module) -> None:
    """Let modules hold their pieces again; after a validation the outermost one still holds whole tensors."""
    for part in module.modules():
        if _is_fsdp(part):
            part.reshard()  # type: ignore[operator]


def _is_fsdp(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync") and hasattr(module, "reshard")


def watch_unsharding(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """Tell the active tape which whole tensor stands for which parameter, whenever modules gather theirs.

    Args:
        module: the model; some of its modules are FSDP modules.
        names: the tracked parameters.

    Returns:
        Handles of hooks, to be removed after the training.
    """
    wrapped = {path: part for path, part in module.named_modules() if _is_fsdp(part)}
    own: dict[str, list[str]] = {path: [] for path in wrapped}
    for name in names:
        # A parameter belongs to the innermost FSDP module around it, and is whole when that one begins to run.
        around = [path for path in wrapped if not path or name.startswith(f"{path}.")]
        if around:
            own[max(around, key=len)].append(name)
    # Behind FSDP2's own hook, which gathers the parameters.
    return [wrapped[path].register_forward_pre_hook(_hook(module, found)) for path, found in own.items() if found]


def _hook(module: nn.Module, names: Sequence[str]) -> Callable[..., None]:
    def tell(*_: Any) -> None:
        tapes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Tape)]
        for tape in tapes:
            for name in names:
                tape.meet(name, module.get_parameter(name))

    return tell

"""Compiled code and TorchScript are closed to the tape: say so at setup instead of recording nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def compiled_parts(module: nn.Module) -> list[str]:
    """Return what of a model was compiled with ``torch.compile``, by name: modules, and methods of the model itself."""
    found = list[str]()
    for name, part in module.named_modules():
        whole = type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None
        methods = [method for method in ("forward", "training_step") if _is_compiled(getattr(part, method, None))]
        names = [name or type(part).__name__] if whole else [f"{name}.{one}" if name else one for one in methods]
        found.extend(names)
    return found


def _is_compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")


def check_not_compiled(module: nn.Module) -> None:
    """Refuse a compiled model.

    Raises:
        ValueError: names the compiled parts and says what to do.
    """
    parts = compiled_parts(module)
    if parts:
        names = ", ".join(f"`{part}`" for part in parts[:5]) + (", ..." if len(parts) > 5 else "")
        raise ValueError(
            f"GradTrace: {names} of `{type(module).__name__}` was compiled with `torch.compile`. Inside compiled code "
            "the uses of a parameter can't be seen, and running it uncompiled would change the training. Train the "
            "model as it was before `torch.compile`, or without this callback."
        )


def check_not_scripted(module: nn.Module, tracked: Mapping[str, Tensor]) -> None:
    """Refuse tracked parameters of modules that are TorchScript; what else of a model is, hides nothing.

    Args:
        module: the model.
        tracked: the tracked parameters by name.

    Raises:
        ValueError: names such a module and its tracked parameters, and says what to do.
    """
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            own = {id(p) for p in part.parameters()}
            hidden = [f"`{name}`" for name, p in tracked.items() if id(p) in own]
            if hidden:
                raise ValueError(
                    f"GradTrace: `{path or type(part).__name__}` of `{type(module).__name__}` is TorchScript "
                    f"(`torch.jit.script` or `torch.jit.trace`). Inside of it the uses of {', '.join(hidden[:5])}"
                    f"{', ...' if len(hidden) > 5 else ''} can't be seen. Train with the module as it was before and "
                    "script it after the training, leave these parameters out with `GradTrace(params=...)`, or give "
                    '`engine="functional"` a loss per sample.'
                )

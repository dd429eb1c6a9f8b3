"""Compiled code is closed to the tape: say so at setup instead of recording nothing."""

from __future__ import annotations

from typing import Any

from torch import nn


def compiled_parts(module: nn.Module) -> list[str]:
    """Return what of a model was compiled with ``torch.compile``, by name: modules, and methods of the model itself."""
    found = []
    for name, part in module.named_modules():
        whole = type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None
        methods = [method for method in ("forward", "training_step") if _is_compiled(getattr(part, method, None))]
        if whole:
            found.append(name or type(part).__name__)
        found.extend(f"{name}.{method}" if name else method for method in methods)
    return list(dict.fromkeys(found))


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

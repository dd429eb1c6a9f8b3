"""The model of a command: whatever a function of the user's returns."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lightning_gradtrace.cli._output import plain

if TYPE_CHECKING:
    from torch import nn

HOW = "write --model package.module:function or --model file.py:function"


def load_model(spec: str | None, arguments: Sequence[str] | None = None) -> tuple[nn.Module, Any]:
    """Call the user's function and return the model and how to call it.

    The function returns the trained model, or the pair (model, forward) where forward(model, tokens) returns logits of
    shape (sample, position, vocabulary) for token ids (sample, position). Modules are looked for in the current folder
    too, as `python -m` does.

    Args:
        spec: "module:function" or "file.py:function".
        arguments: what the function is called with.
    """
    from torch import nn

    if spec is None:
        raise typer.BadParameter(f"this needs the trained model: {HOW}", param_hint="--model")
    made = _function(spec)(*(arguments or ()))
    model, forward = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (forward is None or callable(forward)):
        raise typer.BadParameter(
            f"`{plain(spec)}` returned {type(made).__name__}, expected a torch.nn.Module or (model, forward)",
            param_hint="--model",
        )
    return model, forward


def _function(spec: str) -> Callable[..., Any]:
    place, colon, name = spec.rpartition(":")
    if not (colon and place and name.isidentifier()):
        raise typer.BadParameter(f"`{plain(spec)}` names no function: {HOW}", param_hint="--model")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module = _of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise typer.BadParameter(f"`{plain(place)}` has no function `{name}`: {HOW}", param_hint="--model")
    return function


def _of_file(file: Path) -> Any:
    if not file.is_file():
        raise typer.BadParameter(f"there is no file `{plain(str(file))}`: {HOW}", param_hint="--model")
    spec = importlib.util.spec_from_file_location(f"gradtrace_model_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as importing it would: dataclasses and pickles look for it there
    spec.loader.exec_module(module)
    return module

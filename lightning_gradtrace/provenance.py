"""Where a trace comes from: versions, model, optimizer and configuration, as plain JSON."""

from __future__ import annotations

import json
import platform
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

PACKAGES = ("lightning-gradtrace", "torch", "lightning", "zarr", "numcodecs", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a trace depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that was never installed
            found[package] = "unknown"
    return found


def describe_model(module: nn.Module) -> dict[str, Any]:
    """Return the class of a model and its number of parameters."""
    return {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "n_parameters": sum(p.numel() for p in module.parameters()),
    }


def describe_optimizers(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """Return class and hyperparameters of every optimizer, group by group."""
    return [
        {
            "class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "groups": [plain({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups],
        }
        for optimizer in optimizers
    ]


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it; what JSON does not know is kept as its text."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return str(value)


def trace_attributes(trainer: Any, module: Any, settings: Mapping[str, Any], user: Any) -> dict[str, Any]:
    """Return the attributes that a trace carries from its beginning.

    Args:
        trainer: Lightning's trainer.
        module: the LightningModule.
        settings: the arguments of GradTrace; ``quantity`` among them.
        user: what the user wants to be kept.
    """
    names = ("max_epochs", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision")
    config = {
        "gradtrace": settings,
        "trainer": {name: getattr(trainer, name) for name in names},
        "hparams": module.hparams,
        "user": user,
    }
    return {
        "run_id": uuid.uuid4().hex,  # drawn by the system: the training's random numbers stay what they are
        "quantity": settings["quantity"],
        "versions": versions(),
        "model": describe_model(module),
        "optimizer": describe_optimizers(trainer.optimizers),
        "config": plain(config),
    }

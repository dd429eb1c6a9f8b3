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

from lightning_gradtrace.capture.parameters import TrackedParameter
from lightning_gradtrace.record import Record
from lightning_gradtrace.update import UpdateRule, rule_for
from lightning_gradtrace.update._generic import GenericRule

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


def describe_optimizers(optimizers: Sequence[Optimizer], tracked: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Return class, rule and hyperparameters of every optimizer, group by group.

    Args:
        optimizers: the optimizers.
        tracked: tracked parameters by name; each group lists the names of its own under ``tracked``.
    """
    names = {id(p): name for name, p in tracked.items()}

    def describe_group(group: Mapping[str, Any]) -> dict[str, Any]:
        of_group = [names[id(p)] for p in group["params"] if id(p) in names]
        return {**plain({k: v for k, v in group.items() if k != "params"}), "tracked": of_group}

    return [
        {
            "class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "groups": [describe_group(group) for group in optimizer.param_groups],
            **_describe_rule(rule_for(optimizer)),
        }
        for optimizer in optimizers
    ]


def _describe_rule(rule: UpdateRule | None) -> dict[str, Any]:
    """Name the rule by which steps are divided, None for the generic one, and what residuals it leaves."""
    known = GenericRule() if rule is None else rule
    return {
        "rule": None if rule is None else type(rule).__name__.removesuffix("Rule"),
        "residual_tolerance": {"single": known.tolerance, "half": known.half_tolerance},
    }


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


def trace_attributes(
    trainer: Any,
    module: Any,
    settings: Mapping[str, Any],
    user: Any,
    tracked: Sequence[TrackedParameter],
    records: Sequence[Record],
) -> dict[str, Any]:
    """Return the attributes that a trace carries from its beginning.

    Args:
        trainer: Lightning's trainer.
        module: the LightningModule.
        settings: the arguments of GradTrace; ``quantity`` among them.
        user: what the user wants to be kept.
        tracked: the tracked parameters.
        records: what is kept.
    """
    names = ("max_epochs", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision")
    parameters = dict(module.named_parameters(remove_duplicate=False))
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
        "optimizer": describe_optimizers(trainer.optimizers, {p.name: parameters[p.name] for p in tracked}),
        "config": plain(config),
        "records": plain({record.group: record.describe() for record in records}),
    }

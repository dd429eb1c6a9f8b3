"""Checks of a user's arguments; every error names the argument, what was found and what is allowed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from lightning_gradtrace.record import Record, Schedule


def check_engine(engine: str, per_sample_loss: Any) -> None:
    """Raise if the engine and `per_sample_loss` don't go together."""
    check_choice("engine", engine, ("tape", "functional"))
    if (engine == "functional") != callable(per_sample_loss):
        raise ValueError(
            f"`GradTrace(engine={engine!r}, per_sample_loss={per_sample_loss!r})`: expected a callable(module, batch) "
            'that returns one loss per sample with `engine="functional"`, and None with `engine="tape"`'
        )


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Check that an argument of GradTrace is one of a few values.

    Raises:
        ValueError: it is not.
    """
    if not any(value is choice or (value == choice and type(value) is type(choice)) for choice in allowed):
        listed = ", ".join(f"`{choice}`" for choice in allowed)
        raise ValueError(f"`GradTrace({name}={value!r})`: expected one of {listed}")


def check_interval(name: str, value: Any, *, optional: bool) -> None:
    """Check that an argument of GradTrace is a number of steps.

    Raises:
        ValueError: it is no whole number of at least 1, nor None where that is allowed.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        expected = "a whole number of steps, at least 1" + (", or None" if optional else "")
        raise ValueError(f"`GradTrace({name}={value!r})`: expected {expected}")


def as_records(record: Any) -> list[Record]:
    """Return the records of a user as a list.

    Raises:
        TypeError: there is something that is no record, such as a number or a class.
    """
    records = list(record) if isinstance(record, Iterable) and not isinstance(record, str | type) else [record]
    for one in records:
        if not isinstance(one, Record):
            raise TypeError(
                f"`GradTrace(record=...)`: found {one!r}, expected a record such as `TopK(1000)`, or a list of records"
            )
    return records


def check_params(params: Any) -> None:
    """Check what is to be tracked, as far as that is possible without the model.

    Raises:
        TypeError: neither None nor a glob, several globs or a predicate.
    """
    if params is None or isinstance(params, str) or callable(params):
        return
    if not isinstance(params, Collection) or not all(isinstance(one, str) for one in params):
        raise TypeError(
            f"`GradTrace(params={params!r})`: expected a glob or a list of globs on the names of parameters, "
            "a predicate(name, parameter), or None"
        )


def check_settings(settings: Any) -> None:
    """Check the arguments of GradTrace, given an object that has them as attributes.

    Raises:
        TypeError: `params` is of another kind.
        ValueError: one is out of range.
    """
    check_params(settings.params)
    check_choice("quantity", settings.quantity, ("shift", "gradient"))
    check_engine(settings.engine, settings.per_sample_loss)
    check_choice("batch_axis", settings.batch_axis, ("auto", 0, 1))
    check_choice("on_error", settings.on_error, ("raise", "disable"))
    check_interval("every_n_steps", settings.every_n_steps, optional=False)
    check_interval("ledger_every_n_steps", settings.ledger_every_n_steps, optional=True)
    if not isinstance(settings.weights_every_n_steps, Schedule):
        check_interval("weights_every_n_steps", settings.weights_every_n_steps, optional=True)
    groups = [record.group for record in settings.records]
    if not groups or len(set(groups)) < len(groups):
        raise ValueError(
            f"`GradTrace(record=...)`: found records {settings.records}, expected at least one and no two that write "
            "the same arrays"
        )


def check_trainer(trainer: Any, kind: type) -> None:
    """Refuse a Trainer of another package, such as `pytorch_lightning`, whose classes have the same names.

    Args:
        trainer: what called the callback.
        kind: the class that it should have.

    Raises:
        TypeError: says where the Trainer comes from and what to do.
    """
    if not isinstance(trainer, kind):
        package = type(trainer).__module__.partition(".")[0]
        raise TypeError(
            f"GradTrace: the Trainer comes from the package `{package}`, expected one of `lightning`: their classes "
            "have the same names and are not the same. Make the Trainer and the model with "
            f"`import lightning.pytorch as pl`. For a library that imports `{package}` itself, put `lightning.pytorch` "
            "in its place before you import the library: `import sys, lightning.pytorch; "
            f'sys.modules["{package}"] = lightning.pytorch`.'
        )

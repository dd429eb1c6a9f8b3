"""What a run is going to write, in a sentence, before it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_gradtrace.record._base import ParameterInfo, Record
from lightning_gradtrace.record.factored import Factored
from lightning_gradtrace.record.plan import plan
from lightning_gradtrace.store.target import Target, describe, free_bytes


@dataclass
class Outlook:
    """The accounting of a run before it begins.

    Attributes:
        text: one sentence: bytes, steps, place and free space.
        fits: whether the prediction is below the free space; True where that can't be known.
    """

    text: str
    fits: bool

    @property
    def warning(self) -> str:
        """What to say if it does not fit."""
        return (
            f"{self.text}. Keep less (a smaller k, `every_n_steps`, a schedule), track fewer parameters, or choose "
            "another place"
        )


def look_ahead(
    target: Target,
    infos: Sequence[ParameterInfo],
    records: Sequence[Record],
    n_steps: float,
    n_samples: int | None,
    every_n_steps: int = 1,
) -> Outlook:
    """Predict what a run is going to write and compare it with the space that is free.

    Args:
        target: where the trace goes.
        infos: the tracked parameters.
        records: what is kept.
        n_steps: optimizer steps of the run; infinite if unknown.
        n_samples: samples of a step; None if unknown.
        every_n_steps: as in `GradTrace`.
    """
    known = math.isfinite(n_steps) and n_samples is not None
    count = int(n_steps) if known else every_n_steps
    table = plan(infos, records, count, n_samples or 1, every_n_steps=every_n_steps)
    of_rows = table if known else table[table["rows"] > 0]
    size = int(of_rows["bytes"].sum())
    free = free_bytes(target)
    about = "at most" if any(isinstance(record, Factored) for record in records) else "about"
    place = f"to `{describe(target)}`" + ("" if free is None else f", where {readable(free)} are free")
    if known:
        return Outlook(
            f"this run will write {about} {readable(size)} in {count:,} steps {place}", free is None or size < free
        )
    per = "step" if n_samples is not None else "sample"
    unknown = "steps" if n_samples is not None else "samples of a step"
    text = f"this run will write {about} {readable(size)} per {per} {place}; the number of its {unknown} is not known"
    return Outlook(text, True)


def readable(n_bytes: float) -> str:
    """Write a number of bytes for people.

    Example::

        >>> readable(1_870_000_000), readable(930)
        ('1.9 GB', '930 B')
    """
    value, units = float(n_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}" if value < 9.95 and units[0] != "B" else f"{value:.0f} {units[0]}"


def samples_per_step(loader: Any, n_batches: int = 1) -> int | None:
    """Return the number of samples of an optimizer step, as a dataloader says; None if it doesn't.

    Args:
        loader: the training dataloader.
        n_batches: batches of a step, of all micro-batches and ranks.
    """
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(holder, "batch_size", None)
        if isinstance(size, int) and not isinstance(size, bool):
            return size * n_batches
    return None

"""Opening a trace for a command, and watching how far a pass over its record has come."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from lightning_gradtrace.cli._output import plain

if TYPE_CHECKING:
    import pandas as pd

    from lightning_gradtrace.store import Trace


def open_for(path: str, record: str | None = None) -> Trace:
    """Open a trace, with one of its TopK records chosen.

    Args:
        path: path or URL.
        record: "topk", "topk_step", or None for what the trace prefers.
    """
    from lightning_gradtrace.store import open_trace

    trace = open_trace(path)
    try:
        return trace if record is None else trace.using(record)
    except AttributeError as error:
        raise typer.BadParameter(str(error), param_hint="--record") from None


def parse_steps(text: str | None) -> slice | int | None:
    """Read a range of steps.

    Example:
        >>> parse_steps("100:200"), parse_steps(":5"), parse_steps("7"), parse_steps(None)
        (slice(100, 200, None), slice(None, 5, None), 7, None)
    """
    if text is None:
        return None
    first, colon, last = text.partition(":")
    try:
        numbers = [int(part) if part.strip() else None for part in (first, last)]
    except ValueError:
        numbers = []
    if not numbers or (not colon and numbers[0] is None) or any(n is not None and n < 0 for n in numbers):
        raise typer.BadParameter(
            f"{text!r} is no range of steps; write 100:200, 100:, :200 or 150", param_hint="--steps"
        )
    if not colon:
        return numbers[0]
    if None not in numbers and numbers[0] > numbers[1]:  # type: ignore[operator]
        raise typer.BadParameter(f"{text!r} ends before it begins", param_hint="--steps")
    return slice(*numbers)


def parse_heads(text: str | None) -> int | dict[str, int] | None:
    """Read numbers of heads: one number, or `glob=number` separated by commas.

    Example:
        >>> parse_heads("4"), parse_heads("encoder.*=4,decoder.*=8")
        (4, {'encoder.*': 4, 'decoder.*': 8})
    """
    if text is None:
        return None
    try:
        if "=" not in text:
            return int(text)
        pairs = [part.rpartition("=") for part in text.split(",")]
        return {glob: int(number) for glob, _, number in pairs}
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no number of heads; write 4, or encoder.*=4,decoder.*=8", param_hint="--heads"
        ) from None


@contextmanager
def working(what: str, trace: Trace | None = None) -> Iterator[Any]:
    """Show on stderr, if it is a terminal, that something is done, and how far a pass over the record has come.

    Args:
        what: what is done.
        trace: whose record is read.

    Yields:
        The trace to hand to the analysis: the same one, whose record reports each block that is read.
    """
    if not sys.stderr.isatty():
        yield trace
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(what), total=None)
        if trace is None:
            yield None
            return

        def advance(done: int) -> None:
            progress.update(task, completed=done, total=max(1, trace.n_occurrences))

        yield watched(trace, advance)


@contextmanager
def cluster(address: str | None) -> Iterator[Any]:
    """Connect to a dask scheduler; without an address the work is done here.

    Args:
        address: of the scheduler. Its workers must be able to open the trace by the same path.

    Yields:
        A `dask.distributed.Client`, or None.
    """
    if address is None:
        yield None
        return
    from dask.distributed import Client

    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"no dask scheduler answers at `{plain(address)}` ({plain(str(error))}); start one with `dask scheduler`",
            param_hint="--scheduler",
        ) from None
    with client:
        yield client


@contextmanager
def reading(what: str, path: str, record: str | None, scheduler: str | None) -> Iterator[tuple[Any, Any]]:
    """Open a trace for a pass over its record: `open_for`, `working` and `cluster` in one.

    Args:
        what: what is done.
        path: path or URL of the trace.
        record: as in `open_for`.
        scheduler: as in `cluster`.

    Yields:
        The trace to hand to the analysis, and a client or None.
    """
    with working(what, open_for(path, record)) as trace, cluster(scheduler) as client:
        yield trace, client


def heads_for(trace: Trace, by: str, number: int | dict[str, int] | None) -> pd.DataFrame | None:
    """Return the attention heads where `by` asks for heads, None elsewhere.

    Args:
        trace: an open trace.
        by: what results are grouped by.
        number: of heads, from `parse_heads`.
    """
    from lightning_gradtrace import analysis

    return analysis.attention_heads(trace, number) if by in ("head", "head_part") else None


def watched(trace: Trace, advance: Any) -> Trace:
    """Return a copy of a trace that calls `advance` with the occurrence that a pass over its record has reached."""
    import copy

    class Watched(type(trace)):  # type: ignore[misc]
        def __reduce__(self) -> Any:
            return copy.copy, (trace,)  # a worker elsewhere gets the trace itself

        @property
        def topk(self) -> Any:
            view = super().topk
            read = view.blocks

            def blocks(*args: Any, **kwargs: Any) -> Iterator[Any]:
                for block in read(*args, **kwargs):
                    yield block
                    if block.occurrence.size:
                        advance(int(block.occurrence[-1]) + 1)

            view.blocks = blocks
            return view

    other = copy.copy(trace)
    other.__class__ = Watched
    return other

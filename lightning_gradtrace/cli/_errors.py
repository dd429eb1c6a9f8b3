"""Exit codes, and errors as one sentence instead of a traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from lightning_gradtrace.cli._output import plain

FOUND, USAGE, NO_TRACE, FILES, FAULT = 1, 2, 3, 4, 70


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that an error ends it with one sentence on stderr and its exit code.

    Args:
        command: function of a command; its signature is kept, since its options are read from it.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            # The reader (such as `head`) has what it wanted. Nothing more can be written, not even at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(128 + 13) from None
        except Exception as error:
            code = exit_code(error)
            if code is None or os.environ.get("GRADTRACE_TRACEBACK"):
                raise
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            kind = f"unexpected {type(error).__name__}: " if code == FAULT else ""
            typer.echo(f"gradtrace: {kind}{plain(str(text))}", err=True)
            if code == FAULT:
                typer.echo("This is a fault of gradtrace; GRADTRACE_TRACEBACK=1 shows where it happened.", err=True)
            raise typer.Exit(code) from None

    return run


def exit_code(error: Exception) -> int | None:
    """Return the exit code of an error, None for those that typer handles itself."""
    if isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "exit_code"):
        return None
    if type(error).__name__ == "StoreError":  # asked by name: importing the store takes a while
        return NO_TRACE
    if isinstance(error, (ImportError, OSError)):
        return FILES
    # What analyses raise on arguments that don't fit, and traces on names that they don't have: a sentence. A KeyError
    # that is nothing but the key is a fault, as is everything else.
    if isinstance(error, ValueError) or (isinstance(error, KeyError) and " " in str(error.args[:1])):
        return USAGE
    return FAULT

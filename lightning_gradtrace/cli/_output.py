"""Tables on a terminal, as JSON and as CSV."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

_WIDEST = 48
SUFFIXES = (".csv", ".json")


def check_output(output: Path | None) -> None:
    """Raise early, before anything is computed, if a result could not be written to this file.

    Args:
        output: the file, None for none.
    """
    if output is None:
        return
    if output.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(f"`{plain(str(output))}` ends neither in .csv nor in .json", param_hint="--output")
    if output.is_dir():
        raise typer.BadParameter(f"`{plain(str(output))}` is a folder, expected a file", param_hint="--output")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"there is no folder `{plain(str(output.parent))}`", param_hint="--output")


def emit(command: str, table: pd.DataFrame, as_json: bool, output: Path | None, rows: int = 20) -> None:
    """Show a table: the first rows as text, or all of it as JSON, or all of it in a file.

    Args:
        command: name of the command, part of the JSON document.
        table: the result.
        as_json: print JSON.
        output: write to this file, by its suffix; nothing is printed to stdout then.
        rows: rows of the text; 0 for all.
    """
    if output is not None:
        text = to_csv(table) if output.suffix.lower() == ".csv" else to_json(command, table)
        write_whole(output, text)
        typer.echo(f"{len(table):,} rows written to {plain(str(output))}", err=True)
    if as_json:
        typer.echo(to_json(command, table), nl=False)
    elif output is None:
        shown = table.head(rows) if rows else table
        typer.echo(as_text(shown))
        if len(shown) < len(table):
            typer.echo(f"({len(table) - len(shown):,} more rows: --rows 0, --json or --output FILE.csv)")


def write_whole(file: Path, text: str) -> None:
    """Write a file in one piece: it is there as a whole, or what was there before is."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def to_json(command: str, table: pd.DataFrame) -> str:
    """Return a table as a JSON document: `command`, `columns`, and `rows` as a list of objects.

    Numbers that are not finite become null: strict JSON has none.
    """
    columns = [str(c) for c in table.columns]
    rows = [dict(zip(columns, map(json_value, row), strict=True)) for row in table.itertuples(index=False, name=None)]
    return json.dumps({"command": command, "columns": columns, "rows": rows}, ensure_ascii=False, indent=1) + "\n"


def json_value(value: Any) -> Any:
    """Return a cell in types that JSON has."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [json_value(one) for one in value]
    if isinstance(value, dict):
        return {str(k): json_value(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float)) or value is None else str(value)


def to_csv(table: pd.DataFrame) -> str:
    """Return a table as CSV with a header line; tuples of tokens become JSON lists.

    Only an empty field is a missing value. Read it back with
    `pandas.read_csv(file, keep_default_na=False, na_values=[""])`: a token may read "NA", and a control is "null".
    """
    lists = {
        name: [json.dumps(json_value(v), ensure_ascii=False) for v in column]
        for name, column in table.items()
        if len(column) and isinstance(column.iloc[0], (tuple, list, dict))
    }
    return table.assign(**{str(k): v for k, v in lists.items()}).to_csv(index=False)


def as_text(table: pd.DataFrame) -> str:
    """Lay a table out for a terminal: numbers to the right, long cells cut, control characters shown."""
    if table.empty:
        return f"no rows (columns: {', '.join(map(str, table.columns))})"
    cells = {str(name): [cell(value) for value in column] for name, column in table.items()}
    right = {str(name): column.dtype.kind in "iuf" and not hasattr(column, "cat") for name, column in table.items()}
    widths = {name: max(len(name), *(len(text) for text in column)) for name, column in cells.items()}
    lines = [list(cells), ["-" * width for width in widths.values()]]
    lines += [list(row) for row in zip(*cells.values(), strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right[name] else text.ljust(width)
            for text, (name, width) in zip(line, widths.items(), strict=True)
        ).rstrip()
        for line in lines
    )


def cell(value: Any) -> str:
    """Return a cell as text of at most 48 characters.

    Example:
        >>> cell(0.000123456), cell(1234.0), cell(float("nan")), cell(("a", "b")), len(cell("x" * 60))
        ('0.0001235', '1234', '-', 'a b', 48)
    """
    if isinstance(value, (tuple, list)):
        text = " ".join(map(str, value))
    elif isinstance(value, float) or (hasattr(value, "dtype") and getattr(value.dtype, "kind", "") == "f"):
        text = "-" if math.isnan(value) else f"{value:.4g}"
        text = f"{value:.0f}" if "e+" in text and abs(value) < 1e9 else text
    else:
        text = str(value)
    text = plain(text)
    if len(text) <= _WIDEST:
        return text
    if isinstance(value, (tuple, list)):
        return text[: _WIDEST - 1] + "…"
    tail = _WIDEST * 2 // 3  # of a dotted name the end says more
    return text[: _WIDEST - 1 - tail] + "…" + text[-tail:]


def plain(text: str) -> str:
    r"""Show control characters instead of sending them to a terminal: a token may hold any.

    Example:
        >>> print(plain("a\x1b[31mb\nc"))
        a\x1b[31mb\nc
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

"""The tables of a report: which there are, what they must hold, and how they become CSV files and come back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

Tables = Mapping[str, pd.DataFrame]

# Columns that hold a tuple per row; in a CSV file they are JSON lists, so that tokens may hold any character.
_TUPLES = ("tokens", "text")


@dataclass(frozen=True)
class TableSpec:
    """One table of a report: what it is, the columns that figures and page read, and whether it may be left out."""

    meaning: str
    columns: tuple[str, ...]
    optional: bool = False


_CONTROL = ("control", "measure", "value", "control_value", "effect", "low", "high")

TABLES: dict[str, TableSpec] = {
    "run": TableSpec("what was run, and whether the ledger balances", ("name", "value")),
    "steps": TableSpec("one row per optimizer step", ("step", "epoch", "loss", "residual")),
    "frequencies": TableSpec("how many entries were selected how often", ("count", "entries")),
    "entries": TableSpec("the most frequently selected entries", ("entry", "param", "index", "count")),
    "notable": TableSpec("notable tokens of each entry", ("entry", "token", "text", "count", "relative")),
    "neurons": TableSpec(
        "neurons with their notable tokens",
        ("param", "axis", "neuron", "n_entries", "n_samples", "n_notable", "tokens", "text"),
    ),
    "ablation": TableSpec(
        "flipped predictions of ablated neurons",
        ("param", "axis", "neuron", "n_samples", "flips", "flipped_tokens", "notable_flipped"),
    ),
    "controls": TableSpec("controls neuron by neuron", ("param", "axis", "neuron", *_CONTROL)),
    "pooled": TableSpec("controls averaged over neurons", ("neurons", *_CONTROL)),
    "layers": TableSpec("the post's layer table", ("param", "neurons", "mean_flipped_tokens", "notable_share")),
    "movement": TableSpec("movement of neurons over time", ("param", "axis", "neuron", "step", "moved"), True),
    "samples": TableSpec(
        "the samples that moved each neuron most", ("param", "axis", "neuron", "rank", "sample_id", "moved"), True
    ),
    "texts": TableSpec("the tokens of these samples", ("sample_id", "text"), True),
    "changes": TableSpec("change points of the loss", ("step", "before", "after"), True),
    "phases": TableSpec(
        "where several series change together", ("first_step", "last_step", "series", "of", "expected", "names"), True
    ),
    "flips": TableSpec(
        "flipped predictions token by token", ("param", "axis", "neuron", "text", "flips", "count", "proportion"), True
    ),
}
REQUIRED = tuple(name for name, spec in TABLES.items() if not spec.optional)


def check_tables(tables: Tables, required: Sequence[str] = REQUIRED) -> None:
    """Raise unless the tables are there and hold the columns that a report reads.

    Args:
        tables: by name.
        required: names that must be there.

    Raises:
        ValueError: a table or a column is missing, or a table has an unknown name.

    Example:
        >>> check_tables({"run": pd.DataFrame({"name": []})}, required=["run"])
        Traceback (most recent call last):
        ValueError: table `run` has the columns ['name'], but lacks ['value']; a report needs ['name', 'value']
    """
    unknown = [name for name in tables if name not in TABLES]
    missing = [name for name in required if name not in tables]
    if unknown or missing:
        raise ValueError(
            f"tables {sorted(tables)} given, of which {unknown} are unknown and {missing} are missing; "
            f"a report is made from {list(TABLES)}"
        )
    for name, table in tables.items():
        needed = TABLES[name].columns
        lacking = [column for column in needed if column not in table.columns]
        if lacking:
            raise ValueError(
                f"table `{name}` has the columns {list(table.columns)}, but lacks {lacking}; "
                f"a report needs {list(needed)}"
            )


def write_tables(folder: str | os.PathLike[str], tables: Tables) -> list[Path]:
    """Write each table as ``<name>.csv``; columns with tuples of tokens are written as JSON lists.

    Args:
        folder: made if it does not exist.
        tables: by name, of `TABLES`; not all of them need to be there.

    Raises:
        ValueError: as in `check_tables`.
    """
    check_tables(tables, required=())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, table in tables.items():
        lists = {c: [_as_json(v) for v in table[c]] for c in _TUPLES if c in table.columns and _holds_tuples(table[c])}
        files.append(folder / f"{name}.csv")
        table.assign(**lists).to_csv(files[-1], index=False)
    return files


def read_tables(folder: str | os.PathLike[str]) -> dict[str, pd.DataFrame]:
    """Read back what `write_tables` wrote.

    Args:
        folder: with files ``<name>.csv``; others are left alone.

    Returns:
        Tables by name, tuples restored.

    Raises:
        FileNotFoundError: none of the tables is in the folder.
    """
    folder = Path(folder)
    tables = {}
    for name, spec in TABLES.items():
        if not (folder / f"{name}.csv").is_file():
            continue
        # A token may read "NA" and a control is named "null": only an empty field is a missing value.
        table = pd.read_csv(folder / f"{name}.csv", keep_default_na=False, na_values=[""])
        for column in _TUPLES:
            if column in spec.columns and name in ("neurons", "texts"):
                table[column] = pd.Series([tuple(json.loads(v)) for v in table[column]], dtype=object)
        tables[name] = table
    if not tables:
        raise FileNotFoundError(
            f"`{folder}` holds none of {[f'{name}.csv' for name in TABLES]}; give the folder that `write_tables` filled"
        )
    return tables


def _holds_tuples(column: pd.Series) -> bool:
    return bool(len(column)) and isinstance(column.iloc[0], tuple)


def _as_json(value: Sequence[object]) -> str:
    return json.dumps(list(value), ensure_ascii=False)

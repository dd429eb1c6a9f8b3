"""Cells of the tables that people read, in a page or in a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from lightning_gradtrace.report.summary import MEASURES, neuron_summary, short_names
from lightning_gradtrace.report.tables import Tables

MISSING = "\N{EN DASH}"

_RESULT = {
    "param": "parameter",
    "neuron": "neuron",
    "samples": "samples",
    "tokens": "notable tokens",
    "attributed": "attributed",
    "random": "random",
    "random_effect": "difference [95 % interval]",
}


def number(value: float, digits: int = 0) -> str:
    """Write a number for reading; a missing one is a dash.

    Example:
        >>> number(0.12345, 3), number(1234), number(float("nan"))
        ('0.123', '1,234', '–')
    """
    return MISSING if math.isnan(value) else f"{value:,.{digits}f}"


def effect(value: float, low: float, high: float) -> str:
    """Write an effect with its interval.

    Example:
        >>> effect(0.05, -0.012, 0.11), effect(-0.0001, float("nan"), float("nan"))
        ('+0.050 [-0.012, +0.110]', '0.000')
    """
    if math.isnan(value):
        return MISSING
    return _signed(value) + ("" if math.isnan(low) else f" [{_signed(low)}, {_signed(high)}]")


def _signed(value: float) -> str:
    text = f"{value:+.3f}"
    return text[1:] if float(text) == 0 else text


def neuron_rows(summary: pd.DataFrame, names: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the cells of `neuron_summary`: `param`, `neuron`, `samples`, `tokens`, flip proportions and effects.

    Args:
        summary: from `neuron_summary`.
        names: short name of every parameter.
    """
    rows = []
    for one in summary.to_dict("records"):
        row = {
            "param": names[str(one["param"])],
            "neuron": f"{'column' if one['axis'] == 'in' else 'row'} {one['neuron']}",
            "samples": number(one["n_samples"]),
            "tokens": str(one["tokens_shown"]),
            "attributed": number(one["random_value"], 3),
            "random": number(one["random_control"], 3),
        }
        for control in MEASURES:
            row[f"{control}_effect"] = effect(*(float(one[f"{control}_{c}"]) for c in ("effect", "low", "high")))
        rows.append(row)
    return rows


def pooled_rows(pooled: pd.DataFrame) -> list[dict[str, str]]:
    """Return the cells of the table `pooled`.

    Args:
        pooled: controls averaged over neurons.
    """
    return [
        {
            "control": str(one["control"]),
            "measure": str(one["measure"]).replace("_", " "),
            "neurons": number(one["neurons"]),
            "value": number(one["value"], 3),
            "control_value": number(one["control_value"], 3),
            "effect": effect(float(one["effect"]), float(one["low"]), float(one["high"])),
        }
        for one in pooled.to_dict("records")
    ]


def layer_rows(layers: pd.DataFrame, names: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the cells of the table `layers`.

    Args:
        layers: the layer table.
        names: short name of every parameter.
    """
    return [
        {
            "param": names[str(one["param"])],
            "neurons": number(one["neurons"]),
            "flipped": number(one["mean_flipped_tokens"], 2),
            "share": number(one["notable_share"], 6),
        }
        for one in layers.to_dict("records")
    ]


def result_text(tables: Tables, n_neurons: int = 15) -> str:
    """Return the result as a table for a terminal: neurons, tokens, flip proportion against the random control.

    Args:
        tables: by name; `neurons`, `controls` and the parameters in `entries` are read.
        n_neurons: how many rows.
    """
    summary = neuron_summary(tables["neurons"], tables["controls"])
    if summary.empty:
        return "no neuron was switched off"
    names = short_names(tables)
    rest = len(summary) - n_neurons
    return as_text(neuron_rows(summary.head(n_neurons), names), _RESULT) + (f"\n({rest} more)" if rest > 0 else "")


def as_text(rows: Sequence[Mapping[str, str]], columns: Mapping[str, str]) -> str:
    """Lay out rows as plain text.

    Args:
        rows: cells by column name.
        columns: heading by column name, in order.

    Example:
        >>> print(as_text([{"a": "x", "b": "12"}], {"a": "name", "b": "n"}))
        name  n
        ----  --
        x     12
    """
    widths = {c: max([len(head), *(len(row[c]) for row in rows)]) for c, head in columns.items()}
    lines = [columns, {c: "-" * w for c, w in widths.items()}, *rows]
    return "\n".join("  ".join(line[c].ljust(w) for c, w in widths.items()).rstrip() for line in lines)

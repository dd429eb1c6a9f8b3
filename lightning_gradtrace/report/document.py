"""What the page shows, as one JSON document made from tables.

Words and texts are stored once and referred to by number, so that 1,000 neurons with 10,000 samples stay small.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from lightning_gradtrace.report.findings import findings
from lightning_gradtrace.report.summary import KEYS, MEASURES, short_names
from lightning_gradtrace.report.tables import Tables, check_tables
from lightning_gradtrace.report.text import layer_rows, pooled_rows

NEEDED = ("run", "steps", "neurons")
_MOST_POINTS = 2000
_MOST_SAMPLES = 20
_MOST_FLIPS = 40
Key = tuple[str, str, int]


class Words:
    """Numbers words in the order in which they come."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}

    def __call__(self, text: Any) -> list[int]:
        """Return the numbers of some words."""
        return [self._number.setdefault(str(word), len(self._number)) for word in text]

    @property
    def listed(self) -> list[str]:
        """The words by number."""
        return list(self._number)


def page_document(tables: Tables, title: str) -> dict[str, Any]:
    """Return the document that the page embeds.

    Args:
        tables: by name, see `TABLES`: `run`, `steps` and `neurons`, and any of the others. Of `neurons`, the columns
            `moved` (sum of |s|) and `evidence` (-log10 of the smallest q-value of its tokens) are shown where present.
        title: heading.

    Raises:
        ValueError: a table or a column is missing.
    """
    check_tables(tables, required=NEEDED)
    words, names = Words(), short_names(tables)
    neurons = _neurons(tables, words, list(names))
    steps = tables["steps"]
    checked = steps[steps["residual"].notna()]
    return {
        "title": title,
        "run": tables["run"][["name", "value"]].fillna("").astype(str).to_numpy().tolist(),
        "found": findings(tables),
        "effects": _effects(tables),
        "loss": _thinned(steps["step"], steps["loss"]),
        "residual": [_numbers(checked["step"]), _numbers(checked["residual"])],
        "changes": _rows(tables, "changes", ["step", "before", "after"]),
        "phases": _phases(tables),
        "params": [[name, short] for name, short in names.items()],
        "map": _map(tables, list(names)),
        "bins": _numbers(np.unique(tables["movement"]["step"])) if "movement" in tables else [],
        "neurons": neurons,
        "texts": _texts(tables, neurons, words),
        "words": words.listed,
        "pooled": pooled_rows(tables["pooled"]) if "pooled" in tables else [],
        "layers": layer_rows(tables["layers"], names) if "layers" in tables else [],
    }


def _neurons(tables: Tables, words: Words, params: list[str]) -> list[dict[str, Any]]:
    table = tables["neurons"]
    lines, samples, flips = _lines(tables), _samples(tables), _flips(tables, words)
    controls = _controls(tables)
    place = {name: number for number, name in enumerate(params)}
    rows = []
    for row in table.to_dict("records"):
        key = (str(row["param"]), str(row["axis"]), int(row["neuron"]))
        line = lines.get(key)
        moved = row.get("moved", sum(line) if line else math.nan)
        rows.append(
            {
                "p": place[key[0]],
                "a": key[1],
                "n": key[2],
                "e": int(row["n_entries"]),
                "s": int(row["n_samples"]),
                "t": words(row["text"]),
                "m": _number(moved),
                "v": _number(row.get("evidence", math.nan)),
                "l": line or [],
                "x": samples.get(key, []),
                "c": controls.get(key, {}),
                "f": flips.get(key, []),
            }
        )
    return rows


def _grouped(table: pd.DataFrame) -> Any:
    """Yield the key and the rows of every neuron, in the order of the table."""
    for key, part in table.groupby(KEYS, sort=False, observed=True):
        param, axis, neuron = key
        yield (str(param), str(axis), int(str(neuron))), part


def _lines(tables: Tables) -> dict[Key, list[float]]:
    """Movement at every time, of the neurons of the table `neurons`."""
    if "movement" not in tables:
        return {}
    movement = tables["movement"].astype({"param": object})
    times = np.unique(movement["step"])
    known = tables["neurons"][KEYS].astype({"param": object})
    found = {}
    for key, part in _grouped(movement.merge(known, on=KEYS)):
        line = np.zeros(times.size)
        np.add.at(line, np.searchsorted(times, part["step"]), part["moved"])
        found[key] = _numbers(line)
    return found


def _samples(tables: Tables) -> dict[Key, list[list[float]]]:
    if "samples" not in tables:
        return {}
    found = {}
    for key, part in _grouped(tables["samples"].sort_values("rank", kind="stable")):
        part = part.head(_MOST_SAMPLES)
        ids = part["sample_id"].tolist()
        found[key] = [[int(i), m] for i, m in zip(ids, _numbers(part["moved"]), strict=True)]
    return found


def _flips(tables: Tables, words: Words) -> dict[Key, list[list[int]]]:
    if "flips" not in tables:
        return {}
    found = {}
    for key, part in _grouped(tables["flips"]):
        part = part.head(_MOST_FLIPS)
        numbers = part[["flips", "count"]].astype(int).to_numpy().tolist()
        found[key] = [[word, *two] for word, two in zip(words(part["text"]), numbers, strict=True)]
    return found


def _controls(tables: Tables) -> dict[Key, dict[str, list[float | None]]]:
    """By neuron and control: value, control, effect, low, high of the measure that the summary names."""
    if "controls" not in tables:
        return {}
    found: dict[Key, dict[str, list[float | None]]] = {}
    for row in tables["controls"].to_dict("records"):
        if MEASURES.get(str(row["control"])) != row["measure"]:
            continue
        key = (str(row["param"]), str(row["axis"]), int(row["neuron"]))
        values = [_number(row[c]) for c in ("value", "control_value", "effect", "low", "high")]
        found.setdefault(key, {})[str(row["control"])] = values
    return found


def _effects(tables: Tables) -> list[list[Any]]:
    """Control, effect and its interval, averaged over neurons, of the measure that the summary names."""
    if "pooled" not in tables:
        return []
    rows = tables["pooled"].to_dict("records")
    chosen = [row for row in rows if MEASURES.get(str(row["control"])) == row["measure"]]
    return [[str(row["control"]), *(_number(row[c]) for c in ("effect", "low", "high"))] for row in chosen]


def _map(tables: Tables, params: list[str]) -> list[dict[str, Any]]:
    """Total movement of every neuron of every matrix, a row per matrix in the order of the model."""
    if "movement" not in tables:
        return []
    total = tables["movement"].groupby(KEYS, sort=False, observed=True)["moved"].sum().reset_index()
    rows = []
    for (param, axis), part in total.groupby(["param", "axis"], sort=False, observed=True):
        moved = np.zeros(int(part["neuron"].max()) + 1)
        moved[part["neuron"].to_numpy(int)] = part["moved"]
        rows.append({"p": params.index(str(param)), "a": axis, "m": _numbers(moved, 3)})
    return rows


def _texts(tables: Tables, neurons: list[dict[str, Any]], words: Words) -> dict[str, list[int]]:
    """Texts of the samples that are shown, as numbers of words, by sample id."""
    if "texts" not in tables:
        return {}
    wanted = {sample for one in neurons for sample, _ in one["x"]}
    table = tables["texts"]
    return {str(i): words(t) for i, t in zip(table["sample_id"].tolist(), table["text"], strict=True) if i in wanted}


def _rows(tables: Tables, name: str, columns: list[str]) -> list[list[Any]]:
    return [_numbers(row) for row in tables[name][columns].to_numpy(float)] if name in tables else []


def _phases(tables: Tables) -> list[list[Any]]:
    """First and last step, series that change there, of how many, by chance, and their kinds."""
    if "phases" not in tables:
        return []
    numbers = _rows(tables, "phases", ["first_step", "last_step", "series", "of", "expected"])
    return [[*row, str(names)] for row, names in zip(numbers, tables["phases"]["names"], strict=True)]


def _thinned(x: Any, y: Any) -> list[list[Any]]:
    """Step and mean of the finite values of at most 2,000 equal spans of rows."""
    table = pd.DataFrame({"x": np.asarray(x), "y": np.asarray(y, float)})
    table = table[np.isfinite(table["y"])].reset_index(drop=True)
    spans = table.groupby(table.index // max(1, -(-len(table) // _MOST_POINTS)))
    return [_numbers(spans["x"].first()), _numbers(spans["y"].mean())]


def _numbers(values: Any, digits: int = 5) -> list[Any]:
    return [_number(value, digits) for value in np.asarray(values).tolist()]


def _number(value: Any, digits: int = 5) -> Any:
    """Return a number of few digits, None where it is not finite (JSON has no NaN)."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if isinstance(value, int) else float(f"{float(value):.{digits}g}")

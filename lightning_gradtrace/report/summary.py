"""Small tables for reading: one row per neuron with all its controls, and one per fact of the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

KEYS = ["param", "axis", "neuron"]

# The measure that answers the question "are just these words affected?", for each control. Permuted links often leave
# a neuron without notable tokens; the share of flips that meets them is defined there too, and 0.
MEASURES = {
    "random": "notable_flip_rate",
    "neuron": "notable_flip_rate",
    "frequency": "proportion",
    "null": "notable_share",
}


def neuron_summary(neurons: pd.DataFrame, controls: pd.DataFrame, n_tokens: int = 5) -> pd.DataFrame:
    """Put each ablated neuron, its first notable tokens and its four controls into one row.

    Args:
        neurons: table `neurons` of `lightning_gradtrace.analysis`.
        controls: control tables, concatenated. Neurons without a row here are left out.
        n_tokens: notable tokens to show, those with the largest count.

    Returns:
        One row per neuron in the order of `neurons`: `param`, `axis`, `neuron`, `n_samples`, `tokens_shown` (text), and
        for each control c of random, neuron, frequency and null: `c_value`, `c_control`, `c_effect`, `c_low`, `c_high`
        (flip proportions; NaN where the control is undefined).
    """
    held = neurons.assign(tokens_shown=[" ".join(map(str, text[:n_tokens])) for text in neurons["text"]])
    chosen = controls[KEYS].drop_duplicates()
    table = held[[*KEYS, "n_samples", "tokens_shown"]].merge(chosen, on=KEYS)
    names = {"value": "value", "control_value": "control", "effect": "effect", "low": "low", "high": "high"}
    for control, measure in MEASURES.items():
        rows = controls[(controls["control"] == control) & (controls["measure"] == measure)]
        one = rows[[*KEYS, *names]].rename(columns={old: f"{control}_{new}" for old, new in names.items()})
        table = table.merge(one, on=KEYS, how="left")
    return table


def count_clear(summary: pd.DataFrame, control: str = "random") -> tuple[int, int, int]:
    """Count the neurons whose interval lies above 0, below 0, and those that have an interval at all.

    Args:
        summary: from `neuron_summary`.
        control: which control.

    Example:
        >>> count_clear(pd.DataFrame({"random_low": [0.1, -0.2, None], "random_high": [0.3, 0.1, None]}))
        (1, 0, 2)
    """
    low, high = (pd.to_numeric(summary[f"{control}_{end}"]) for end in ("low", "high"))
    return int((low > 0).sum()), int((high < 0).sum()), int(low.notna().sum())


def run_summary(attrs: Mapping[str, Any], steps: pd.DataFrame, facts: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Say in a few rows what was run and whether its ledger balances.

    Args:
        attrs: attributes of a trace.
        steps: its table of steps.
        facts: further rows, by name; they come first.

    Returns:
        Columns `name` and `value`, both text.
    """
    rows: dict[str, Any] = dict(facts or {})
    model = attrs.get("model") or {}
    rows["model"] = _plain(model.get("class", model), last=True) if isinstance(model, Mapping) else str(model)
    if isinstance(model, Mapping) and "n_parameters" in model:
        rows["parameters of the model"] = f"{model['n_parameters']:,}"
    rows["optimizer"] = ", ".join(_optimizer(one) for one in _listed(attrs.get("optimizer")))
    rows["steps"] = f"{len(steps):,}"
    if "n_occurrences" in steps:
        rows["occurrences"] = f"{int(steps['n_occurrences'].sum()):,}"
    reason = attrs.get("end_reason") or "no reason given"
    rows["trace"] = "complete" if attrs.get("complete") else f"incomplete: {reason}"
    residual = steps["residual"].dropna()
    rows["ledger, largest residual"] = f"{residual.max():.1e}" if len(residual) else "never computed"
    rows["ledger, steps checked"] = f"{len(residual):,}"
    if "sum_error" in steps and steps["sum_error"].notna().any():
        rows["shares against gradient, largest error"] = f"{steps['sum_error'].max():.1e}"
    if "nonfinite" in steps:
        rows["kept shifts that are not finite"] = f"{int(steps['nonfinite'].sum()):,}"
    if "skipped" in steps:
        rows["skipped steps"] = f"{int(steps['skipped'].sum()):,}"
    return pd.DataFrame({"name": list(rows), "value": [str(v) for v in rows.values()]})


def short_names(tables: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Give every parameter with an entry or a neuron its short name, the same in all figures and tables.

    Args:
        tables: by name; those that hold parameters are read.
    """
    held = [tables[name]["param"] for name in ("movement", "entries", "neurons", "layers") if name in tables]
    return shorten([str(name) for column in held for name in column.unique()])


def shorten(names: Iterable[str]) -> dict[str, str]:
    """Leave out the leading parts that all dotted names share, up to the number of a layer, and a final ``weight``.

    Args:
        names: parameter names.

    Example:
        >>> shorten(["net.layers.0.linear1.weight", "net.layers.2.linear2.weight"])
        {'net.layers.0.linear1.weight': '0.linear1', 'net.layers.2.linear2.weight': '2.linear2'}
        >>> shorten(["net.layers.2.linear2.weight"])
        {'net.layers.2.linear2.weight': '2.linear2'}
    """
    parts = [name.split(".") for name in dict.fromkeys(names)]
    shared = 0
    while parts and all(len(p) > shared + 2 and not p[shared].isdigit() for p in parts):
        if len({p[shared] for p in parts}) > 1:
            break
        shared += 1
    return {".".join(p): ".".join(p[shared:]).removesuffix(".weight") for p in parts}


def _optimizer(one: Any) -> str:
    if not isinstance(one, Mapping):
        return str(one)
    rates = sorted({f"{group['lr']:g}" for group in one.get("groups", []) if "lr" in group})
    return f"{_plain(one.get('class', '?'), last=True)}" + (
        f", learning rate {'/'.join(rates)} at first" if rates else ""
    )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _plain(value: Any, last: bool = False) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.rpartition(".")[2] if last else text

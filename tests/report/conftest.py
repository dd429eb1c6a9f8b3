"""Tables as the analysis makes them, with awkward tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace.report import TABLES

AWKWARD = ("<script>alert('x')</script>", "$x^$", 'a,"b"', "NA", "naïve")
WEIGHTS = ("net.layers.0.linear1.weight", "net.layers.1.linear2.weight")
Tables = dict[str, pd.DataFrame]


def make_controls() -> pd.DataFrame:
    rows = []
    measures = {"random": "notable_flip_rate", "neuron": "notable_flip_rate", "frequency": "proportion"}
    for neuron in (3, 5, 8):
        for control, measure in {**measures, "null": "notable_share"}.items():
            row = {"param": WEIGHTS[1], "module": "net.layers.1.linear2", "axis": "in", "neuron": neuron}
            row |= {"control": control, "measure": measure, "value": 0.5, "control_value": 0.2, "effect": 0.3}
            row |= {"low": -0.1 if neuron == 5 else 0.1, "high": 0.4, "n": 40, "n_control": 40}
            if neuron == 8 and control == "random":
                row |= dict.fromkeys(("value", "control_value", "effect", "low", "high"), np.nan)
            rows.append(row)
    return pd.DataFrame(rows)


def make_tables() -> Tables:
    """Return a whole set of tables."""
    controls = make_controls()
    pooled = controls.groupby(["control", "measure"], sort=False, as_index=False)[
        ["value", "control_value", "effect", "low", "high"]
    ].mean()
    neurons = pd.DataFrame(
        {
            "param": WEIGHTS[1],
            "module": "net.layers.1.linear2",
            "axis": "in",
            "neuron": [3, 5, 8, 9],
            "n_entries": [4, 2, 1, 1],
            "n_occurrences": [400, 200, 100, 50],
            "n_samples": [1200, 20, 10, 5],
            "n_notable": [5, 1, 1, 0],
            "tokens": [(1, 2, 3, 4, 5), (2,), (3,), ()],
            "text": [AWKWARD, ("$x^$",), ("plain",), ()],
        }
    )
    steps = pd.DataFrame(
        {
            "step": range(100),
            "epoch": 0,
            "loss": np.linspace(6, 4, 100),
            "residual": [1e-6 if s % 25 == 0 else np.nan for s in range(100)],
            "sum_error": [2e-7 if s % 25 == 0 else np.nan for s in range(100)],
            "nonfinite": 0,
            "skipped": False,
            "n_occurrences": 20,
        }
    )
    return {
        "run": pd.DataFrame({"name": ["experiment", "null"], "value": ["<b>bold</b>", "NA"]}),
        "steps": steps,
        "frequencies": pd.DataFrame({"count": [50, 10, 1], "entries": [2, 10, 500]}),
        "entries": pd.DataFrame({"entry": [7, 3], "param": WEIGHTS[::-1], "index": [1, 3], "count": [50, 10]}),
        "notable": pd.DataFrame({"entry": [7], "token": [4], "text": ["NA"], "count": [30], "relative": [3.5]}),
        "neurons": neurons,
        "ablation": pd.DataFrame(
            {
                "param": WEIGHTS[1],
                "axis": "in",
                "neuron": [3, 5, 8],
                "n_samples": [40, 20, 10],
                "flips": [20, 3, 0],
                "flipped_tokens": [9, 2, 0],
                "notable_flipped": [4, 1, 0],
            }
        ),
        "controls": controls,
        "pooled": pooled.assign(neurons=3),
        "layers": pd.DataFrame(
            {"param": [WEIGHTS[1]], "neurons": [3], "mean_flipped_tokens": [3.67], "notable_share": [0.472222]}
        ),
    }


def make_page_tables(words: tuple[str, ...] = AWKWARD) -> Tables:
    """Return the tables that only the page shows besides; the notable words of neuron 3 can be chosen."""
    tables = make_tables()
    neurons = tables["neurons"]
    tables["neurons"] = neurons.assign(text=[words, *neurons["text"][1:]], moved=[4.0, 3.0, None, 1.0], evidence=2.5)
    keys = {"param": WEIGHTS[1], "axis": "in"}
    tables["movement"] = pd.DataFrame({**keys, "neuron": [3, 3, 5], "step": [0, 50, 50], "moved": [1.5, 2.5, 3.0]})
    tables["samples"] = pd.DataFrame({**keys, "neuron": 3, "rank": [1, 2], "sample_id": [1, 2], "moved": [0.5, 0.25]})
    tables["texts"] = pd.DataFrame({"sample_id": [1], "text": [("the", *words, "end")]})
    tables["changes"] = pd.DataFrame({"step": [40], "before": [5.5], "after": [4.5]})
    tables["phases"] = pd.DataFrame(
        {
            "first_step": [38],
            "last_step": [41],
            "series": [5],
            "of": [9],
            "expected": [0.75],
            "names": "loss, shift_norm",
        }
    )
    tables["flips"] = pd.DataFrame(
        {
            **keys,
            "neuron": 3,
            "text": [words[0], "other"],
            "flips": [3, 1],
            "count": [4, 9],
            "proportion": [0.75, 1 / 9],
        }
    )
    return tables


@pytest.fixture
def tables() -> Tables:
    return make_tables()


@pytest.fixture
def empty() -> Tables:
    return {name: pd.DataFrame(columns=list(spec.columns)) for name, spec in TABLES.items() if not spec.optional}

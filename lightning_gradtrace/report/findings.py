"""What a page says first: what was found and how sure it is, in a few sentences made from the tables."""

from __future__ import annotations

import math

import pandas as pd

from lightning_gradtrace.report.summary import count_clear, neuron_summary, short_names
from lightning_gradtrace.report.tables import Tables

# A ledger that closes less well than this explains the training badly, half precision aside.
_LARGE_RESIDUAL = 1e-2
_Q = 0.01


def findings(tables: Tables) -> list[tuple[str, str]]:
    """Say what the tables hold, with what would come out by chance beside it.

    Args:
        tables: by name, see `TABLES`: `run`, `steps` and `neurons`, and any of the others.

    Returns:
        Pairs of a heading of one word and one or two sentences: "Words", "Effect", "Movement" (where there is a table
        of it), "Record".
    """
    said = [("Words", _words(tables)), ("Effect", _effect(tables))]
    if "movement" in tables and tables["movement"]["moved"].sum() > 0:
        said.append(("Movement", _movement(tables)))
    return [*said, ("Record", _record(tables))]


def _words(tables: Tables) -> str:
    neurons = tables["neurons"]
    named = neurons[neurons["n_notable"] > 0]
    if named.empty:
        return f"None of the {len(neurons):,} neurons has notable words under these thresholds."
    text = f"The samples behind {len(named):,} of the {len(neurons):,} neurons share notable words."
    if "evidence" not in neurons or neurons["evidence"].isna().all():
        return text
    tested = neurons["evidence"].notna()
    sure, chance = int((neurons["evidence"] > -math.log10(_Q)).sum()), _Q * int(tested.sum())
    best = named.sort_values("evidence", ascending=False, kind="stable").iloc[0]
    words = " ".join(map(str, best["text"][:5]))
    return (
        f"{text} A test finds a word at q < {_Q:g} in {sure:,} ({chance:.1f} expected by chance, if occurrences were "
        f"independent). The largest evidence: {_name(tables, best)}, {words}"
    )


def _effect(tables: Tables) -> str:
    if "controls" not in tables or tables["controls"].empty:
        return "Not asked: no neuron was switched off, which needs the model. Shared words alone are an association."
    above, below, known = count_clear(neuron_summary(tables["neurons"], tables["controls"]))
    if not known:
        return (
            "Neurons were switched off, but none could be compared with random samples: every sample is attributed to "
            "them, or their words are never predicted."
        )
    return (
        f"Switched off, {above} of {known} neurons flip the predictions of their words more often on the samples that "
        f"moved them than on random samples (95 % interval above 0), {below} less often; by chance about "
        f"{0.025 * known:.1f} would do either."
    )


def _movement(tables: Tables) -> str:
    moved = tables["movement"].groupby("param", sort=False, observed=True)["moved"].sum()
    share = (moved / moved.sum()).sort_values(ascending=False, kind="stable")
    names = short_names(tables)
    parts = [f"{names[str(param)]} ({part:.0%})" for param, part in share.head(3).items()]
    return (
        f"Of all recorded movement most lies in {', '.join(parts)}; a record of the largest shifts favours few of them."
    )


def _record(tables: Tables) -> str:
    state = dict(zip(tables["run"]["name"], tables["run"]["value"], strict=True)).get("trace", "")
    steps = tables["steps"]
    checked = steps["residual"].dropna()
    text = f"The trace is {state}. " if state else ""
    if checked.empty:
        return f"{text}The ledger was never computed: nothing shows that shares add up to the change of weights."
    closes = "add up to" if checked.max() <= _LARGE_RESIDUAL else "do not add up to"
    return (
        f"{text}Recorded shares, momentum and decay {closes} the real change of the weights: they miss at most "
        f"{checked.max():.1e} of it, in {len(checked):,} checked of {len(steps):,} steps."
    )


def _name(tables: Tables, neuron: pd.Series) -> str:
    kind = "column" if neuron["axis"] == "in" else "row"
    return f"{short_names(tables)[str(neuron['param'])]} {kind} {neuron['neuron']}"

"""The page from a trace: runs the analyses that `report.write_page` shows, and hands it their tables."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace import analysis, report

if TYPE_CHECKING:
    from torch import nn

    from lightning_gradtrace.store import Trace

_TIMES = 60
_MOST_CHANGE_POINTS = 2000
_KEYS = ["param", "axis", "neuron"]


def write_overview(
    trace: Trace,
    file: str | os.PathLike[str],
    *,
    title: str | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
    **options: Any,
) -> Path:
    """Write one self-contained HTML page about a trace.

    Args:
        trace: an open trace with a `TopK` record.
        file: the file to write.
        title: heading; None takes the trace's name.
        tables: by name, instead of those that would be made here; as from `report.read_tables`.
        **options: as in `overview_tables`.

    Returns:
        The file.

    Raises:
        ValueError: no `TopK` record, or thresholds or tables that don't fit.
    """
    made = overview_tables(trace, given=tables, **options)
    return report.write_page(file, made, title or f"Trace of {trace.attrs.get('name') or Path(str(file)).stem}")


def overview_tables(
    trace: Trace,
    *,
    given: Mapping[str, pd.DataFrame] | None = None,
    n_entries: int = 5000,
    n_neurons: int = 1000,
    n_samples: int = 10,
    axis: str = "in",
    model: nn.Module | None = None,
    forward: Any = None,
    n_ablated: int = 20,
    max_sample_share: float = 0.9,
    n_ablation_samples: int = 500,
    batch_size: int = 32,
    seed: int = 0,
    **thresholds: Any,
) -> dict[str, pd.DataFrame]:
    """Return the tables of the page.

    Args:
        trace: an open trace with a `TopK` record.
        given: tables by name that are taken as they are.
        n_entries: at most so many most frequent entries, which neurons are made of.
        n_neurons: at most so many neurons, those with most notable tokens.
        n_samples: samples shown for each neuron.
        axis: "in" or "out".
        model: the trained model: neurons are switched off and compared with controls. None leaves this out.
        forward: as in `analysis.flip_table`.
        n_ablated: so many neurons with notable tokens are switched off, those with the largest evidence.
        max_sample_share: neurons to which a larger share of all samples is attributed are not switched off: hardly a
            sample is left to compare with.
        n_ablation_samples: at most so many samples for each.
        batch_size: samples at once.
        seed: of all draws.
        **thresholds: of `analysis.notable_tokens`: `min_count`, `n_relative`, `n_notable`, `min_relative`.

    Returns:
        Tables by name, see `report.TABLES`; `neurons` with the columns `moved` and `evidence` besides.

    Raises:
        ValueError: no `TopK` record, or thresholds that don't fit.
    """
    tables: dict[str, pd.DataFrame] = {"run": report.run_summary(trace.attrs, trace.steps)}
    tables["steps"] = trace.steps.reset_index(names="step")
    tables |= given or {}
    find: Any = partial(analysis.notable_tokens, **thresholds)
    entries = tables.get("entries")
    if entries is None:
        entries = analysis.frequent_entries(trace, min(n_entries, trace.n_entries))
    tables["entries"] = entries
    with_texts = trace.committed["sample"] > 0
    if "neurons" not in tables:
        tables["neurons"] = analysis.neurons(
            trace, entries, find(trace, entries) if with_texts else analysis.no_tokens(), axis
        )
    neurons = tables["neurons"].head(n_neurons).reset_index(drop=True)
    axis = str(neurons["axis"].iloc[0]) if len(neurons) else axis
    matrices = trace.params["shape"].map(len).eq(2).any()
    if "movement" not in tables and matrices:
        tables["movement"] = analysis.movement(trace, by="neuron", every=_every(trace), axis=axis)
    if len(neurons):
        tables["neurons"] = neurons = _with_measures(trace, tables, neurons, find if with_texts else None, axis)
        if "samples" not in tables:
            moved = analysis.movers(trace, entries, n=n_samples, axis=axis)
            tables["samples"] = moved.astype({"param": object}).merge(neurons[_KEYS], on=_KEYS)
        if "texts" not in tables and with_texts:
            tables["texts"] = _texts(trace, tables["samples"]["sample_id"])
    if "changes" not in tables and importlib.util.find_spec("ruptures"):
        tables["changes"] = _changes(tables["steps"])
    if "phases" not in tables and importlib.util.find_spec("ruptures"):
        tables["phases"] = analysis.trace_phases(trace)
    if model is not None:
        few = neurons["n_samples"] <= max_sample_share * trace.occurrences["sample_id"].nunique()
        # the first ones of the page's list, which begins with the largest evidence
        chosen = neurons[(neurons["n_notable"] > 0) & few]
        if "evidence" in chosen:
            chosen = chosen.sort_values("evidence", ascending=False, kind="stable", ignore_index=True)
        chosen = chosen.head(n_ablated)
        predictor = analysis.Predictor(model, trace.tokens()[1], batch_size=batch_size, forward=forward)
        tables |= _ablations(trace, predictor, chosen, entries, find, n_ablation_samples, seed)
    return tables


def _every(trace: Trace) -> int:
    step = trace.steps.index
    return max(1, -(-int(step[-1] - step[0] + 1) // _TIMES)) if len(step) else 1


def _with_measures(trace: Trace, tables: Any, neurons: pd.DataFrame, find: Any, axis: str) -> pd.DataFrame:
    """Add `moved`, over the whole record, and `evidence`: -log10 of the smallest q-value of any of its tokens."""
    if "movement" in tables:
        moved = tables["movement"].astype({"param": object}).groupby(_KEYS, sort=False)["moved"].sum()
        neurons = neurons.drop(columns="moved", errors="ignore").merge(moved.reset_index(), on=_KEYS, how="left")
    if find is not None and "evidence" not in neurons:
        # A test needs no smallest relative frequency besides.
        options: dict[str, Any] = {"min_relative": 0.0, "n_notable": 1, "method": "hypergeometric"}
        tests = find(trace, tables["entries"], by="neuron", axis=axis, **options)
        best = tests.astype({"param": object}).groupby(_KEYS, sort=False)["q_value"].min()
        evidence = np.log10(best.clip(lower=1e-300)).abs().rename("evidence")
        neurons = neurons.merge(evidence.reset_index(), on=_KEYS, how="left")
    return neurons


def _texts(trace: Trace, sample_ids: pd.Series[Any]) -> pd.DataFrame:
    held, tokens = trace.tokens()
    wanted = np.intersect1d(held, sample_ids.unique())
    vocab, order = trace.vocab, np.argsort(held)
    rows = tokens[order[np.searchsorted(held, wanted, sorter=order)]]
    texts = [tuple(vocab[t] if vocab is not None else str(t) for t in row[row >= 0].tolist()) for row in rows]
    return pd.DataFrame({"sample_id": wanted, "text": pd.Series(texts, dtype=object)})


def _changes(steps: pd.DataFrame) -> pd.DataFrame:
    spans = steps.groupby(np.arange(len(steps)) // max(1, -(-len(steps) // _MOST_CHANGE_POINTS)))
    means = pd.DataFrame({"step": spans["step"].first(), "loss": spans["loss"].mean()})
    return analysis.change_points(means, "loss")[["step", "before", "after"]]


def _ablations(
    trace: Trace, predictor: Any, chosen: pd.DataFrame, entries: Any, find: Any, n_samples: int, seed: int
) -> dict[str, pd.DataFrame]:
    """Return `ablation`, `controls`, `pooled`, `layers` and `flips` of some neurons."""
    common: dict[str, Any] = {"n_samples": n_samples, "seed": seed}
    ablation = analysis.neuron_ablation(trace, predictor, chosen, entries, **common)
    parts = [
        analysis.random_control(trace, predictor, chosen, entries, **common),
        analysis.peer_control(trace, predictor, chosen, entries, **common),
        analysis.frequency_control(trace, predictor, chosen, entries, **common),
        analysis.null_control(trace, predictor, chosen, entries, find_tokens=find, **common),
    ]
    controls = pd.concat(parts, ignore_index=True)
    return {
        "ablation": ablation,
        "controls": controls,
        "pooled": analysis.pool_controls(controls, seed=seed),
        "layers": analysis.layer_table(ablation),
        "flips": flips_of(trace, predictor, chosen, entries, n_samples=n_samples, seed=seed),
    }


def flips_of(
    trace: Trace, predictor: Any, chosen: pd.DataFrame, entries: Any, *, n_samples: int = 500, seed: int = 0
) -> pd.DataFrame:
    """Return the flip table of each neuron on samples drawn from those attributed to it.

    Args:
        trace: the trace.
        predictor: `analysis.Predictor` on all texts of the trace.
        chosen: rows of the table of `analysis.neurons`.
        entries: the kept entries that it was made from.
        n_samples: at most so many samples for each neuron.
        seed: of the draw.

    Returns:
        `param`, `axis`, `neuron`, then the columns of `analysis.count_flips`: notable tokens first, then by flips.
    """
    held, order = trace.tokens()[0], np.argsort(trace.tokens()[0])
    attributed = analysis.attributed_samples(trace, entries, chosen)
    parts = []
    for place, neuron in enumerate(chosen.to_dict("records")):
        ids = attributed.loc[attributed["place"] == place, "sample_id"].unique()
        rows = order[np.searchsorted(held, np.intersect1d(held, ids), sorter=order)]
        rows = np.random.default_rng([seed, place]).permutation(rows)[:n_samples]
        switched = (str(neuron["param"]), int(neuron["neuron"]), str(neuron["axis"]))
        table = analysis.count_flips(predictor(rows), predictor(rows, switched), trace.vocab)
        first = table["token"].isin(neuron["tokens"])
        table = pd.concat([table[first], table[~first]], ignore_index=True)
        keys = pd.DataFrame({key: [neuron[key]] * len(table) for key in _KEYS})
        parts.append(pd.concat([keys, table], axis=1))
    columns = [*_KEYS, "token", "text", "flips", "count", "proportion"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)

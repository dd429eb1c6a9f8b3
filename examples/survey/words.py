"""Questions about the words of attributed samples."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from examples.summarize import compare_selections, per_parameter
from examples.survey.survey import KEYS, Answer, Survey
from lightning_gradtrace import analysis
from lightning_gradtrace.analysis.scores import METHODS


def chain(survey: Survey) -> Answer:
    """Entries, notable tokens and neurons, as the post has them."""
    counts = analysis.count_entries(survey.trace)
    entries = counts.head(survey.cfg.analysis.n_entries)
    notable = analysis.notable_tokens(survey.trace, entries, **survey.thresholds)
    neurons = analysis.neurons(survey.trace, entries, notable, survey.cfg.analysis.axis)
    yield "entries", entries
    yield "notable", notable
    yield "neurons", neurons
    yield "neurons_by_param", per_parameter(neurons, entries)


def methods(survey: Survey) -> Answer:
    """The tokens of each neuron by all methods, and how far these agree."""
    found, rows = {}, []
    for name, method in METHODS.items():
        options = {**survey.thresholds, "method": name, "by": "neuron", "axis": survey.cfg.analysis.axis}
        table = analysis.notable_tokens(survey.trace, survey.entries, **options)
        found[name] = table.astype({"param": object}).groupby(KEYS, sort=False)["token"].agg(set)
        significant = (table["q_value"] < 0.05).mean() if method.test else np.nan
        rows.append(
            {
                "method": name,
                "neurons": table[KEYS].drop_duplicates().shape[0],
                "distinct_tokens": table["token"].nunique(),
                "median_relative": table["relative"].median(),
                "share_with_q_below_0.05": significant,
                "commonest": " ".join(table["text"].value_counts().head(8).index),
            }
        )
        yield f"tokens_{name}", table[table["rank"] <= 5]
        yield "methods", pd.DataFrame(rows)
    agreement = []
    for a, b in combinations(found, 2):
        shared = found[a].index.intersection(found[b].index)
        jaccard = [len(found[a][k] & found[b][k]) / len(found[a][k] | found[b][k]) for k in shared]
        agreement.append((a, b, len(shared), float(np.mean(jaccard)) if jaccard else np.nan))
    columns = ["method", "other", "neurons", "mean_jaccard"]
    yield "methods_agreement", pd.DataFrame(agreement, columns=columns)


def ngrams(survey: Survey) -> Answer:
    """Runs of two and three tokens of each neuron."""
    for n in (2, 3):
        options: dict[str, Any] = {**survey.thresholds, "method": "log_odds", "by": "neuron", "ngram": n}
        table = analysis.notable_tokens(survey.trace, survey.entries, axis=survey.cfg.analysis.axis, **options)
        yield f"ngrams_{n}", table.nlargest(100, "score")


def weighted(survey: Survey) -> Answer:
    """The tokens of each neuron, weighted by the size of the shift and by that of the weight."""
    for weight in ("shift", "value"):
        options = {**survey.thresholds, "by": "neuron", "axis": survey.cfg.analysis.axis, "weight": weight}
        table = analysis.notable_tokens(survey.trace, survey.entries, **options)
        yield f"tokens_by_{weight}", table


def null(survey: Survey) -> Answer:
    """How many tokens, and how specific, permuted links give."""
    find = partial(analysis.notable_tokens, **survey.thresholds)
    options: dict[str, Any] = {"find_tokens": find, "n_permutations": survey.settings.n_permutations}
    within = survey.cfg.analysis.within
    table = analysis.null_tokens(survey.trace, survey.entries, survey.neurons, within=within, **options)
    yield "null_tokens", analysis.pool_controls(table, "param")


def selections(survey: Survey) -> Answer:
    """What the selection per step finds beside the one per sample, if the trace holds both."""
    if {"topk", "topk_step"} <= set(survey.trace.records):
        cfg = survey.cfg.analysis
        yield "selections", compare_selections(survey.trace, survey.thresholds, cfg.n_entries, cfg.axis)

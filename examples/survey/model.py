"""Questions that need the trained model: what is switched off, and what is active."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd

from examples.survey.survey import Answer, Survey
from lightning_gradtrace import analysis

HOW = ("zero", "mean", "resample")


def neurons(survey: Survey) -> Answer:
    """Switch off every neuron with notable tokens, and compare with three controls."""
    options: dict[str, Any] = {"seed": survey.settings.seed}
    arguments = (survey.trace, survey.predictor, survey.mine, survey.entries)
    yield "ablation", analysis.neuron_ablation(*arguments, n_samples=survey.settings.n_samples, **options)
    options |= {"n_samples": survey.settings.n_control_samples, "n_resamples": survey.settings.n_resamples}
    yield "control_random", analysis.random_control(*arguments, **options)
    yield "control_frequency", analysis.frequency_control(*arguments, **options)
    peers = survey.settings.n_other_neurons
    yield "control_peers", analysis.peer_control(*arguments, n_peers=peers, **options)


def null_pipeline(survey: Survey) -> Answer:
    """The whole pipeline on permuted links, for some of the neurons, evenly spread."""
    step = max(1, len(survey.neurons) // survey.settings.n_null_neurons)
    chosen = survey.neurons.iloc[::step].head(survey.settings.n_null_neurons).reset_index(drop=True)
    find = partial(analysis.notable_tokens, **survey.thresholds)
    common: dict[str, Any] = {"n_samples": survey.settings.n_control_samples, "seed": survey.settings.seed}
    common |= {"find_tokens": find, "within": survey.cfg.analysis.within, "n_resamples": survey.settings.n_resamples}
    yield "control_null", analysis.null_control(survey.trace, survey.predictor, chosen, survey.entries, **common)


def selective(survey: Survey) -> Answer:
    """The chain with tokens that are specific, on neurons that don't collect everything, and its four controls."""
    thresholds = {**survey.thresholds, "min_relative": survey.settings.selective.min_relative}
    find: Any = partial(analysis.notable_tokens, **thresholds)
    table = analysis.neurons(survey.trace, survey.entries, find(survey.trace, survey.entries), survey.cfg.analysis.axis)
    with_tokens = table[table["n_notable"] > 0]
    yield "selective_by_param", with_tokens["param"].value_counts().rename_axis("param").reset_index()
    few = with_tokens["n_samples"] <= survey.settings.selective.max_sample_share * len(survey.trace.tokens()[0])
    chosen = with_tokens[few].head(survey.settings.n_best).reset_index(drop=True)
    yield "selective_neurons", chosen
    common: dict[str, Any] = {"n_samples": survey.settings.n_control_samples, "seed": survey.settings.seed}
    arguments = (survey.trace, survey.predictor, chosen, survey.entries)
    yield "selective_ablation", analysis.neuron_ablation(*arguments, **common)
    common["n_resamples"] = survey.settings.n_resamples
    parts = [
        analysis.random_control(*arguments, **common),
        analysis.frequency_control(*arguments, **common),
        analysis.peer_control(*arguments, n_peers=survey.settings.n_other_neurons, **common),
    ]
    yield "selective_controls", pd.concat(parts, ignore_index=True)
    parts.append(analysis.null_control(*arguments, find_tokens=find, within=survey.cfg.analysis.within, **common))
    yield "selective_controls", pd.concat(parts, ignore_index=True)


def heads(survey: Survey) -> Answer:
    """Switch off every attention head in three ways."""
    found = analysis.attention_heads(survey.trace, survey.cfg.model.n_heads)
    yield from _three_ways(survey, "head", found)


def entries(survey: Survey) -> Answer:
    """Switch off the most frequent single entries in three ways."""
    yield from _three_ways(survey, "entry", survey.entries.head(survey.settings.n_entries))


def best_neurons(survey: Survey) -> Answer:
    """Switch off the neurons with most notable tokens in three ways, on texts drawn at random."""
    yield from _three_ways(survey, "neuron", survey.neurons.head(survey.settings.n_best))


def _three_ways(survey: Survey, name: str, what: pd.DataFrame) -> Answer:
    texts, parts = survey.some_texts(survey.settings.n_texts), []
    for how in HOW:
        ablated = analysis.ablate(survey.model, texts, what, how, seed=survey.settings.seed, **survey.running)
        effects = analysis.ablation_effects(ablated, n_resamples=survey.settings.n_resamples)
        parts.append(effects.assign(how=how))
        yield f"effects_{name}", pd.concat(parts, ignore_index=True)
        if how == "zero":
            losses = analysis.token_losses(ablated, vocab=survey.trace.vocab, min_count=10)
            yield f"token_losses_{name}", losses.groupby(list(ablated.keys.columns), sort=False).head(5)


def activations(survey: Survey) -> Answer:
    """The baseline: where a flagged neuron ranks by its activation on its notable tokens, and its top samples."""
    common: dict[str, Any] = {"n_samples": 2 * survey.settings.n_texts, **survey.running}
    table = analysis.activation_baseline(survey.trace, survey.model, survey.neurons, **common)
    end = table[["rank_high", "rank_low"]].min(axis=1)
    table = table.assign(rank=end, first_or_last=end == 1, in_ten=end <= 10, chance_in_ten=20 / table["n_neurons"])
    yield (
        "activations",
        table.groupby("param", sort=False)
        .agg(
            pairs=("rank", "size"),
            median_rank=("rank", "median"),
            first_or_last=("first_or_last", "mean"),
            in_ten=("in_ten", "mean"),
            chance_in_ten=("chance_in_ten", "mean"),
        )
        .reset_index(),
    )
    yield "activations_best", table.merge(survey.neurons.head(survey.settings.n_best)[["param", "axis", "neuron"]])
    best = survey.neurons.head(survey.settings.n_best)
    yield "top_samples", analysis.top_samples(survey.trace, survey.model, best, survey.entries, n=5, **common)

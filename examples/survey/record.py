"""Questions that the trace alone answers, before any words are looked at."""

from __future__ import annotations

import pandas as pd

from examples.summarize import size_table
from examples.survey.survey import KEYS, Answer, Survey
from lightning_gradtrace import analysis

EMBEDDING, HEAD = "network.embedding.weight", "network.head.weight"


def facts(survey: Survey) -> Answer:
    """Size on disk, and the ledger by step."""
    yield "size", size_table(survey.trace, survey.run / "trace.zarr")
    yield "steps", survey.trace.steps.reset_index(names="step")


def outliers(survey: Survey, of: str) -> Answer:
    """The largest shifts of steps, samples or neurons, and which matrices they lie in."""
    table = analysis.outliers(survey.trace, of, n=1)
    yield f"outliers_{of}", table.nlargest(survey.settings.n_outliers, "value")
    yield f"outliers_{of}_by_param", table["param"].value_counts().rename_axis("param").reset_index()


def outliers_normalised(survey: Survey, normalise: str) -> Answer:
    """The largest shifts of each parameter, in proportion to its weights, its neuron's, or the entry's own series."""
    n = survey.settings.n_outliers
    yield f"outliers_param_{normalise}", analysis.outliers(survey.trace, "param", n=n, normalise=normalise)


def movement(survey: Survey) -> Answer:
    """When matrices and neurons moved, and in which order."""
    by_param = analysis.movement(survey.trace, by="param")
    yield "movement_param", by_param
    yield "formation_param", analysis.formation(by_param)
    by_neuron = analysis.movement(survey.trace, by="neuron", every=max(1, len(survey.trace.steps) // 60))
    formed = analysis.formation(by_neuron)
    yield "formation_neuron", formed.nlargest(200, "moved")
    spread = formed.groupby("param", sort=False)[["step_10", "step_50", "step_90"]].median().reset_index()
    yield "formation_neuron_by_param", spread


def phases(survey: Survey) -> Answer:
    """Where the series of the trace change their level, and where many of them do."""
    series = analysis.trace_series(survey.trace)
    yield "series", series
    changes = analysis.series_changes(series)
    yield "changes", changes
    known = survey.trace.steps.index
    window = max(1, len(known) // 50)
    yield "phases", analysis.phase_boundaries(changes, window, span=(int(known[0]), int(known[-1])))
    yield "sparsity", analysis.shift_sparsity(survey.trace, every=window)


def weights(survey: Survey) -> Answer:
    """Moments, norms and spectra of the snapshots."""
    tracked = analysis.weight_statistics(survey.trace)
    tables = analysis.weight_statistics(survey.trace, [EMBEDDING, HEAD], spectra=False)
    yield "weights", pd.concat([tracked, tables], ignore_index=True)
    lines = analysis.neuron_weights(survey.trace)
    last = lines[lines["step"] == lines["step"].max()]
    spread = last.groupby("param", sort=False)[["norm", "cosine"]].quantile([0.1, 0.5, 0.9])
    yield "weights_neurons", spread.rename_axis(["param", "quantile"]).reset_index()


def bigrams(survey: Survey) -> Answer:
    """Which pairs of tokens embedding and head brought together, from snapshot to snapshot and in all."""
    yield "bigrams_in_all", analysis.bigram_shifts(survey.trace, EMBEDDING, HEAD, n=30, summed=True)
    yield "bigrams", analysis.bigram_shifts(survey.trace, EMBEDDING, HEAD, n=10)


def alignment(survey: Survey) -> Answer:
    """Whether these shifts go with the bigrams of the texts read meanwhile."""
    yield "bigram_alignment", analysis.bigram_alignment(survey.trace, EMBEDDING, HEAD)


def heads(survey: Survey) -> Answer:
    """When the attention heads moved, by part, and whose words they share."""
    found = analysis.attention_heads(survey.trace, survey.cfg.model.n_heads)
    moved = analysis.movement(survey.trace, by="head_part", heads=found)
    yield "movement_head", moved.groupby(["module", "head", "part"], sort=False)["moved"].sum().reset_index()
    yield "formation_head", analysis.formation(moved)
    options = {"by": "head", "heads": found, "method": "log_odds", "min_count": survey.thresholds["min_count"]}
    yield "tokens_head", analysis.notable_tokens(survey.trace, None, **options)


def movers(survey: Survey) -> Answer:
    """Whose shifts moved the best neurons, with their texts."""
    best = survey.neurons.head(survey.settings.n_best)
    table = analysis.movers(survey.trace, survey.entries, n=5).astype({"param": object})
    table = table.merge(best[KEYS], on=KEYS)
    yield "movers", table.assign(text=[survey.trace.text(int(sample)) for sample in table["sample_id"]])

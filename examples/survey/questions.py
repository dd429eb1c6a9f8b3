"""The questions of a survey, and the jobs that ask them."""

from __future__ import annotations

from functools import partial

from omegaconf import DictConfig

from examples.survey import model, record, words
from examples.survey.jobs import Job
from examples.survey.survey import Question, Survey, write_table

CHAIN = "chain"
OF = ("step", "sample", "neuron")
NORMALISED = ("none", "param", "neuron", "series")
# The longest first, so that the processes end together.
QUESTIONS = {
    CHAIN: Question(words.chain),
    "facts": Question(record.facts),
    "movement": Question(record.movement),
    "phases": Question(record.phases),
    "weights": Question(record.weights),
    "bigrams": Question(record.bigrams),
    "alignment": Question(record.alignment),
    "heads": Question(record.heads),
    **{f"outliers_{of}": Question(partial(record.outliers, of=of)) for of in OF},
    **{f"normalised_{how}": Question(partial(record.outliers_normalised, normalise=how)) for how in NORMALISED},
    "ablate_heads": Question(model.heads),
    "selections": Question(words.selections),
    "selective": Question(model.selective, after=CHAIN),
    "permuted": Question(words.null, after=CHAIN),
    "null_pipeline": Question(model.null_pipeline, after=CHAIN),
    "activations": Question(model.activations, after=CHAIN),
    "neurons": Question(model.neurons, after=CHAIN, by_part=True),
    "methods": Question(words.methods, after=CHAIN),
    "ablate_neurons": Question(model.best_neurons, after=CHAIN),
    "ablate_entries": Question(model.entries, after=CHAIN),
    "movers": Question(record.movers, after=CHAIN),
    "ngrams": Question(words.ngrams, after=CHAIN),
    "weighted": Question(words.weighted, after=CHAIN),
}


def answer(settings: DictConfig, name: str, part: int, parts: int) -> None:
    """Ask one question and write its tables, those of a part of the neurons into a folder of parts."""
    survey = Survey(settings, part, parts)
    folder = survey.tables if parts == 1 else survey.tables / "parts"
    for table, found in QUESTIONS[name].ask(survey):
        write_table(folder, table if parts == 1 else f"{table}.{part:03d}", found)


def jobs_of(settings: DictConfig) -> list[Job]:
    """Return the jobs of the questions that the settings name."""
    names = list(settings.only or QUESTIONS)
    unknown = sorted(set(names) - set(QUESTIONS))
    if unknown:
        raise ValueError(f"`only` names the questions {unknown}, expected some of {list(QUESTIONS)}")
    jobs = []
    for name in names:
        question = QUESTIONS[name]
        parts = settings.workers if question.by_part else 1
        after = question.after if question.after in names else None
        for part in range(parts):
            label = name if parts == 1 else f"{name}-{part:03d}"
            jobs.append(Job(label, answer, (settings, name, part, parts), after))
    return jobs

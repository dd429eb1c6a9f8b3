"""What every question of a survey gets: a run, its trace, its trained model, and the chain's tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from examples.analyze import load_run
from examples.models import LanguageModel
from examples.models.language_model import batch_first_logits
from lightning_gradtrace import analysis, open_trace
from lightning_gradtrace.report import read_tables
from lightning_gradtrace.store import Trace

Answer = Iterator[tuple[str, pd.DataFrame]]
KEYS = ["param", "axis", "neuron"]


@dataclass
class Survey:
    """One run under survey, as one process sees it.

    Attributes:
        settings: as composed from `conf/survey.yaml`.
        part: which part of the neurons is this process's.
        parts: how many parts there are.
    """

    settings: DictConfig
    part: int = 0
    parts: int = 1

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.settings.run)

    @property
    def tables(self) -> Path:
        """The folder of the tables."""
        return Path(self.settings.output) / "tables"

    @cached_property
    def trace(self) -> Trace:
        """The trace of the run."""
        return open_trace(self.run / "trace.zarr")

    @cached_property
    def thresholds(self) -> dict[str, Any]:
        """Thresholds of notable tokens, as the run was configured."""
        cfg = self.cfg.analysis
        return {name: cfg[name] for name in ("min_count", "n_relative", "n_notable", "min_relative")}

    @cached_property
    def cfg(self) -> DictConfig:
        """The configuration of the run."""
        cfg = OmegaConf.load(self.run / "config.yaml")
        assert isinstance(cfg, DictConfig)
        return cfg

    @cached_property
    def model(self) -> LanguageModel:
        """The trained model, on the device that the settings name."""
        device = self.settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_run(self.run, device)[1]

    @property
    def running(self) -> dict[str, Any]:
        """Arguments of every function that runs the model."""
        return {"batch_size": self.settings.batch_size, "forward": batch_first_logits}

    @cached_property
    def predictor(self) -> analysis.Predictor:
        """The model and the texts of the trace, with a memory of predictions."""
        return analysis.Predictor(self.model, self.trace.tokens()[1], **self.running)

    @cached_property
    def chain(self) -> dict[str, pd.DataFrame]:
        """The tables `entries`, `notable` and `neurons`, which another process has written."""
        return read_tables(self.tables)

    @cached_property
    def entries(self) -> pd.DataFrame:
        """The most frequent entries."""
        return self.chain["entries"]

    @cached_property
    def neurons(self) -> pd.DataFrame:
        """Neurons with notable tokens."""
        found = self.chain["neurons"]
        return found[found["n_notable"] > 0].head(self.settings.n_neurons or len(found)).reset_index(drop=True)

    @property
    def mine(self) -> pd.DataFrame:
        """This process's part of the neurons: every so-manieth, so that layers are spread evenly."""
        return self.neurons.iloc[self.part :: self.parts].reset_index(drop=True)

    def some_texts(self, n: int) -> np.ndarray:
        """Return n texts of the trace, drawn at random."""
        tokens = self.trace.tokens()[1]
        rng = np.random.default_rng([self.settings.seed, 0x7465787473])
        return tokens[np.sort(rng.choice(len(tokens), min(n, len(tokens)), replace=False))]


Ask = Callable[[Survey], Answer]


@dataclass(frozen=True)
class Question:
    """A question and when it can be asked.

    Attributes:
        ask: yields names and tables, each of which is written at once.
        after: name of the question whose tables it needs.
        by_part: whether neurons are shared out among processes.
    """

    ask: Ask
    after: str | None = None
    by_part: bool = False


def write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    """Write a table; tuples of tokens become JSON lists."""
    shown = table.copy(deep=False)
    for column in shown.columns if len(shown) else []:
        if isinstance(shown[column].iloc[0], tuple):
            shown[column] = [json.dumps(list(value), ensure_ascii=False, default=int) for value in shown[column]]
    folder.mkdir(parents=True, exist_ok=True)
    shown.to_csv(folder / f"{name}.csv", index=False)

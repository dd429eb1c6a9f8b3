"""The series of one run: how far its steps are those of n-grams, and how specific they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import OmegaConf

from examples.data.base import TextDataModule
from lightning_gradtrace import Trace, analysis, open_trace

EMBEDDING, HEAD = "network.embedding.weight", "network.head.weight"


@dataclass
class Series:
    """What was measured over one training.

    Attributes:
        trace: of the run.
        pairs: `bigram_alignment` of single steps with the bigrams of their own batch.
        held_out: the same of the spans between, with the bigrams of the held-out text.
        in_all: the same of the whole training, in one row.
        influence: `self_influence`.
        sparsity: `shift_sparsity`.
        overlap: `selection_overlap`.
    """

    trace: Trace
    pairs: pd.DataFrame
    held_out: pd.DataFrame
    in_all: pd.DataFrame
    influence: pd.DataFrame
    sparsity: pd.DataFrame
    overlap: pd.DataFrame

    @classmethod
    def measure(cls, folder: Path, n_points: int, *, n_permutations: int = 199, max_tokens: int = 1000) -> Series:
        """Measure the run in a directory that `examples/train.py` wrote.

        Args:
            folder: the directory; each table is written into it.
            n_points: of a series.
            n_permutations: of the null of the bigrams.
            max_tokens: of the bigrams.
        """
        trace = open_trace(folder / "trace.zarr")
        every = max(1, len(trace.steps) // n_points)
        common: dict[str, Any] = {"n_permutations": n_permutations, "max_tokens": max_tokens}
        single = analysis.bigram_alignment(trace, EMBEDDING, HEAD, max_span=1, **common)
        text = held_out_text(folder)
        spans = analysis.bigram_alignment(trace, EMBEDDING, HEAD, texts=text, **common)
        in_all = analysis.bigram_alignment(trace, EMBEDDING, HEAD, texts=text, summed=True, **common)
        found = cls(
            trace=trace,
            pairs=single,
            held_out=spans[spans["last_step"] - spans["first_step"] > 1].reset_index(drop=True),
            in_all=in_all,
            influence=analysis.self_influence(trace, every=every),
            sparsity=analysis.shift_sparsity(trace, every=every),
            overlap=analysis.selection_overlap(trace, every=every),
        )
        for name in ("pairs", "held_out", "in_all", "influence", "sparsity", "overlap"):
            getattr(found, name).to_csv(folder / f"{name}.csv", index=False)
        return found

    def together(self) -> pd.DataFrame:
        """Return the default series of the trace and those of this class, in one table."""
        whole = {
            "bigram_alignment": (self.pairs, "first_step", "pearson"),
            "held_out_alignment": (self.held_out, "first_step", "pearson"),
            "overlap": (self.overlap, "step", "overlap"),
        }
        parts = [analysis.trace_series(self.trace)]
        for name, (table, at, value) in whole.items():
            parts.append(pd.DataFrame({"series": name, "param": "", "step": table[at], "value": table[value]}))
        return pd.concat(parts, ignore_index=True)


def held_out_text(folder: Path) -> np.ndarray:
    """Return the samples of the validation split of a run, (sample, position)."""
    data: TextDataModule = instantiate(OmegaConf.load(folder / "config.yaml").data)
    data.prepare_data()
    data.setup("fit")
    held = data.datasets["val"]
    texts = [held[item][0].numpy() for item in range(len(held))]
    longest = max(map(len, texts))
    return np.stack([np.pad(text, (0, longest - len(text)), constant_values=-1) for text in texts])

"""A finished run as a study sees it, and the claims that a study checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from examples.mechanisms.task import Sequences, Task
from examples.mechanisms.watch import read_measures
from examples.models import CircuitModel
from lightning_gradtrace import Trace, open_trace


@dataclass
class Claim:
    """One statement with what it asks for and what was found.

    Attributes:
        text: the statement.
        found: the measured number.
        relation: ">=" or "<".
        wanted: the number it is compared with.
    """

    text: str
    found: float
    relation: str
    wanted: float

    @property
    def holds(self) -> bool:
        """Whether it is true of this run; a number that is not one holds nothing."""
        return bool(self.found >= self.wanted if self.relation == ">=" else self.found < self.wanted)

    def __str__(self) -> str:
        verdict = "pass" if self.holds else "FAIL"
        return f"{verdict}  {self.text}: {self.found:.3f} ({self.relation} {self.wanted:g})"


def claim_table(claims: list[Claim]) -> pd.DataFrame:
    """Return claims as a table: text, found, relation, wanted, holds."""
    columns = ["text", "found", "relation", "wanted", "holds"]
    return pd.DataFrame([[getattr(claim, name) for name in columns] for claim in claims], columns=columns)


@dataclass
class Run:
    """The directory of a finished run.

    Attributes:
        path: the directory; the traced run is in it, controls are in folders of their own below.
        cfg: its configuration.
        task: the task.
    """

    path: Path
    cfg: DictConfig
    task: Task = field(init=False)

    def __post_init__(self) -> None:
        self.task = instantiate(self.cfg.task)

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run from its directory."""
        cfg = OmegaConf.load(path / "config.yaml")
        assert isinstance(cfg, DictConfig)
        return cls(path, cfg)

    @cached_property
    def trace(self) -> Trace:
        """The trace of the run."""
        return self.open("trace.zarr")

    def open(self, name: str) -> Trace:
        """Open one of the traces in its directory."""
        return open_trace(self.path / name)

    @cached_property
    def sequences(self) -> Sequences:
        """The training data, by sample id."""
        return self.task.sequences(self.cfg.data.n_samples, self.cfg.seed)

    def measures(self, control: str | None = None) -> pd.DataFrame:
        """Return the measures by step, one column each, of the run or of one of its controls."""
        return read_measures((self.path / control if control else self.path) / "measures.csv")

    def model(self, control: str | None = None) -> CircuitModel:
        """Return the trained model, in evaluation mode."""
        folder = self.path / control if control else self.path
        cfg: Any = OmegaConf.load(folder / "config.yaml")
        model = build_model(cfg, self.task)
        model.load_state_dict(torch.load(folder / "model.pt", map_location="cpu", weights_only=True))
        return model.eval()


def conclude(path: Path) -> Run:
    """Let the study of a trained run check its claims; print them and write them into `claims.csv`.

    Args:
        path: the run directory.

    Returns:
        The run.
    """
    run = Run.read(path)
    claims: list[Claim] = get_method(run.cfg.study)(run)
    claim_table(claims).to_csv(path / "claims.csv", index=False)
    print(*claims, sep="\n")
    print(f"run directory  {path}")
    return run


def build_model(cfg: Any, task: Task) -> CircuitModel:
    """Make the model of a configuration for a task."""
    options = {"n_tokens": len(task.words), "context": task.context, "n_outputs": task.n_outputs}
    return instantiate(cfg.model, **options)

"""Small traces on disk, and a runner of commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from lightning_gradtrace.cli import app
from tests.analysis.traces import write_trace

Run = Callable[..., Result]
SHAPES = {"hidden.weight": (4, 4), "head.weight": (12, 4)}
VOCABULARY = [*(f"w{n}" for n in range(9)), "NA", "null", "\x1b[31mred\n"]


@pytest.fixture
def run() -> Run:
    """Run a command; stdout and stderr are apart in the result."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="gradtrace")

    return invoke


@pytest.fixture(scope="session")
def trace_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples 0 to 9 hold the words 3 and 9 to 11, and move column 1 of `hidden.weight`; the others column 2."""
    rng = np.random.default_rng(0)
    sample_id = np.stack([rng.permutation(20)[:10] for _ in range(24)])
    text, index = {}, []
    for sample in range(20):
        own = [3, 9, 10, 11] if sample < 10 else [5, 6]
        text[sample] = rng.permutation([*own, *own, *rng.integers(0, 9, 6)]).tolist()
    for sample in sample_id.reshape(-1):
        rows = np.sort(rng.permutation(4)[:3])
        index.append(np.append(rows * 4 + (1 if sample < 10 else 2), 16 + rng.integers(48)))
    weights = {step: {name: rng.normal(size=shape) for name, shape in SHAPES.items()} for step in (0, 12, 24)}
    shift = rng.normal(size=(240, 4))
    folder = tmp_path_factory.mktemp("traces") / "a [b] é.zarr"
    write_trace(
        SHAPES, sample_id, np.array(index), shift=shift, text=text, vocab=VOCABULARY, weights=weights, to=folder
    )
    return folder


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with functions that return a model of the trace's shapes."""
    file = tmp_path_factory.mktemp("models") / "my model.py"
    file.write_text(
        """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 4)
        self.hidden = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 12, bias=False)

    def forward(self, tokens):
        return self.head(torch.relu(self.hidden(self.embed(tokens))))

def build(seed="0"):
    torch.manual_seed(int(seed))
    return Model()

def positions_first(seed="0"):
    return build(seed), lambda model, tokens: model(tokens.T).transpose(0, 1)

def nothing():
    return None
"""
    )
    return file

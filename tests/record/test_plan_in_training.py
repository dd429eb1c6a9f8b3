"""What `plan` and the line at the start of a run promise is what a real training writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradtrace import Dense, Factored, GradTrace, Norms, Sketch, TopK, open_trace
from lightning_gradtrace.record import Record
from lightning_gradtrace.record.plan import plan
from tests.test_callback import LENGTH, VOCAB, Model, Sentences, fit

BATCH, N_STEPS = 8, 60


class Wide(Model):
    """A model whose shifts are many and without zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 48)
        layer = nn.TransformerEncoderLayer(48, 2, 96, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(48, VOCAB)


@pytest.mark.parametrize(
    "record",
    [Dense(), Dense(codec="small"), Factored(), Sketch(256), Norms(), TopK(300), TopK(2400, per="step")],
    ids=lambda record: f"{type(record).__name__}-{record.group}-{getattr(record, 'codec', '')}",
)
def test_a_training_writes_what_was_predicted(record: Record, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, loader = Wide(), DataLoader(Sentences(BATCH * 10), batch_size=BATCH)
    with caplog.at_level("INFO"):
        fit(model, GradTrace(tmp_path / "a.zarr", record, inputs=None), loader=loader, max_epochs=6)
    trace = open_trace(tmp_path / "a.zarr")
    assert (trace.n_steps, trace.n_occurrences) == (N_STEPS, N_STEPS * BATCH)
    table = plan(model, record, N_STEPS, BATCH, n_positions=LENGTH)
    written = sum(file.stat().st_size for file in (tmp_path / "a.zarr").rglob("*") if file.is_file())
    print(f"{record}: predicted {table['bytes'].sum()}, written {written}")
    if isinstance(record, (TopK, Factored)):
        # Numbers of kept entries, and inputs that repeat, compress the better the smaller a model is.
        assert 0.9 * written < table["bytes"].sum() < 1.35 * written
    else:
        assert table["bytes"].sum() == pytest.approx(written, rel=0.1)
    if isinstance(record, TopK):
        place = tmp_path / "a.zarr" / record.group / "shift" / "c"
        shifts = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        predicted = table.set_index("array").loc[f"{record.group}/shift", "bytes"]
        assert predicted == pytest.approx(shifts, rel=0.1)
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("GradTrace: this run")]
    said = re.search(r"will write (about|at most) ([\d.]+) ([kM])B in 60 steps", line)
    assert said is not None, line
    size = float(said[2]) * {"k": 1e3, "M": 1e6}[said[3]]
    assert (said[1] == "at most") == isinstance(record, Factored)
    if not isinstance(record, Factored):  # the run doesn't know the length of its texts yet
        assert size == pytest.approx(table["bytes"].sum(), rel=0.05)  # two or three digits are shown
    assert size > 0.9 * written

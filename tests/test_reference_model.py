"""The reference model of the 2023 experiment at its full size: what is tracked, and the ledger with clipping active."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch.utils.data import DataLoader

from examples.models import LanguageModel
from lightning_gradtrace import GradTrace, TopK, open_trace

VOCABULARY, BATCH, CONTEXT = 28_782, 20, 35


def test_the_ledger_closes_on_the_reference_model_with_clipping_active(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    model = LanguageModel(VOCABULARY)
    assert sum(p.numel() for p in model.parameters()) == 12_267_582
    text = torch.randint(VOCABULARY, (3 * BATCH, CONTEXT + 1))
    data = [(row[:-1], row[1:]) for row in text]

    def collate(items):
        tokens, targets = zip(*items, strict=True)
        return torch.stack(tokens, 1), torch.stack(targets, 1)

    path = tmp_path / "a.zarr"
    trainer = pl.Trainer(
        max_epochs=1,
        gradient_clip_val=0.5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GradTrace(path, TopK(1000), ledger_every_n_steps=1)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # Lightning's advice on workers and loops
        trainer.fit(model, DataLoader(data, batch_size=BATCH, collate_fn=collate))
    trace = open_trace(path)
    assert trace.n_entries == 720_000
    assert len(trace.params) == 12
    assert (trace.steps["clip_factor"] < 0.9).all()
    assert (trace.steps["residual"] < 1e-5).all()
    assert (trace.steps["sum_error"] < 1e-5).all()
    assert trace.occurrences["slot"].max() == BATCH - 1

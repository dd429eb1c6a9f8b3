"""Real shifts: the beginning of `experiment=english`, all of them at a few steps and the largest of every step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lightning_gradtrace import Dense, GradTrace, TopK, Trace, open_trace
from lightning_gradtrace.record import StepRanges

CONF = str(Path(__file__).resolve().parents[1] / "conf")
STEPS = (0, 30, 150, 400)


def record_shifts(path: Path, steps: Sequence[int] = STEPS, k: int = 400) -> Trace:
    """Train `experiment=english` up to the last of some steps, and record.

    Args:
        path: where the trace goes.
        steps: at which steps Dense is kept, ascending.
        k: entries kept per sample.

    Returns:
        A trace with Dense of these steps and TopK(k) of all.
    """
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("config", ["experiment=english", f"run_dir={path.parent}", "callbacks=none"])
    L.seed_everything(config.seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    data = instantiate(config.data)
    data.prepare_data()
    data.setup("fit")
    model = instantiate(config.model, n_tokens=len(data.vocabulary), **instantiate(config.optim))
    schedule = StepRanges([(step, step + 1) for step in steps])
    recorder = GradTrace(path, [Dense(schedule=schedule), TopK(k)])
    trainer = L.Trainer(
        max_steps=steps[-1] + 1,
        gradient_clip_val=config.trainer.gradient_clip_val,
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
    )
    trainer.fit(model, data)
    return open_trace(path)

"""What a training step asks of a device: kernels and waits, counted on the made-up device of the tests.

    python -m benchmarks.launches --workload A --optimizer sgd

Where kernels are short, as on a GPU, a step takes as long as it takes to ask for them, and at every wait the device
runs dry. No card is needed to count them, and no other load changes the numbers. What is counted are kernels of
the CPU that stand in for a device's (tests/device/pretend); libraries for a card may join some of them.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
from typing_extensions import override

from benchmarks.output import markdown
from benchmarks.workloads import WORKLOADS, Setting, Training
from lightning_gradtrace import Dense, Factored, GradTrace, Norms, Sketch, TopK
from tests.device import pretend

STEPS = 4
"""Of which the last one counts: uses have been checked by then, and the search has a threshold."""


def take() -> tuple[int, int]:
    """Return the numbers of kernels and waits since the last call."""
    return pretend.take_kernels(), len(pretend.take_waits())


class Passes(pl.Callback):
    """Counts what the forward and the backward pass ask for; stands before GradTrace."""

    @override
    def on_train_batch_start(self, *_: object) -> None:
        """Begin anew."""
        take()

    @override
    def on_after_backward(self, *_: object) -> None:
        """Take what has been counted."""
        self.counts = take()


class Rest(pl.Callback):
    """Counts what is asked for from the backward pass to the end of the step; stands behind GradTrace."""

    @override
    def on_train_batch_end(self, *_: object) -> None:
        """Take what has been counted."""
        self.counts = take()


def count(setting: Setting, *callbacks: pl.Callback) -> dict[str, int]:
    """Train and return the counts of the last step."""
    pl.seed_everything(1111, verbose=False)
    passes, rest = Passes(), Rest()
    trainer = pl.Trainer(
        max_epochs=1,
        gradient_clip_val=setting.workload.clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[passes, *callbacks, rest],
        **pretend.trainer("32-true"),
    )
    trainer.fit(Training(setting.workload, setting.optimizer), setting.workload.data(STEPS))
    names = ("kernels of the passes", "waits", "kernels of the rest", "waits of the rest")
    return dict(zip(names, (*passes.counts, *rest.counts), strict=True))


def table(setting: Setting) -> pd.DataFrame:
    """Return the counts of plain training and of each record."""
    records = [TopK(setting.k), TopK(setting.k * setting.workload.batch, per="step")]
    records += [Dense(), Factored(), Norms(), Sketch(16)]
    rows: dict[str, Any] = {"plain": count(setting)}
    with tempfile.TemporaryDirectory() as folder:
        for number, record in enumerate(records):
            name = type(record).__name__ + (", per step" if getattr(record, "per", None) == "step" else "")
            rows[name] = count(setting, GradTrace(Path(folder) / f"{number}.zarr", record))
    return pd.DataFrame(rows).T


def main(given: list[str] | None = None) -> None:
    """Count and print what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=list(WORKLOADS), default="A")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    arguments = parser.parse_args(given)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pretend.load()
    print(markdown(table(Setting(WORKLOADS[arguments.workload], arguments.optimizer))))


if __name__ == "__main__":
    main()

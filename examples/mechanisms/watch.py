"""Measures a network on a schedule while it trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from typing_extensions import override

from examples.mechanisms.task import Task
from examples.models import CircuitModel


class Watch(L.Callback):
    """Calls a task's measures every so many steps and writes them into a table as they come: step, measure, value.

    Measuring leaves the training as it is: no gradients, no training mode, no random numbers of the training. What a
    task measures with is on the CPU; a network that is elsewhere is copied there.

    Args:
        task: measures a network.
        path: CSV file.
        every_n_steps: schedule; step 0 is measured before the first update.
    """

    def __init__(self, task: Task, path: Path, every_n_steps: int) -> None:
        self.task = task
        self.path = path
        self.every_n_steps = every_n_steps

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the table."""
        self.path.write_text("step,measure,value\n")
        self._last = -1

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure the weights as they are before step number `global_step`."""
        if trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer.global_step, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the trained weights."""
        self._measure(trainer.global_step, pl_module)

    def _measure(self, step: int, model: L.LightningModule) -> None:
        assert isinstance(model, CircuitModel)
        if step == self._last:  # the next micro-batch of a step
            return
        self._last = step
        was_training = model.training
        model.eval()
        network = model.network if model.device.type == "cpu" else copy.deepcopy(model.network).cpu()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            values = self.task.measure(network)
        model.train(was_training)
        rows = pd.DataFrame({"step": step, "measure": list(values), "value": list(values.values())})
        rows.to_csv(self.path, mode="a", header=False, index=False)


def read_measures(path: Path) -> pd.DataFrame:
    """Return the measures of a run, one column each, by step."""
    return pd.read_csv(path).pivot(index="step", columns="measure", values="value")

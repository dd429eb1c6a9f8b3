"""Small models and one way to train them, with and without the trace, compared weight by weight and step by step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradtrace import GradTrace, TopK, open_trace

N_SAMPLES, WIDTH = 14, 5


def data(n: int = N_SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(n, WIDTH, generator=generator), torch.randn(n, 2, generator=generator))


class Net(pl.LightningModule):
    """Two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 7), nn.Linear(7, 2)

    def forward(self, x):
        return self.last(torch.dropout(self.first(x).tanh(), 0.3, self.training))

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Manual(Net):
    """Manual optimization, with room for what a step does to its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.change()
        optimizer.step()

    def change(self) -> None:
        """Change nothing."""


def fit(model: pl.LightningModule, *callbacks: pl.Callback, loader: Any = None, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=options.pop("enable_checkpointing", False),
        enable_progress_bar=options.pop("enable_progress_bar", False),
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 2, **options},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # Lightning's advice on workers and loops
        trainer.fit(model, DataLoader(data(), batch_size=4, shuffle=True) if loader is None else loader)
    return trainer


def hooks(model: nn.Module) -> list[Any]:
    """Everything that could have been left behind."""
    found: list[Any] = list(_get_current_function_mode_stack())
    for p in model.parameters():
        found += list((p._backward_hooks or {}).values())
        found += list((getattr(p, "_post_accumulate_grad_hooks", None) or {}).values())
    for m in model.modules():
        found += [*m._forward_hooks.values(), *m._forward_pre_hooks.values(), *m._backward_hooks.values()]
    return found


def check_nothing_left(model: nn.Module, trainer: pl.Trainer) -> None:
    assert hooks(model) == []
    for optimizer in trainer.optimizers:
        assert not getattr(optimizer, "_optimizer_step_pre_hooks", ())
        assert not getattr(optimizer, "_optimizer_step_post_hooks", ())
    assert "process_dataloader" not in trainer.strategy.__dict__


def every_entry(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def run(make, path: Path, callbacks=lambda: (), loader=lambda: None, bound: float = 1e-5, **options: Any):
    """Train twice, check that the trace changed nothing and that all shifts add up to the change of the weights.

    Returns:
        The trace and the traced model.
    """
    models = []
    for traced in (False, True):
        pl.seed_everything(3, verbose=False)
        model = make()
        n = every_entry(model)
        trace_cb = GradTrace(
            path, TopK(n), params="*", ledger_every_n_steps=1, weights_every_n_steps=1, overwrite=True, inputs=None
        )
        made = {key: value() if key == "plugins" else value for key, value in options.items()}
        # First, so that its last snapshot is of the weights that trained, before another callback swaps them.
        trainer = fit(model, *([trace_cb] if traced else []), *callbacks(), loader=loader(), **made)
        models.append(model)
        check_nothing_left(model, trainer)
    for (name, a), (_, b) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.equal(a, b), name
    trace = open_trace(path)
    assert trace.attrs["complete"], trace.attrs["end_reason"]
    assert trace.verify().ok
    check_changes(trace, bound)
    return trace, models[1]


def check_changes(trace, bound: float = 1e-5) -> None:
    """For plain SGD: the recorded shifts of every step and parameter add up to W_after - W_before."""
    frame = trace.topk.frame()
    assert len(trace.steps) > 0
    for step in trace.steps.index:
        for name in trace.params["param"]:
            before, after = (trace.weights(name, s).astype(float).ravel() for s in (step, step + 1))
            part = frame[(frame["step"] == step) & (frame["param"] == name)]
            found = np.zeros(before.size)
            np.add.at(found, part["index"].to_numpy(), part["shift"].to_numpy())
            error = np.linalg.norm(found - (after - before))
            assert error <= bound * np.linalg.norm(after - before) + 1e-6 * np.linalg.norm(before), (step, name, error)

"""Run a LightningModule's training step for its forward pass only, for the permutation probe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

from lightning_gradtrace.capture.probing.attributes import OptimizerStates


def rehearse(trainer: Any, pl_module: Any, batch_idx: int, batch: Any) -> None:
    """Run `training_step` on a batch; what it logs goes nowhere.

    With manual optimization its backward passes and optimizer steps do nothing either, and what other methods of an
    optimizer of the user's own do to it (SAM's ``first_step``) is undone. The weights are the caller's to put back.

    Args:
        trainer: Lightning's trainer, for the precision of its forward pass.
        pl_module: the LightningModule.
        batch_idx: index of the batch.
        batch: the batch.
    """
    takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1
    with ExitStack() as stack:
        stack.callback(OptimizerStates(trainer.optimizers, pl_module).restore)
        stack.enter_context(_replaced(pl_module, _idle_methods(pl_module)))
        for optimizer in trainer.optimizers:  # which a step may ask for without `self.optimizers()`
            idle = IdleOptimizer(optimizer)
            stack.enter_context(_replaced(optimizer, {"step": idle.step, "zero_grad": idle.zero_grad}))
        stack.enter_context(trainer.precision_plugin.train_step_context())
        pl_module.training_step(batch, batch_idx) if takes_index else pl_module.training_step(batch)


def loss_factor(trainer: Any) -> float:
    """Return what the training multiplies the user's loss by before the backward pass.

    Lightning divides the loss by the number of accumulated micro-batches; fp16 AMP multiplies it by the loss scale.
    With manual optimization the user does what there is to do.

    Args:
        trainer: Lightning's trainer.

    Returns:
        The factor.
    """
    automatic = trainer.lightning_module.automatic_optimization
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    return scale / (trainer.accumulate_grad_batches if automatic else 1)


class IdleOptimizer:
    """Stands in for an optimizer: its steps evaluate their closure, and that is all they do.

    Args:
        optimizer: the optimizer, for everything else that is asked of it.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Evaluate the closure."""
        return None if closure is None else closure()

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def toggle_model(self, *args: Any, **kwargs: Any) -> nullcontext[None]:
        """Do nothing."""
        return nullcontext()


class IdleScheduler:
    """Stands in for a learning rate scheduler.

    Args:
        scheduler: the scheduler, for everything else that is asked of it.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


def _idle_methods(pl_module: Any) -> dict[str, Callable[..., Any]]:
    """Return stand-ins for what a training step may call to train, to log and to print."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def idle(found: Any, stand_in: Callable[[Any], Any]) -> Any:
        return [stand_in(one) for one in found] if isinstance(found, list) else found and stand_in(found)

    optimizers, schedulers = pl_module.optimizers, pl_module.lr_schedulers
    methods: dict[str, Callable[..., Any]] = dict.fromkeys(("log", "log_dict", "print"), nothing)
    if not pl_module.automatic_optimization:
        names = ("manual_backward", "clip_gradients", "toggle_optimizer", "untoggle_optimizer", "zero_grad")
        methods.update(dict.fromkeys(names, nothing))
        methods["optimizers"] = lambda *args, **kwargs: idle(optimizers(*args, **kwargs), IdleOptimizer)
        methods["lr_schedulers"] = lambda: idle(schedulers(), IdleScheduler)
    return methods


@contextmanager
def _replaced(owner: Any, methods: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace methods of one object for a while; attributes that stood in their place before come back."""
    before = {name: owner.__dict__[name] for name in methods if name in owner.__dict__}
    for name, method in methods.items():
        object.__setattr__(owner, name, method)
    try:
        yield
    finally:
        for name in methods:
            with suppress(AttributeError):
                object.__delattr__(owner, name)
        for name, method in before.items():
            object.__setattr__(owner, name, method)

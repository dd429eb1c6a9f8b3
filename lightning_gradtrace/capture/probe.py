"""Run a model on a batch and on the same batch permuted, leaving no trace of it in the model.

The two runs are made in evaluation mode without gradients, or with them where the training step takes gradients of its
own; along the right axis, what a use receives in the second run is what it received in the first, permuted
(docs/concepts.md, 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradtrace.capture.batch import permute_samples, sample_axis_of, tensors
from lightning_gradtrace.capture.random_state import RandomState
from lightning_gradtrace.capture.sharded import bring_to_rest, is_spread
from lightning_gradtrace.capture.tape import Tape
from lightning_gradtrace.capture.use import Use


def permutation(n_samples: int) -> Tensor:
    """Return a fixed order of the samples, for the permuted batch; no global seed is touched.

    It does not commute with a shift or a reversal: a model that shifts or reverses the samples is told from one that
    leaves them where they are. Of two samples the second is taken twice, because all orders of two commute.
    """
    if n_samples < 3:
        return torch.full((n_samples,), n_samples - 1)
    generator = torch.Generator().manual_seed(0)
    order = identity = torch.arange(n_samples)
    while any(torch.equal(regular[order], order[regular]) for regular in (identity.flip(0), identity.roll(1))):
        order = torch.randperm(n_samples, generator=generator)
    return order


@dataclass(frozen=True)
class PermutationProbe:
    """Runs a model on a batch and on the batch permuted, when asked.

    Attributes:
        module: the module whose modes, buffers and other tensors are restored afterwards.
        parameters: tracked parameters by name.
        run: runs the model's training forward on a batch.
        batch: the batch.
        n_samples: number of samples in it.
        batch_axis: axis of the samples in the batch's tensors.
    """

    module: nn.Module
    parameters: Mapping[str, Tensor]
    run: Callable[[Any], Any]
    batch: Any
    n_samples: int
    batch_axis: int

    def coincides(self) -> bool:
        """Say whether something else than samples is as numerous: positions, features, rows of a table."""
        sizes = {size for tensor in (*self.module.parameters(), *self.module.buffers()) for size in tensor.shape}
        for tensor in tensors(self.batch):
            samples = sample_axis_of(tensor, self.n_samples, self.batch_axis)
            sizes |= {size for axis, size in enumerate(tensor.shape) if axis != samples}
        return self.n_samples in sizes

    def __call__(self) -> tuple[list[Use], list[Use], Tensor]:
        """Record the uses of both runs.

        Returns:
            Uses of the run on the batch, uses of the run on the permuted batch, and the order of its samples.
        """
        order = permutation(self.n_samples)
        permuted = permute_samples(self.batch, order, self.n_samples, self.batch_axis)
        first, second = self._uses(self.batch, permuted)
        return first, second, order

    def own_axis(self, tensor: Tensor) -> int | None:
        """Return the axis of the samples in a tensor of the batch itself, None for all others."""
        for own in tensors(self.batch):
            if own.shape == tensor.shape and own.data_ptr() == tensor.data_ptr():
                return sample_axis_of(own, self.n_samples, self.batch_axis)
        return None

    def again(self) -> list[Use]:
        """Record the uses of a second run on the batch, after a first one that leaves its state and random numbers."""
        return self._uses(self.batch, self.batch)[1]

    def _uses(self, *batches: Any) -> list[list[Use]]:
        try:
            return self._recorded(batches, with_gradients=False)
        except RuntimeError as error:  # a step that differentiates on its own, to adapt to a part of the batch
            if "require grad" not in str(error) or is_spread(self.module):
                raise
            return self._recorded(batches, with_gradients=True)

    def _recorded(self, batches: Sequence[Any], *, with_gradients: bool) -> list[list[Use]]:
        found = []
        with undisturbed(self.module), torch.set_grad_enabled(with_gradients):
            for data in batches:
                with Tape(self.parameters, data, self.n_samples, probing=True) as tape:
                    self.run(data)
                found.append(tape.uses)
        return found


@dataclass(frozen=True)
class Weight:
    """A parameter and its gradient, which a forward pass may change: a teacher that follows, a constraint, SAM."""

    parameter: nn.Parameter
    value: Tensor
    gradient: Tensor | None
    held: Tensor | None

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Weight:
        """Keep the present values."""
        gradient = parameter.grad
        return cls(parameter, parameter.detach().clone(), gradient, None if gradient is None else gradient.clone())

    def restore(self) -> None:
        """Write the values back where they have changed; writing would count as a change in place."""
        if not torch.equal(self.parameter, self.value):
            self.parameter.copy_(self.value)
        if self.parameter.grad is not self.gradient:
            self.parameter.grad = self.gradient
        if self.gradient is not None and self.held is not None and not _same(self.gradient, self.held):
            self.gradient.copy_(self.held)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.layout != torch.strided:
        return one._nnz() == other._nnz() and torch.equal(one.to_dense(), other.to_dense())
    return torch.equal(one, other)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode and restore modes, weights, buffers, attributes and random states at the end.

    Tensor attributes include the states of torchmetrics metrics. What a forward does outside the module - files,
    global variables, Python containers of objects - is not undone.
    """
    modes = {m: m.training for m in module.modules()}
    buffers = {buffer: buffer.clone() for buffer in module.buffers()}
    weights = [] if is_spread(module) else [Weight.of(parameter) for parameter in module.parameters()]
    attributes = {m: Attributes.of(m) for m in module.modules()}
    random_state = RandomState.now()
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training
        for m, saved in attributes.items():
            saved.restore(m)
        bring_to_rest(module)  # weights that were gathered for a run would be taken for those after the next step
        random_state.restore()
        with torch.no_grad():
            for weight in weights:
                weight.restore()
            for buffer, value in buffers.items():
                if not torch.equal(buffer, value):  # writing would count as a change in place
                    buffer.copy_(value)


@dataclass(frozen=True)
class Attributes:
    """The plain attributes, tensors and lists of one module; parameters, buffers and children are not among them.

    Attributes:
        values: the objects by name. They are put back themselves: a list may be shared, a tensor may be a parameter.
        lists: the items of those that are lists.
        generators: random generators of the module's own, with their states.
        contents: copies of what the tensors hold, parameters left out.
    """

    values: dict[str, Any]
    lists: dict[str, list[Any]]
    generators: list[tuple[torch.Generator, Tensor]]
    contents: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, module: nn.Module) -> Attributes:
        """Take note of a module's attributes."""
        values: dict[str, Any] = {}
        lists: dict[str, list[Any]] = {}
        for name, value in module.__dict__.items():
            if name in ("_parameters", "_buffers", "_modules") or name.startswith("_trainer"):
                continue
            if isinstance(value, list):
                lists[name] = list(value)
            if value is None or isinstance(value, (bool, int, float, str, list, Tensor)):
                values[name] = value
        found = [v for v in (*values.values(), *(v for items in lists.values() for v in items)) if _is_state(v)]
        generators = [(v, v.get_state()) for v in module.__dict__.values() if isinstance(v, torch.Generator)]
        return cls(values, lists, generators, [(tensor, tensor.detach().clone()) for tensor in found])

    def restore(self, module: nn.Module) -> None:
        """Put them back."""
        module.__dict__.update(self.values)
        for name, items in self.lists.items():
            self.values[name][:] = items
        for generator, state in self.generators:
            generator.set_state(state)
        with torch.no_grad():
            for tensor, content in self.contents:
                if tensor.shape != content.shape or not torch.equal(tensor, content):
                    tensor.resize_(content.shape).copy_(content)


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)

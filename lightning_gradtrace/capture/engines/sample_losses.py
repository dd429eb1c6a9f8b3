"""Run a user's per-sample loss on a micro-batch again, with the weights, buffers and random draws of its forward pass.

Nothing of it reaches the training: parameters and buffers are swapped for copies while the function runs
(`torch.func.functional_call`), and the states of all random generators are put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from lightning_gradtrace.capture.forward.derived import quiet_vmap
from lightning_gradtrace.capture.forward.replay import outputs_of
from lightning_gradtrace.capture.intake.batch import map_tensors, sample_axis_of
from lightning_gradtrace.capture.precision import coarsest, coarsest_by_name
from lightning_gradtrace.capture.probing.random_state import RandomState

PerSampleLoss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Moment:
    """A micro-batch as its forward pass found it; entered around the forward pass, like a tape.

    Attributes:
        batch: the batch.
        n_samples: number of samples in it.
        batch_axis: axis of the samples in the batch's tensors.
        parameters: tracked parameters by name.
        state: random states when the forward pass began.
        uses: none; a tape has some.
    """

    batch: Any
    n_samples: int
    batch_axis: int
    parameters: Mapping[str, Tensor]
    state: RandomState | None = field(default=None, init=False)
    uses: list[Any] = field(default_factory=list, init=False)

    def __enter__(self) -> Self:
        """Take down the random states, for dropout to be drawn alike."""
        if self.state is None:  # entered again for the backward pass
            self.state = RandomState.now()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind."""

    def forget_backward(self) -> None:
        """Do nothing: no backward pass leaves anything here."""

    def clear(self) -> None:
        """Do nothing: the batch is kept as long as shares are computed from it."""

    def replayed(self) -> AbstractContextManager[None]:
        """Draw as the forward pass did, for a while."""
        return nullcontext() if self.state is None else self.state.replayed()


class WeightError(ArithmeticError):
    """The weight of a sample in the loss of the batch can't be told from its loss."""


class _Loss(nn.Module):
    """The per-sample loss as a module, so that `functional_call` can swap the parameters of the model in it."""

    def __init__(self, module: nn.Module, function: PerSampleLoss) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, batch: Any) -> Tensor:
        return self.function(self.module, batch)


class _SeesPrecision(TorchFunctionMode):
    """Takes note of the coarsest dtype of what gradients pass.

    Args:
        found: filled with the dtype, for every name.
        names: the parameters whose gradients may pass it.
    """

    def __init__(self, found: dict[str, torch.dtype], names: Iterable[str]) -> None:
        super().__init__()
        self._found, self._names = found, names

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function."""
        result = func(*args, **(kwargs or {}))
        passed = {t.dtype for t in outputs_of(False, args, result) if isinstance(t, Tensor) and t.requires_grad}
        if passed:
            self._found.update(coarsest_by_name([self._found, dict.fromkeys(self._names, coarsest(passed))]))
        return result


@dataclass
class Replay:
    """The per-sample losses of one micro-batch and their gradients.

    Attributes:
        module: the model.
        per_sample_loss: ``(module, batch) -> losses``, shape (sample,).
        moment: the micro-batch.
        factor: what the training multiplies the loss by before the backward pass: one over the number of accumulated
            micro-batches, times the loss scale of fp16 AMP.
        context: makes the context in which forward passes run (autocast).
        frozen: copy parameters and buffers, to evaluate after they have changed.
        precision: coarsest dtype that the gradient of each parameter may have passed in what has run, by name.
    """

    module: nn.Module
    per_sample_loss: PerSampleLoss
    moment: Moment
    factor: float = 1.0
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    frozen: bool = False
    precision: dict[str, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._loss = _Loss(self.module, self.per_sample_loss)
        parameters = {name: p.detach() for name, p in self.module.named_parameters()}
        self._values = {name: p.clone() for name, p in parameters.items()} if self.frozen else parameters
        self._buffers = {name: b.detach().clone() for name, b in self.module.named_buffers()}
        self._whole: Tensor | None = None

    def losses(self, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the losses of all samples of the batch together, shape (sample,), times `factor`.

        Args:
            values: parameters to differentiate by, in the place of the model's.

        Raises:
            ValueError: the function does not return one loss per sample.
        """
        with self.moment.replayed(), self.context():
            found = self._call({**self._values, **(values or {})}, self.moment.batch)
        n = self.moment.n_samples
        if not isinstance(found, Tensor) or found.shape != (n,):
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a `{type(found).__name__}`"
            raise ValueError(
                f"`GradTrace(per_sample_loss=...)` returned {what}, expected one loss for each of the {n} samples of "
                f"the batch, shape ({n},). Reduce over positions and classes, not over samples: for example "
                '`F.cross_entropy(module(x), y, reduction="none") / len(x)`.'
            )
        return found * self.factor

    def by_sample(self, names: Sequence[str], samples: slice) -> dict[str, Tensor]:
        """Differentiate batches of one sample each, all at once: `torch.func.vmap` of `torch.func.grad`.

        A batch of one sample may be normalised otherwise than the whole batch (a mean over samples, over tokens). So
        every gradient is multiplied by the sample's loss in the whole batch over its loss alone.

        Returns:
            ``g[samples]`` by name.

        Raises:
            RuntimeError: the model can't be run sample by sample: it draws random numbers, changes a buffer in place,
                or asks for the value of a tensor.
            WeightError: the loss of a sample is zero.
        """
        batched, axes = self._split(samples)

        def one(wanted: Mapping[str, Tensor], parts: list[Tensor]) -> tuple[Tensor, Tensor]:
            found = self._call({**self._values, **wanted}, self._join(parts, axes))
            if found.numel() != 1:
                raise RuntimeError(f"it returns {tuple(found.shape)} for a batch of one sample")
            return found.sum(), found.detach().sum()

        wanted = {name: self._values[name] for name in names}
        with torch.no_grad(), self.moment.replayed(), self.context(), quiet_vmap():
            gradient = torch.func.grad(one, has_aux=True)
            found, alone = torch.func.vmap(gradient, in_dims=(None, list(axes)), randomness="error")(wanted, batched)
        if self._whole is None:
            with torch.no_grad():
                self._whole = self.losses()
        weight = self._whole[samples] / alone
        if not bool(torch.isfinite(weight).all()):
            raise WeightError("the loss of a sample is zero or not finite, so that its weight in the batch is unknown")
        return {name: g * weight.to(g.dtype).view(-1, *[1] * (g.dim() - 1)) for name, g in found.items()}

    def by_row(self, names: Sequence[str], samples: slice) -> dict[str, Tensor]:
        """Differentiate the losses of the whole batch one after the other: slow, and right for every model.

        Returns:
            ``g[samples]`` by name.
        """
        with torch.enable_grad():  # a share that is computed when it is read may be read in a step's hook
            wanted, losses = self.graph(names)
            chosen = losses[samples].unbind()
        rows = []
        for loss in chosen:
            found = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, wanted.values(), strict=True)])
        return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}

    def graph(self, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the parameters and the losses of the whole batch as a function of them.

        Raises:
            ValueError: the losses need no gradient.
        """
        wanted = {name: self._values[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            losses = self.losses(wanted)
        if not losses.requires_grad:
            raise ValueError(
                "`GradTrace(per_sample_loss=...)` returned losses that no tracked parameter led to. Compute them from "
                "the module that it is given, with gradients enabled."
            )
        return wanted, losses

    def _call(self, values: Mapping[str, Tensor], batch: Any) -> Tensor:
        swapped = {f"module.{name}": value for name, value in values.items()}
        buffers = {f"module.{name}": value.clone() for name, value in self._buffers.items()}
        with _SeesPrecision(self.precision, self.moment.parameters):
            return torch.func.functional_call(self._loss, (swapped, buffers), (batch,))

    def _split(self, samples: slice) -> tuple[list[Tensor], list[int]]:
        """Return the tensors of the batch that hold samples, these samples of them, and their axes."""
        parts: list[Tensor] = []
        axes: list[int] = []

        def take(tensor: Tensor) -> Tensor:
            axis = sample_axis_of(tensor, self.moment.n_samples, self.moment.batch_axis)
            if axis is not None:
                parts.append(tensor.movedim(axis, 0)[samples].movedim(0, axis))
                axes.append(axis)
            return tensor

        map_tensors(take, self.moment.batch)
        return parts, axes

    def _join(self, parts: list[Tensor], axes: list[int]) -> Any:
        """Return the batch with one sample in the place of all."""
        of_one = iter([part.unsqueeze(axis) for part, axis in zip(parts, axes, strict=True)])

        def put(tensor: Tensor) -> Tensor:
            holds = sample_axis_of(tensor, self.moment.n_samples, self.moment.batch_axis) is not None
            return next(of_one) if holds else tensor

        return map_tensors(put, self.moment.batch)

"""The functional engine: per-sample gradients of a loss that the user gives, beside the real training step.

For models whose forward pass can't be taped, and for comparison. The training step itself is left alone. After its
backward pass, and before the weights change, the losses of the samples are computed again with the same weights,
buffers and random draws, and differentiated: batches of one sample all at once (`torch.func.vmap`), or, where the model
can't be run that way, the losses of the whole batch one after the other. The sums are compared with ``.grad`` like
those of the tape (docs/concepts.md, 2).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradtrace.capture.check import tolerance
from lightning_gradtrace.capture.engines.sample_losses import Moment, PerSampleLoss, Replay, WeightError
from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.passes import Passes
from lightning_gradtrace.capture.placing.placement import Probe
from lightning_gradtrace.capture.placing.settling import Doubt
from lightning_gradtrace.capture.precision import double
from lightning_gradtrace.capture.shares import DenseShare, Share, accumulation_dtype

# Written out at a time are at most this many numbers (or one sample of one parameter if that is larger).
WORKSPACE = 1 << 26
# Batches of one sample are compared with the whole batch at the first micro-batch, and then once in so many.
CHECK_EVERY = 50


@dataclass
class ReplayedShare(Share):
    """``g`` of one parameter, computed when it is asked for: where all shares together are too large to be kept.

    Attributes:
        name: name of the parameter.
        source: computes the shares of a group of parameters, and remembers the last it was asked for.
        shape: shape of the parameter.
    """

    name: str
    source: _Source
    shape: torch.Size

    @property
    @override
    def n_samples(self) -> int:
        return self.source.n_samples

    @property
    @override
    def is_held(self) -> bool:
        return False  # the model is run again, with parameters and random numbers in the place of its own

    @override
    def dense(self, samples: slice = slice(None)) -> Tensor:
        start, stop, _ = samples.indices(self.n_samples)
        values = self.source.values(self.name, start, stop)
        return values.to(accumulation_dtype(values.dtype))

    @override
    def total(self) -> Tensor:
        step = self.source.samples_at_once(self.name)
        starts = range(0, self.n_samples, step)
        return torch.stack([self.dense(slice(start, start + step)).sum(0) for start in starts]).sum(0)


@dataclass
class _Source:
    """Shares of one micro-batch, in groups of parameters and samples that fit into the workspace."""

    gradients: Callable[[Sequence[str], slice], dict[str, Tensor]]
    groups: dict[str, list[str]]
    numel: Mapping[str, int]
    n_samples: int
    workspace: int
    _held: tuple[list[str], int, int, dict[str, Tensor]] | None = None

    def samples_at_once(self, name: str) -> int:
        """Number of samples of the parameter's group that fit into the workspace."""
        return max(1, self.workspace // sum(self.numel[n] for n in self.groups[name]))

    def values(self, name: str, start: int, stop: int) -> Tensor:
        """Return ``g[start:stop]`` of a parameter; what is computed with it is kept until something else is needed."""
        group, held = self.groups[name], self._held
        if held is None or held[0] is not group or start < held[1] or stop > held[2]:
            self._held = None  # make room first
            end = min(max(stop, start + self.samples_at_once(name)), self.n_samples)
            held = self._held = (group, start, end, self.gradients(group, slice(start, end)))
        return held[3][name][start - held[1] : stop - held[1]]


@dataclass
class FunctionalEngine:
    """Turns a user's per-sample loss into shares.

    Attributes:
        module: the model.
        per_sample_loss: ``(module, batch) -> losses``, shape (sample,); they add up to the loss of the training step.
            Called with the whole batch and, if that gives the same gradients, with batches of one sample.
        context: makes the context in which forward passes run (autocast).
        low_precision: whether forward passes run in half precision.
        workspace: numbers that may be written out at a time.
    """

    module: nn.Module
    per_sample_loss: PerSampleLoss
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    low_precision: bool = False
    workspace: int = WORKSPACE
    _by_sample: bool = field(default=True, init=False)
    _count: int = field(default=0, init=False)

    def tape(self, parameters: Mapping[str, Tensor], batch: Any, n_samples: int, batch_axis: int) -> Moment:
        """Return what is entered around the forward pass of a micro-batch."""
        return Moment(batch, n_samples, batch_axis, dict(parameters))

    def passes(self, tape: Moment, loss: Tensor, n_samples: int) -> Passes | None:
        """Return None: the graph of the training step is left alone."""
        return None

    def collect(self, tape: Moment, n_samples: int, probe: Probe, factor: float = 1.0) -> MicroBatch:
        """Return the shares of a micro-batch whose backward pass is done.

        Args:
            tape: from `tape`.
            n_samples: number of samples.
            probe: not needed, the user's function knows its batch.
            factor: see `Replay`.

        Returns:
            The shares by parameter.

        Raises:
            ValueError: the function does not return one loss per sample.
        """
        shapes = {name: p.shape for name, p in tape.parameters.items() if p.requires_grad}
        names, numel = list(shapes), {name: shape.numel() for name, shape in shapes.items()}
        fits = n_samples * sum(numel.values()) <= self.workspace
        replay = Replay(self.module, self.per_sample_loss, tape, factor, self.context, frozen=not fits)
        self._choose(replay, names, numel)
        gradients = functools.partial(_gradients, replay, self._by_sample)
        if fits:
            found: dict[str, Share] = {n: DenseShare(g) for n, g in gradients(names, slice(None)).items()}
            return MicroBatch(n_samples, found, precision=replay.precision)
        groups = _groups(numel, max(1, self.workspace // n_samples))
        source = _Source(gradients, groups, numel, n_samples, self.workspace)
        later: dict[str, Share] = {name: ReplayedShare(name, source, shape) for name, shape in shapes.items()}
        return MicroBatch(n_samples, later, precision=replay.precision)

    def _choose(self, replay: Replay, names: Sequence[str], numel: Mapping[str, int]) -> None:
        """Give up batches of one sample, with a warning, if they don't lead to the gradients of the whole batch."""
        due, self._count = self._count % CHECK_EVERY == 0, self._count + 1
        if not (due and self._by_sample and numel):
            return
        step = max(1, self.workspace // sum(numel.values()))
        wanted, losses = replay.graph(names)
        try:
            reason = self._disagreement(replay, wanted, losses, step)
        except WeightError:  # in this batch, some sample has no loss: the next batch decides
            self._count -= 1
            return
        except Exception as error:  # whatever a user's function makes of a batch of one sample under vmap
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if reason is not None:
            self._by_sample = False
            warnings.warn(
                "GradTrace: the per-sample loss can't be differentiated for all samples at once, so there is one "
                f"backward pass per sample of the whole batch, which is slow but right. Reason: {reason}",
                stacklevel=2,
            )

    def _disagreement(self, replay: Replay, wanted: dict[str, Tensor], losses: Tensor, step: int) -> str | None:
        """Compare a random combination of the shares with the gradient of the same combination of losses.

        One backward pass tells: it differs unless every single share is right (with probability one).
        """
        n, names = len(losses), list(wanted)
        generator = torch.Generator().manual_seed(self._count)
        signs = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu").to(losses.device, losses.dtype)
        found = torch.autograd.grad((losses * signs).sum(), list(wanted.values()), allow_unused=True)
        combined = {name: torch.zeros_like(p) for name, p in wanted.items()}
        sizes = dict.fromkeys(names, 0.0)
        for start in range(0, n, step):
            part = slice(start, start + step)
            for name, g in replay.by_sample(names, part).items():
                combined[name] += torch.einsum("n...,n->...", g, signs[part].to(g.dtype))
                sizes[name] += float(torch.linalg.vector_norm(g))
        for name, gradient in zip(names, found, strict=True):
            expected = torch.zeros_like(combined[name]) if gradient is None else gradient
            error = float(torch.linalg.vector_norm(combined[name] - expected))
            passed = torch.bfloat16 if self.low_precision else replay.precision.get(name)
            if error > tolerance(expected.dtype, passed) * sizes[name]:
                return (
                    f"the gradient of `{name}` for a sample alone is not the one that it has in the batch (relative "
                    f"error {error / sizes[name]:.1e}); something couples the samples, such as batch norm"
                )
        return None

    def state(self) -> list[str]:
        """Return nothing: no parameter is used in a way that was not met before."""
        return []

    def restore(self, state: Sequence[str]) -> None:
        """Do nothing."""

    def asks(self, tape: Any, probe: Probe) -> Doubt:
        """Say nothing: nobody looks for the samples."""
        return Doubt()

    def advice(self, micro_batches: Sequence[MicroBatch], gradients: Mapping[str, Tensor]) -> str:
        """Say what to do if the shares don't add up to the gradient.

        Args:
            micro_batches: all of the step.
            gradients: by name.

        Returns:
            A sentence or two.
        """
        ratio = _common_ratio(micro_batches, gradients)
        n = micro_batches[0].n_samples
        if ratio is not None:
            found = f"Your losses add up to {ratio:.6g} times the gradient"
            if abs(ratio / n - 1) < 1e-2:
                return f"{found}: divide by the batch size. `training_step` takes the mean over the samples."
            if abs(ratio * n - 1) < 1e-2:
                return f"{found}: multiply by the batch size. `training_step` takes the sum over the samples."
            return f"{found}: divide by that number. `training_step` normalises its loss in another way."
        drawing = [name for name, m in self.module.named_modules() if _draws(m)]
        if drawing:
            return (
                f"The model draws random numbers (`{drawing[0]}`). They are the same only if `per_sample_loss` makes "
                "the calls of `training_step` in the same order, from its first draw on. Do that, switch dropout off, "
                'or use `engine="tape"`, which sees the real draws.'
            )
        return (
            "`per_sample_loss` is not the loss of `training_step`, split into samples: its sum must have the same "
            "gradient. Compare the two on one batch, term by term."
        )


def _gradients(replay: Replay, by_sample: bool, names: Sequence[str], samples: slice) -> dict[str, Tensor]:
    if by_sample:
        try:
            return replay.by_sample(names, samples)
        except WeightError:  # in this batch, some sample has no loss
            pass
    return replay.by_row(names, samples)


def _groups(numel: Mapping[str, int], most: int) -> dict[str, list[str]]:
    """Put neighbouring parameters into groups of at most ``most`` weights (or of one larger parameter)."""
    groups: dict[str, list[str]] = {}
    current: list[str] = []
    for name, size in numel.items():
        if current and sum(numel[n] for n in current) + size > most:
            current = []
        current.append(name)
        groups[name] = current
    return groups


def _common_ratio(micro_batches: Sequence[MicroBatch], gradients: Mapping[str, Tensor]) -> float | None:
    """Return the number by which all sums of shares exceed the gradients, None if there is no such number."""
    ratios = []
    for name, gradient in gradients.items():
        shares = [m.shares[name] for m in micro_batches if name in m.shares]
        gradient = double(gradient)
        square = float((gradient**2).sum())
        if not shares or not square:
            continue
        total = torch.stack([share.total() for share in shares]).sum(0)
        total = double(total)
        ratio = float((total * gradient).sum()) / square
        if not float(torch.linalg.vector_norm(total - ratio * gradient)) <= 1e-2 * abs(ratio) * square**0.5:
            return None
        ratios.append(ratio)
    if not ratios or min(ratios) <= 0 or max(ratios) > 1.01 * min(ratios):
        return None
    return sorted(ratios)[len(ratios) // 2]


def _draws(module: nn.Module) -> bool:
    """Say whether a module drops at random in its present mode."""
    p = getattr(module, "p", getattr(module, "dropout", 0.0))
    return module.training and isinstance(p, float) and p > 0

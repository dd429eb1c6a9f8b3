"""Shares of single loss tokens: which sample's gradient comes from predicting which token (docs/concepts.md, 2).

The loss of a language model is a weighted sum of token losses. The share of one of them is what a backward pass
leaves that starts at its row of the logits alone. Samples don't touch each other's gradients, so one such pass serves
one chosen token of *every* sample. The passes go over the graph of the real forward pass, before the real backward
pass and with the same hooks of the tape: same dropout masks, nothing is run forward again. They leave no gradient
behind, only cotangents. A pass costs about a backward pass, and there are as many as the largest number of tokens
chosen in one sample (at most `TokenChoice.slots`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.capture.batch import token_ids
from lightning_gradtrace.capture.batch_axis import SampleAxis, candidates
from lightning_gradtrace.capture.check import tolerance
from lightning_gradtrace.capture.engine import MicroBatch, TapeEngine, TokenPass
from lightning_gradtrace.capture.placement import Probe, UnattributableError
from lightning_gradtrace.capture.shares import Share
from lightning_gradtrace.capture.tape import Tape

_LOSSES = (F.cross_entropy, F.nll_loss)


@dataclass(frozen=True)
class TokenChoice:
    """Which loss tokens are wanted.

    Attributes:
        tokens: token ids, None for all.
        by: what the ids are compared with: the "target" that is predicted, or the "input" at the same position.
        slots: largest number of tokens per sample; of more, the first ones by position are taken.
    """

    tokens: tuple[int, ...] | None
    by: Literal["target", "input"]
    slots: int

    def mask(self, targets: Tensor, inputs: Tensor | None) -> Tensor:
        """Say which positions are chosen.

        Args:
            targets: shape (sample, position).
            inputs: token ids of the batch, shape (sample, at least as many positions), None if it has none.

        Returns:
            Truth values, shape (sample, position).

        Raises:
            ValueError: the choice is by input, and the batch has no token for each loss token.
        """
        if self.by == "input" and (inputs is None or inputs.shape[1] < targets.shape[1]):
            found = "no token ids" if inputs is None else f"{inputs.shape[1]} token ids per sample"
            raise ValueError(
                f'`TokenGrads(by="input")`: the batch has {found}, expected one for each of the {targets.shape[1]} '
                'loss tokens of a sample, as `input_ids` or as whole numbers with two axes. Use `by="target"`.'
            )
        if self.tokens is None:
            return torch.ones_like(targets, dtype=torch.bool)
        compared = targets if self.by == "target" or inputs is None else inputs[:, : targets.shape[1]].to(targets)
        return torch.isin(compared, torch.tensor(self.tokens, dtype=compared.dtype, device=compared.device))


@dataclass
class _LossCall:
    """One call of a loss over classes.

    Attributes:
        logits: its input, part of the graph.
        targets: class numbers.
        ignored: the target that has no loss.
    """

    logits: Tensor
    targets: Tensor
    ignored: int

    @property
    def class_axis(self) -> int:
        """Axis of the classes in the logits."""
        return min(1, self.logits.dim() - 1)

    @property
    def row_shape(self) -> list[int]:
        """Shape of the logits without their classes: one row for each loss token."""
        return [size for axis, size in enumerate(self.logits.shape) if axis != self.class_axis]

    def rows(self, place: SampleAxis, n_samples: int) -> Tensor:
        """Number the loss tokens: flat rows of the logits, shape (sample, position)."""
        shape = self.row_shape
        numbers = torch.arange(int(np.prod(shape)), device=self.logits.device).view(shape)
        return place.samples_first(numbers, n_samples).reshape(n_samples, -1)

    def only(self, cotangent: Tensor, rows: Tensor) -> Tensor:
        """Keep some rows of a cotangent of the logits, zero elsewhere."""
        source = cotangent.movedim(self.class_axis, -1)
        flat, kept = source.reshape(-1, source.shape[-1]), torch.zeros_like(cotangent)
        target = kept.movedim(self.class_axis, -1)
        index = torch.unravel_index(rows, tuple(self.row_shape))
        target[index] = flat[rows]
        return kept


class LossTape(Tape):
    """A tape that also keeps the calls of losses over classes.

    Args:
        parameters: the tracked parameters by name.
        batch: the batch.
        n_samples: number of samples in it.
        batch_axis: axis of the samples in the batch's tensors.
    """

    def __init__(self, parameters: Mapping[str, Tensor], batch: Any, n_samples: int, batch_axis: int) -> None:
        super().__init__(parameters, batch, n_samples)
        self.wanted = [p for p in parameters.values() if p.requires_grad]
        self.tokens = token_ids(batch, n_samples, batch_axis) if batch is not None else None
        self.losses: list[_LossCall] = []
        self.passes: list[TokenPass] = []
        self.n_chosen = np.zeros(n_samples, np.int32)

    @override
    def clear(self) -> None:
        super().clear()
        self.losses.clear()
        self.passes = []

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types_: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, note it if it is a loss, and record it if it uses a tracked tensor."""
        if func in _LOSSES:
            given = {**dict(zip(("input", "target"), args, strict=False)), **(kwargs or {})}
            logits, targets = given["input"], given["target"]
            if logits.requires_grad:
                ignored = int(given.get("ignore_index", args[4] if len(args) > 4 else -100))
                self.losses.append(_LossCall(logits, targets, ignored))
        return super().__torch_function__(func, types_, args, kwargs)


@dataclass
class TokenEngine(TapeEngine):
    """The tape engine, and beside the share of every sample those of some of its loss tokens.

    Attributes:
        choice: which loss tokens.
    """

    choice: TokenChoice = field(default_factory=lambda: TokenChoice(None, "target", 1))
    _place: SampleAxis | None = None

    @override
    def tape(
        self, parameters: Mapping[str, Tensor], batch: Any = None, n_samples: int | None = None, batch_axis: int = 0
    ) -> LossTape:
        return LossTape(parameters, batch, n_samples or 0, batch_axis)

    @override
    def before_backward(self, tape: Any, loss: Tensor, n_samples: int, probe: Probe) -> None:
        """Take the shares of the chosen loss tokens, before the real backward pass takes the graph down.

        Raises:
            UnattributableError: the loss is not made of one cross-entropy over tokens, or samples are coupled.
        """
        assert isinstance(tape, LossTape)
        call, cotangent = _find(tape.losses, loss)
        tape.losses.clear()
        tape.passes = []
        play = _Passes(self, tape, call, cotangent, n_samples, probe)
        fits = self._place is not None and self._place.fits(call.row_shape, n_samples)
        if not fits:
            found = _place_of_samples(call, n_samples, play)
            self._place = found if n_samples > 1 else None
        place = self._place if fits or n_samples > 1 else found
        assert place is not None
        rows = call.rows(place, n_samples)
        targets = call.targets.flatten()[rows]
        chosen = self.choice.mask(targets, tape.tokens) & (targets != call.ignored)
        n_chosen = chosen.sum(1)
        rank = chosen.cumsum(1) - 1
        for slot in range(min(self.choice.slots, int(n_chosen.max()))):
            here = chosen & (rank == slot)
            present = here.any(1)
            at = here.int().argmax(1)
            picked = targets.gather(1, at[:, None])[:, 0]
            tape.passes.append(
                TokenPass(
                    torch.where(present, at, -1).cpu().numpy().astype(np.int32),
                    torch.where(present, picked, -1).cpu().numpy().astype(np.int32),
                    play(call.only(cotangent, rows[here])),
                )
            )
        tape.n_chosen = n_chosen.cpu().numpy().astype(np.int32)

    @override
    def collect(self, tape: Any, n_samples: int, probe: Probe, factor: float = 1.0) -> MicroBatch:
        micro_batch = super().collect(tape, n_samples, probe, factor)
        micro_batch.tokens, micro_batch.n_chosen = tape.passes, tape.n_chosen
        return micro_batch


@dataclass
class _Passes:
    """Backward passes that begin with a cotangent of the logits.

    Attributes:
        cotangent: the one of the whole loss.
    """

    engine: TapeEngine
    tape: LossTape
    call: _LossCall
    cotangent: Tensor
    n_samples: int
    probe: Probe

    def __call__(self, start: Tensor) -> dict[str, Share]:
        """Return the shares that a cotangent of the logits leads to, by parameter."""
        self.tape.forget_backward()
        torch.autograd.grad(self.call.logits, self.tape.wanted, start, retain_graph=True, allow_unused=True)
        return TapeEngine.collect(self.engine, self.tape, self.n_samples, self.probe).shares


def _find(calls: Sequence[_LossCall], loss: Tensor) -> tuple[_LossCall, Tensor]:
    """Return the loss call that the loss depends on, and the gradient of the loss by its logits."""
    logits = [call.logits for call in calls]
    found = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True) if logits else ()
    reached = [(call, d) for call, d in zip(calls, found, strict=True) if d is not None]
    if len(reached) != 1:
        raise UnattributableError(
            f"`TokenGrads`: the loss depends on {len(reached)} calls of `cross_entropy` or `nll_loss`, expected one, "
            "whose rows are the loss tokens. Compute the loss with one call of `torch.nn.functional.cross_entropy` "
            "over all positions, or leave `TokenGrads` out of the records."
        )
    call, cotangent = reached[0]
    if call.targets.is_floating_point() or list(call.targets.shape) != call.row_shape:
        raise UnattributableError(
            f"`TokenGrads`: the targets of the loss have shape {tuple(call.targets.shape)} and dtype "
            f"{call.targets.dtype}, expected token ids of shape {tuple(call.row_shape)}. Probabilities are no tokens."
        )
    return call, cotangent


def _place_of_samples(call: _LossCall, n_samples: int, play: _Passes) -> SampleAxis:
    """Find out which rows belong to which sample.

    Rows of sample i times a number of its own must lead to the share of sample i times that number. The numbers are
    powers of two, by which nothing is rounded: a wrong arrangement shows, and so does what flows between samples.

    Raises:
        UnattributableError: no arrangement does that.
    """
    options = candidates(call.row_shape, n_samples)
    order = torch.randperm(n_samples, generator=torch.Generator().manual_seed(0))
    weights = torch.pow(2.0, (order % 8).double()).to(play.cotangent.device)
    whole = play(play.cotangent)
    for place in options:
        rows = call.rows(place, n_samples)
        by_row = torch.empty(rows.numel(), dtype=weights.dtype, device=weights.device)
        by_row[rows] = weights[:, None].expand(rows.shape)
        scale = by_row.view(call.row_shape).unsqueeze(call.class_axis).to(play.cotangent.dtype)
        if _is_multiple(play(play.cotangent * scale), whole, weights, tolerance(call.logits.dtype)):
            return place
    raise UnattributableError(
        f"`TokenGrads`: the loss tokens (logits of shape {tuple(call.logits.shape)}) can't be told apart by sample: "
        f"the loss of one sample's tokens has gradients that flow through other samples, for each of {len(options)} "
        "ways to arrange them. Layers that couple samples (batch norm, pooling over the batch) don't go with "
        "`TokenGrads`; leave it out of the records."
    )


def _is_multiple(found: Mapping[str, Share], whole: Mapping[str, Share], weights: Tensor, largest_error: float) -> bool:
    """Say whether the share of every sample is its share of the whole loss times its weight, rounding apart.

    All parameters of a sample count together: the gradient of some is nothing but rounding (biases of keys).
    """
    for i, weight in enumerate(weights.tolist()):
        one, error, size = slice(i, i + 1), 0.0, 0.0
        for name, share in whole.items():
            expected = share.dense(one) * weight
            error += float(torch.linalg.vector_norm(found[name].dense(one) - expected)) ** 2
            size += float(torch.linalg.vector_norm(expected)) ** 2
        if error > largest_error**2 * size:
            return False
    return True

"""Shares of single loss tokens: which sample's gradient comes from predicting which token (docs/concepts.md, 2).

The loss of a language model is a weighted sum of token losses. The share of one of them is what a backward pass
leaves that starts at its row of the logits alone. Samples don't touch each other's gradients, so one such pass serves
one chosen token of *every* sample. The passes go over the graph of the real forward pass, before the real backward
pass and with the same hooks of the tape: same dropout masks, nothing is run forward again. They end at the uses of
parameters and leave cotangents behind, no gradient. A pass costs about a backward pass without the gradients of
weights, and there are as many as the largest number of tokens chosen in one sample (at most `TokenChoice.slots`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from typing_extensions import override

from lightning_gradtrace.capture.engines.loss_calls import (
    LOSSES,
    LossCall,
    find_call,
    place_of_samples,
    refuse_reentrant,
)
from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.capture.forward.tape import Tape
from lightning_gradtrace.capture.intake.batch import token_ids
from lightning_gradtrace.capture.intake.permuting import own_part
from lightning_gradtrace.capture.micro_batch import MicroBatch, TokenPass
from lightning_gradtrace.capture.passes import Wanted
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis
from lightning_gradtrace.capture.placing.placement import Probe
from lightning_gradtrace.capture.placing.settling import Doubt
from lightning_gradtrace.capture.probing.draws import EVERYWHERE, DrawSite
from lightning_gradtrace.capture.shares import Share


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


class LossTape(Tape):
    """A tape that also keeps the calls of losses over classes.

    Args:
        parameters: the tracked parameters by name.
        batch: the batch.
        n_samples: number of samples in it.
        batch_axis: axis of the samples in the batch's tensors.
        shared: see `Tape`.
        aside: see `Tape`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        batch: Any,
        n_samples: int,
        batch_axis: int,
        shared: Container[DrawSite] = (),
        aside: LossTape | None = None,
    ) -> None:
        own = None if batch is None else own_part(batch, n_samples, batch_axis)
        super().__init__(parameters, own, n_samples, batch_axis, shared=shared, aside=aside)
        self._other_edges = [] if aside is None else aside.edges
        self.edges: list[GradientEdge] = []
        self._wanted = {name for name, parameter in parameters.items() if parameter.requires_grad}
        self.tokens = token_ids(batch, n_samples, batch_axis) if batch is not None else None
        self.losses: list[LossCall] = []
        self.passes: list[TokenPass] = []
        self.n_chosen = np.zeros(n_samples, np.int32)

    @override
    def clear(self) -> None:
        super().clear()
        self.losses.clear()
        self.edges.clear()
        self.passes = []

    @property
    def goals(self) -> list[GradientEdge]:
        """Where the passes are to come."""
        return self.edges + self._other_edges

    @property
    def has_unused(self) -> bool:
        """Whether a tracked parameter that needs a gradient was not used so far."""
        return not self._wanted <= {name for use in self.uses for name in use.site.parameters}

    @override
    def watch(self, tensor: Tensor, hook: Callable[[Tensor | None], None] | None = None) -> None:
        """Let the passes come to a tensor.

        Not to the gradients of the parameters: nobody needs them, and those of a whole model may not find room.
        """
        super().watch(tensor, hook)
        # Layers that run again during a backward pass are no part of the graph that passes go over.
        if tensor.requires_grad and torch._C._current_graph_task_id() == -1:
            self.edges.append(get_gradient_edge(tensor))

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types_: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, note it if it is a loss, and record it if it uses a tracked tensor."""
        if func in LOSSES:
            given = {**dict(zip(("input", "target"), args, strict=False)), **(kwargs or {})}
            logits, targets = given["input"], given["target"]
            if logits.requires_grad:
                ignored = int(given.get("ignore_index", args[4] if len(args) > 4 else -100))
                self.losses.append(LossCall(logits, targets, ignored))
        return super().__torch_function__(func, types_, args, kwargs)


@dataclass
class TokenEngine(TapeEngine):
    """The tape engine, and beside the share of every sample those of some of its loss tokens.

    Attributes:
        choice: which loss tokens.
        place: where the samples were in the logits of the last micro-batch; None if that is not known.
    """

    choice: TokenChoice = field(default_factory=lambda: TokenChoice(None, "target", 1))
    place: SampleAxis | None = None

    @override
    def tape(
        self, parameters: Mapping[str, Tensor], batch: Any = None, n_samples: int | None = None, batch_axis: int = 0
    ) -> LossTape:
        of = (parameters, batch, n_samples or 0, batch_axis)
        aside = None if self.sharing.is_known(n_samples) else LossTape(*of, shared=EVERYWHERE)
        return LossTape(*of, shared=self.sharing.shared, aside=aside)

    @override
    def passes(self, tape: Any, loss: Tensor, n_samples: int) -> TokenPasses:
        """Return the passes that give the shares of the chosen loss tokens.

        Raises:
            UnattributableError: the loss is not made of one cross-entropy over tokens.
        """
        assert isinstance(tape, LossTape)
        if not tape.losses:
            find_call([], loss)
        return TokenPasses(self, tape, loss, n_samples)

    @override
    def collect(self, tape: Any, n_samples: int, probe: Probe, factor: float = 1.0) -> MicroBatch:
        micro_batch = super().collect(tape, n_samples, probe, factor)
        micro_batch.tokens, micro_batch.n_chosen = tape.passes, tape.n_chosen
        return micro_batch


@dataclass
class TokenPasses:
    """The backward passes of the loss tokens of one micro-batch, see `capture.passes.Passes`.

    Attributes:
        engine: what they are made for.
        tape: holds the uses, and receives the shares.
        loss: the loss that is about to be back-propagated.
        n_samples: number of samples.
    """

    engine: TokenEngine
    tape: LossTape
    loss: Tensor
    n_samples: int
    _call: LossCall | None = field(default=None, init=False)

    def wanted(self) -> Wanted:
        """Name a pass for every slot of the tokens, after those that tell whose the rows of the logits are.

        Raises:
            UnattributableError: the loss is not made of one cross-entropy over tokens, or samples are coupled.
        """
        tape, n_samples = self.tape, self.n_samples
        self._call, cotangent = call, _ = find_call(tape.losses, self.loss)
        refuse_reentrant(call.logits, {edge.node for edge in tape.edges}, tape.has_unused)
        tape.losses.clear()
        tape.passes = []
        place = self.engine.place
        if place is None or not place.fits(call.row_shape, n_samples):
            place = yield from place_of_samples(call, cotangent, n_samples)
            self.engine.place = place if n_samples > 1 else None
        rows = call.rows(place, n_samples)
        targets = call.targets.flatten()[rows]
        chosen = self.engine.choice.mask(targets, tape.tokens) & (targets != call.ignored)
        n_chosen = chosen.sum(1)
        rank = chosen.cumsum(1) - 1
        for slot in range(min(self.engine.choice.slots, int(n_chosen.max()))):
            here = chosen & (rank == slot)
            present = here.any(1)
            at = here.int().argmax(1)
            picked = targets.gather(1, at[:, None])[:, 0]
            position = torch.where(present, at, -1).cpu().numpy().astype(np.int32)
            token = torch.where(present, picked, -1).cpu().numpy().astype(np.int32)
            shares = yield call.only(cotangent, rows[here])
            tape.passes.append(TokenPass(position, token, shares))
        tape.n_chosen = n_chosen.cpu().numpy().astype(np.int32)

    def make(self, start: Tensor | None) -> None:
        """Make a pass: the uses of the tape receive their cotangents, and no parameter its gradient."""
        assert self._call is not None
        logits = self._call.logits
        self.tape.forget_backward()
        if self.tape.goals:
            cotangent = torch.zeros_like(logits) if start is None else start
            torch.autograd.grad(logits, self.tape.goals, cotangent, retain_graph=True, allow_unused=True)
        if start is None:
            self.tape.forget_backward()

    def asks(self, probe: Probe) -> Doubt:
        """Say what `collect` would run the probe for."""
        return self.engine.asks(self.tape, probe)

    def collect(self, probe: Probe) -> dict[str, Share]:
        """Return the shares, by parameter, that the last pass led to."""
        return TapeEngine.collect(self.engine, self.tape, self.n_samples, probe).shares

"""Runs of a model with stacks of weights switched off, in bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_gradtrace.analysis._access import IntArray
from lightning_gradtrace.analysis._switching import switching
from lightning_gradtrace.analysis.interventions import named_parameter
from lightning_gradtrace.analysis.predictions import check_logits, evaluating
from lightning_gradtrace.analysis.switches import Switch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_gradtrace.analysis.predictions import Forward

FloatArray32 = npt.NDArray[np.float32]


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Run inside with the model in eval mode and without gradients."""
    import torch

    with evaluating(model), torch.no_grad(), warnings.catch_warnings():
        # Functions without a batching rule are run one by one, slowly but rightly.
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        yield


class Runner:
    """Runs a model with stacks of switches."""

    def __init__(self, model: nn.Module, forward: Forward | None, max_bytes: int) -> None:
        self.model, self._forward, self._max_bytes = model, forward, max_bytes
        self._bytes = 1
        self._vmap = True

    def whole(self, batch: Tensor) -> tuple[IntArray, FloatArray32]:
        """Return predictions and losses (sample, position) of the model as it is."""
        # Under the mode like the ablations, so that both take the same path through the model.
        with switching({}):
            logits = self._logits(batch)
        # Logits of an ablation, their copy and its exponentials.
        self._bytes = 3 * logits.numel() * logits.element_size()
        found, losses = _outcome(logits, batch)
        return found.cpu().numpy(), losses.cpu().numpy()

    def groups(self, switches: Sequence[Switch]) -> Iterator[tuple[list[int], list[Switch]]]:
        """Gather switches of the same parameters, as many as fit into memory."""
        kinds: dict[tuple[str, ...], list[int]] = {}
        for number, switch in enumerate(switches):
            kinds.setdefault(switch.params, []).append(number)
        for params, numbers in kinds.items():
            weights = sum(5 * named_parameter(self.model, name).numel() for name in params)
            most = max(1, self._max_bytes // (self._bytes + weights)) if self._vmap else 1
            for start in range(0, len(numbers), most):
                part = numbers[start : start + most]
                yield part, [switches[i] for i in part]

    def contributions(self, batch: Tensor, switches: Sequence[Switch]) -> list[Tensor]:
        """Return what each switch's weights contribute to each use: for each use (switch, *output)."""

        def run(*masks: Tensor) -> tuple[Tensor, ...]:
            with switching(self._without(switches[0].params, masks), keep=True) as mode:
                self._logits(batch)
            return tuple(mode.contributions)

        return list(self._over(run, self._masks(switches), len(switches)))

    def without(
        self,
        batch: Tensor,
        switches: Sequence[Switch],
        banks: list[list[Tensor]] | None,
        draw: np.random.Generator | None,
    ) -> tuple[IntArray, FloatArray32]:
        """Return predictions and losses (switch, sample, position)."""
        import torch

        masks = self._masks(switches)
        stacks = [] if banks is None else [torch.stack(use) for use in zip(*banks, strict=True)]
        chosen = None
        if draw is not None and stacks:
            chosen = torch.as_tensor(draw.integers(0, stacks[0].shape[1], batch.numel()), device=batch.device)

        def run(*parts: Tensor) -> tuple[Tensor, ...]:
            values = parts[len(masks) :]

            def instead(use: int, output: Tensor) -> Tensor:
                features = values[use].shape[1:]
                if chosen is None:
                    return values[use][0]
                return values[use][chosen].reshape(*output.shape[: output.ndim - len(features)], *features)

            with switching(self._without(switches[0].params, parts[: len(masks)]), instead if values else None):
                logits = self._logits(batch)
            return _outcome(logits, batch)

        found, losses = self._over(run, [*masks, *stacks], len(switches))
        return found.cpu().numpy(), losses.cpu().numpy()

    def _logits(self, batch: Tensor) -> Tensor:
        logits = self.model(batch) if self._forward is None else self._forward(self.model, batch)
        check_logits(logits, batch)
        return logits

    def _masks(self, switches: Sequence[Switch]) -> list[Tensor]:
        import torch

        masks = []
        for name in switches[0].params:
            weight = named_parameter(self.model, name)
            stack = np.stack([switch.mask(name, tuple(weight.shape)) for switch in switches])
            masks.append(torch.as_tensor(stack, device=weight.device))
        return masks

    def _without(self, params: tuple[str, ...], masks: Sequence[Tensor]) -> dict[int, Tensor]:
        weights = [named_parameter(self.model, name) for name in params]
        return {id(w): w.detach() * mask for w, mask in zip(weights, masks, strict=True)}

    def _over(self, run: Any, stacks: list[Tensor], size: int) -> list[Tensor]:
        """Map over the first axis of the stacks: all at once, or one by one where vmap can't."""
        import torch

        if self._vmap and size > 1:
            try:
                return list(torch.vmap(run)(*stacks))
            except RuntimeError as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                # Control flow that depends on values, writing in place: the model itself is all right.
                self._vmap = False
        found = [run(*(stack[i] for stack in stacks)) for i in range(size)]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]


def _outcome(logits: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return argmax and loss of the next token (sample, position), NaN at the last position."""
    import torch

    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    nothing = torch.full_like(wide[:, :1, 0], torch.nan)
    score = wide[:, :-1].gather(-1, batch[:, 1:, None]).squeeze(-1)
    return wide.argmax(-1), torch.cat([wide[:, :-1].logsumexp(-1) - score, nothing], dim=1)

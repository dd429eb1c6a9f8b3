"""Zero, mean and resample ablation of many neurons, heads or entries in one pass over the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis._access import IntArray
from lightning_gradtrace.analysis._runner import FloatArray32, Runner, running
from lightning_gradtrace.analysis.predictions import batches, check_apart, check_tokens, device_of
from lightning_gradtrace.analysis.switches import Switch, resolve, switches_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_gradtrace.analysis.predictions import Forward

HOW = ("zero", "mean", "resample")
# Rows (positions) of the reference data that resampling draws from.
_BANK = 4096


@dataclass(frozen=True)
class Ablated:
    """Predictions and losses of a model, whole and with each of several things switched off.

    Attributes:
        keys: what names each ablation, one row each.
        tokens: (sample, position) token ids, -1 after the last one.
        pred: (sample, position) argmax of the whole model, -1 at padding.
        ablated: (ablation, sample, position) likewise of each ablation.
        loss: (sample, position) loss of the next token in nats, NaN where there is none.
        ablated_loss: (ablation, sample, position) likewise.
    """

    keys: pd.DataFrame
    tokens: IntArray
    pred: IntArray
    ablated: IntArray
    loss: FloatArray32
    ablated_loss: FloatArray32


def ablate(
    model: nn.Module,
    tokens: IntArray,
    what: pd.DataFrame | Sequence[Switch],
    how: str = "zero",
    *,
    reference: IntArray | None = None,
    batch_size: int = 32,
    forward: Forward | None = None,
    seed: int = 0,
    max_bytes: int = 1 << 30,
) -> Ablated:
    """Run a model on texts, whole and with each neuron, head or entry switched off, in one pass over the texts.

    Switching weights off takes away what they contribute to the output of the function that uses them (W x; a bias
    stays). In its place comes nothing ("zero": as if the weights were zero), its mean over all positions of the
    `reference` ("mean"), or its value at a position of the reference drawn at random for every position ("resample").
    For a column this replaces the input coordinate of W by zero, its mean, or another position's value; for a row the
    output coordinate. Weights used several times are switched off in every use. Weights that a model uses in another
    way than linearly (a norm of its weights, say) contribute what their absence changes.

    Ablations run together under `torch.vmap`, as many as fit into `max_bytes`: what lies before the first use of the
    weights runs once for all of them. A model that vmap can't run (control flow that depends on values) runs once for
    each ablation, with the same result.

    Args:
        model: the model; nothing in it is changed.
        tokens: (sample, position) token ids, -1 after the last one.
        what: rows of `neurons`, `attention_heads` (all rows of a head are switched off together) or
            `frequent_entries`; or `Switch`es.
        how: "zero", "mean" or "resample".
        reference: (sample, position) texts that means and draws are taken from; None takes `tokens`.
        batch_size: samples at once.
        forward: callable(model, tokens) -> logits (sample, position, vocabulary); None calls `model(tokens)`.
        seed: of the draws of "resample", which depend on `batch_size` too.
        max_bytes: memory for the logits and weights of ablations that run together.

    Returns:
        Predictions and losses (of the next token of the same text) at every position.

    Raises:
        ValueError: an unknown `how`, weights that the model doesn't have, or as in `flip_table`.
    """
    if batch_size != 1:
        check_apart(model, check_tokens(tokens, batch_size)[0], forward)
    run = Ablator(
        model,
        how,
        reference=tokens if reference is None else reference,
        batch_size=batch_size,
        forward=forward,
        seed=seed,
        max_bytes=max_bytes,
    )
    return run(tokens, what)


class Ablator:
    """Runs `ablate` several times with one model and one reference, whose contributions are taken once.

    Args:
        model: as in `ablate`.
        how: as in `ablate`.
        reference: (sample, position) texts that means and draws are taken from.
        batch_size: as in `ablate`.
        forward: as in `ablate`.
        seed: as in `ablate`.
        max_bytes: as in `ablate`.

    Raises:
        ValueError: an unknown `how`.
    """

    def __init__(
        self,
        model: nn.Module,
        how: str,
        *,
        reference: IntArray,
        batch_size: int = 32,
        forward: Forward | None = None,
        seed: int = 0,
        max_bytes: int = 1 << 30,
    ) -> None:
        if how not in HOW:
            raise ValueError(f"`how` is {how!r}, expected one of {', '.join(repr(h) for h in HOW)}")
        self.how = how
        self._reference, self._batch_size, self._seed = reference, batch_size, seed
        self._runner = Runner(model, forward, max_bytes)
        self._banks: dict[str, list[Tensor]] = {}

    def __call__(self, tokens: IntArray, what: pd.DataFrame | Sequence[Switch]) -> Ablated:
        """Run the model on texts, whole and with each of `what` switched off."""
        import torch

        tokens, length = check_tokens(tokens, self._batch_size)
        runner = self._runner
        switches = resolve(runner.model, switches_of(what))
        pred = np.full(tokens.shape, -1, dtype=np.int64)
        ablated = np.full((len(switches), *tokens.shape), -1, dtype=np.int64)
        loss = np.full(tokens.shape, np.nan, dtype=np.float32)
        ablated_loss = np.full(ablated.shape, np.nan, dtype=np.float32)
        with running(runner.model):
            banks = None if self.how == "zero" else self._banks_of(switches)
            for number, (rows, size) in enumerate(batches(length, self._batch_size)):
                batch = torch.as_tensor(tokens[rows, :size].astype(np.int64), device=device_of(runner.model))
                here = (rows[:, None], np.arange(size))
                pred[here], loss[here] = runner.whole(batch)
                for chosen, group in runner.groups(switches):
                    draw = np.random.default_rng([self._seed, number]) if self.how == "resample" else None
                    own = None if banks is None else [banks[i] for i in chosen]
                    found, losses = runner.without(batch, group, own, draw)
                    for place, one in enumerate(chosen):
                        ablated[one][here], ablated_loss[one][here] = found[place], losses[place]
        return Ablated(pd.DataFrame([switch.keys for switch in switches]), tokens, pred, ablated, loss, ablated_loss)

    def _banks_of(self, switches: Sequence[Switch]) -> list[list[Tensor]]:
        names = [switch.name for switch in switches]
        new = {name: switch for name, switch in zip(names, switches, strict=True) if name not in self._banks}
        found = _reference(
            self._runner, list(new.values()), self._reference, self.how, batch_size=self._batch_size, seed=self._seed
        )
        self._banks |= dict(zip(new, found, strict=True))
        return [self._banks[name] for name in names]


def _reference(
    runner: Runner, switches: Sequence[Switch], tokens: IntArray, how: str, *, batch_size: int, seed: int
) -> list[list[Tensor]]:
    """Return for each switch and each use the mean contribution (1, *features), or rows of it (row, *features)."""
    import torch

    tokens, length = check_tokens(tokens, batch_size)
    n_positions = int(length.sum())
    if not n_positions:
        raise ValueError(f"`reference` holds no token, and {how} ablation needs some; pass texts")
    rng = np.random.default_rng([seed, 0x62616E6B])
    kept = np.sort(rng.choice(n_positions, size=min(_BANK, n_positions), replace=False))
    held: list[list[list[Tensor]]] = [[] for _ in switches]
    start = 0
    for rows, size in batches(length, batch_size) if switches else ():
        batch = torch.as_tensor(tokens[rows, :size].astype(np.int64), device=device_of(runner.model))
        runner.whole(batch)  # says how much memory an ablation takes
        inside = torch.as_tensor(kept[(kept >= start) & (kept < start + batch.numel())] - start, device=batch.device)
        start += batch.numel()
        for chosen, group in runner.groups(switches):
            uses = [_rows(one, batch.numel()) for one in runner.contributions(batch, group)]
            for place, switch in enumerate(chosen):
                held[switch].append([use[place].sum(0, True) if how == "mean" else use[place][inside] for use in uses])
    joined = [[torch.cat(parts) for parts in zip(*one, strict=True)] for one in held]
    if how == "resample":
        return joined
    return [[(use.double().sum(0, True) / n_positions).to(use.dtype) for use in uses] for uses in joined]


def _rows(contribution: Tensor, positions: int) -> Tensor:
    """Flatten the axes of samples and positions: (switch, position, *features)."""
    shape = tuple(contribution.shape[1:])
    for axes in range(len(shape) - 1, 0, -1):
        if int(np.prod(shape[:axes])) == positions:
            return contribution.reshape(len(contribution), positions, *shape[axes:])
    raise ValueError(
        f"a weight is used in a function that returns shape {shape} for {positions} positions, so its contribution "
        'can\'t be told apart by position; only `how="zero"` applies to it'
    )

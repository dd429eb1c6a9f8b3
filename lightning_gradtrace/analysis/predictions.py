"""Argmax predictions of a model at every position, with and without some of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import IntArray
from lightning_gradtrace.analysis.interventions import zeroed
from lightning_gradtrace.analysis.switches import Switch, neuron_switch, resolve

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lightning_gradtrace.analysis.ablate import Ablator

    Forward = Callable[[nn.Module, Tensor], Tensor]


def predict(model: nn.Module, tokens: IntArray, *, batch_size: int = 32, forward: Forward | None = None) -> IntArray:
    """Predict the next token at every position, in eval mode and without gradients.

    Only samples of equal length share a batch, so the model never sees padding and needs no mask. Batches of exactly
    as many samples as positions are avoided, so that logits with the axes swapped are always noticed.

    Args:
        model: the model; every module's training flag is put back afterwards.
        tokens: (sample, position) token ids, -1 after the last one.
        batch_size: samples at once. The logits of a batch take batch_size x position x vocabulary x 4 bytes.
        forward: callable(model, tokens) -> logits, with tokens (sample, position) and logits
            (sample, position, vocabulary); None calls `model(tokens)`.

    Returns:
        (sample, position) argmax over the vocabulary, -1 at padding.

    Raises:
        ValueError: padding before a token, `batch_size` below 1, or logits of another shape.
    """
    import torch

    tokens, length = check_tokens(tokens, batch_size)
    device = device_of(model)
    found = np.full(tokens.shape, -1, dtype=np.int64)
    with evaluating(model), torch.no_grad():
        for rows, size in batches(length, batch_size):
            batch = torch.as_tensor(tokens[rows, :size].astype(np.int64), device=device)
            logits = model(batch) if forward is None else forward(model, batch)
            check_logits(logits, batch)
            found[rows, :size] = logits.argmax(dim=-1).cpu().numpy()
    return found


def check_tokens(tokens: IntArray, batch_size: int) -> tuple[IntArray, IntArray]:
    """Return texts as an array, and the length of each.

    Raises:
        ValueError: another number of axes, padding before a token, or `batch_size` below 1.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"`tokens` has shape {tokens.shape}, expected (sample, position)")
    _access.check_count("batch_size", batch_size)
    length = np.count_nonzero(tokens >= 0, axis=1)
    if (np.take_along_axis(tokens, np.maximum(length - 1, 0)[:, None], axis=1)[length > 0] < 0).any():
        raise ValueError("`tokens` holds padding (-1) before a token; expected padding only after the last token")
    return tokens, length


def check_logits(logits: Tensor, batch: Tensor) -> None:
    """Raise unless logits are (sample, position, vocabulary)."""
    shape = tuple(getattr(logits, "shape", ()))
    if len(shape) != 3 or shape[:2] != tuple(batch.shape):
        what = f"logits of shape {shape}" if shape else f"a {type(logits).__name__}"
        raise ValueError(
            f"the model returned {what} for tokens of shape {tuple(batch.shape)}, expected "
            f"({batch.shape[0]}, {batch.shape[1]}, vocabulary), samples first; give "
            "`forward=lambda model, tokens: ...` that returns this"
        )


def check_apart(model: nn.Module, tokens: IntArray, forward: Forward | None = None) -> None:
    """Raise if what the model predicts for a sample depends on the other samples of its batch.

    A model that wants positions first takes samples for positions, and returns logits of the right shape all the same.

    Args:
        model: the model.
        tokens: (sample, position) token ids, -1 after the last one; the longest is tried beside its own rotation.
        forward: as in `predict`.

    Raises:
        ValueError: it does.
    """
    import torch

    if not tokens.size:
        return
    row = tokens[np.argmax((tokens >= 0).sum(axis=1))]
    row = row[row >= 0].astype(np.int64)
    pair = torch.as_tensor(np.stack([np.roll(row, 1), row]), device=device_of(model))
    if torch.equal(pair[0], pair[1]):
        return
    run = forward or (lambda model, tokens: model(tokens))
    with evaluating(model), torch.no_grad():
        alone, beside = run(model, pair[1:]), run(model, pair)
    check_logits(alone, pair[1:])
    check_logits(beside, pair)
    # Far above the rounding of half precision, which may depend on the size of a batch.
    if (alone[0] - beside[1]).abs().max() > 0.1 * alone.float().std():
        raise ValueError(
            "the model predicts something else for a sample when another one is in its batch, as one does that takes "
            "tokens as (position, sample); give `forward=lambda model, tokens: ...` that takes (sample, position) and "
            "returns (sample, position, vocabulary), or `batch_size=1` if its samples are meant to meet"
        )


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters, the CPU if it has none."""
    import torch

    tensor = next(model.parameters(), None)
    return tensor.device if tensor is not None else torch.device("cpu")


def batches(length: IntArray, batch_size: int) -> Iterator[tuple[IntArray, int]]:
    """Yield rows of equal length, and that length, never as many rows as positions (see `predict`)."""
    for size in np.unique(length[length > 0]).tolist():
        rows = np.flatnonzero(length == size)
        step = batch_size - 1 if batch_size == size and size > 1 else batch_size
        for start in range(0, rows.size, step):
            batch = rows[start : start + step]
            if batch.size == size > 1:
                yield batch[:-1], size
                batch = batch[-1:]
            yield batch, size


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and give every module its own training flag back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


class Predictor:
    """A model and the texts of a trace; predicts each sample at most once per thing switched off.

    Pass one in place of a model to several functions of this package (`neuron_ablation`, the controls) and they share
    the predictions. The model must not change meanwhile. Memory: 8 bytes per position predicted.

    Args:
        model: the model whose parameter names are those of the trace.
        tokens: (sample, position) token ids, -1 after the last one.
        batch_size: as in `predict`.
        forward: as in `predict`.
        how: how weights are switched off: "zero", "mean" or "resample", as in `ablate`.
        reference: (sample, position) texts for "mean" and "resample"; None takes the first 512 of `tokens`.
        seed: of the draws of "resample".

    Raises:
        ValueError: an unknown `how`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: IntArray,
        *,
        batch_size: int = 32,
        forward: Forward | None = None,
        how: str = "zero",
        reference: IntArray | None = None,
        seed: int = 0,
    ) -> None:
        """Keep the model and the texts; nothing is predicted yet."""
        self._ablator: Ablator | None = None
        if how != "zero":
            from lightning_gradtrace.analysis.ablate import Ablator

            texts = np.asarray(tokens)[:512] if reference is None else reference
            self._ablator = Ablator(model, how, reference=texts, batch_size=batch_size, forward=forward, seed=seed)
        self.model = model
        self.tokens = np.asarray(tokens)
        self._options = {"batch_size": batch_size, "forward": forward}
        self._checked = False
        self._known: dict[str | None, dict[int, IntArray]] = {}

    def __call__(self, rows: IntArray, off: Switch | tuple[str, int, str] | None = None) -> IntArray:
        """Predict samples.

        Args:
            rows: (n,) rows of `tokens`.
            off: what to switch off, for a neuron (param, neuron, axis); None for the model as it is.

        Returns:
            (n, position) predictions, -1 at padding.

        Raises:
            ValueError: weights that the model doesn't have, or a model as in `check_apart`.
        """
        switch = neuron_switch(*off) if isinstance(off, tuple) else off
        known = self._known.setdefault(None if switch is None else switch.name, {})
        new = np.array([row for row in dict.fromkeys(rows.tolist()) if row not in known], dtype=np.int64)
        if new.size:
            if not self._checked and self._options["batch_size"] != 1:
                check_apart(self.model, self.tokens[new], self._options["forward"])  # type: ignore[arg-type]
            self._checked = True
            found = self._predict(self.tokens[new], switch)
            known.update(zip(new.tolist(), found, strict=True))
        if not rows.size:
            return np.zeros((0, self.tokens.shape[1]), dtype=np.int64)
        return np.stack([known[row] for row in rows.tolist()])

    def _predict(self, tokens: IntArray, switch: Switch | None) -> IntArray:
        switches = [] if switch is None else [switch]
        if self._ablator is not None:
            outcome = self._ablator(tokens, switches)
            return outcome.ablated[0] if switches else outcome.pred
        with zeroed(self.model, [part for one in resolve(self.model, switches) for part in one.parts]):
            return predict(self.model, tokens, **self._options)  # type: ignore[arg-type]

"""What a weight receives or returns at every position of a text, wherever in the model it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import IntArray
from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis._runner import running
from lightning_gradtrace.analysis._switching import switching
from lightning_gradtrace.analysis.interventions import named_parameter
from lightning_gradtrace.analysis.predictions import batches, check_tokens, device_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_gradtrace.analysis.predictions import Forward


def activations(
    model: nn.Module, tokens: IntArray, param: str, axis: str, batch_size: int, forward: Forward | None
) -> Iterator[tuple[IntArray, FloatArray]]:
    """Yield the inputs or outputs of a weight (out, in), batch by batch.

    The output is what the use returns with W minus what it returns with W = 0: W x, without bias. The input is found
    the same way: with the rows of an identity in place of rows of W, the use returns coordinates of its input.

    Args:
        model: the model.
        tokens: (sample, position) token ids, -1 after the last one.
        param: name of the weight.
        axis: "in" for the inputs, "out" for the outputs.
        batch_size: samples at once.
        forward: callable(model, tokens); None calls `model(tokens)`.

    Yields:
        rows (b,) of `tokens` and values (b, position, in) or (b, position, out).

    Raises:
        ValueError: the weight is used several times in a pass, or not as W x.
    """
    import torch

    _access.check_axis(axis)
    tokens, length = check_tokens(tokens, batch_size)
    weight = named_parameter(model, param)
    if weight.ndim != 2:
        raise ValueError(f"`{param}` has shape {tuple(weight.shape)}; only parameters of shape (out, in) have neurons")
    n_out, n_in = weight.shape

    def use(batch: Tensor, other: Tensor) -> Tensor:
        """Return W x - V x for another weight V: (sample, position, out)."""
        with switching({id(weight): other}, keep=True) as mode:
            if forward is None:
                model(batch)
            else:
                forward(model, batch)
        if len(mode.contributions) != 1:
            raise ValueError(
                f"`{param}` is used {len(mode.contributions)} times in a forward pass, expected once: which of its "
                "activations are meant?"
            )
        return mode.contributions[0]

    def placed(batch: Tensor, other: Tensor) -> Tensor:
        return _place(use(batch, other), use(batch.flip(0), other), batch, n_out, param)

    with running(model):
        zero = torch.zeros_like(weight)
        for rows, size in batches(length, batch_size):
            batch = torch.as_tensor(tokens[rows, :size].astype(np.int64), device=device_of(model))
            whole = placed(batch, zero)
            if axis == "out":
                yield rows, whole.float().cpu().numpy()
                continue
            parts = []
            for start in range(0, n_in, n_out):
                # W - V has rows of the identity: W x - V x is a part of x.
                unit = torch.zeros_like(weight)
                width = min(n_out, n_in - start)
                unit[torch.arange(width), start + torch.arange(width)] = 1
                # (W + unit) x - W x; a bias has gone already.
                parts.append(placed(batch, -unit)[..., :width] - whole[..., :width])
            yield rows, torch.cat(parts, dim=-1).float().cpu().numpy()


def _place(values: Tensor, flipped: Tensor, batch: Tensor, n_features: int, param: str) -> Tensor:
    """Bring a use's output to (sample, position, features), whatever the layout of the model inside.

    The batch with its samples in reverse order tells samples from positions, also where they are equally many.

    Raises:
        ValueError: another number of values, or axes that can't be told.
    """
    n_samples, n_positions = batch.shape
    if values.shape[-1] != n_features or values.numel() != batch.numel() * n_features:
        raise ValueError(
            f"`{param}` is used in a function that returns shape {tuple(values.shape)} for {n_samples} samples of "
            f"{n_positions} positions and {n_features} features; activations need one vector per position"
        )
    for swap in (False, True):
        sizes = (n_positions, n_samples) if swap else (n_samples, n_positions)
        one, other = (x.reshape(*sizes, n_features) for x in (values, flipped))
        one, other = (x.transpose(0, 1) if swap else x for x in (one, other))
        scale = one.abs().max()
        if (one - other.flip(0)).abs().max() <= 1e-4 * scale:
            return one
    raise ValueError(
        f"the use of `{param}` mixes samples of a batch, or its axes are neither (sample, position) nor (position, "
        "sample); its activations can't be told apart by sample"
    )

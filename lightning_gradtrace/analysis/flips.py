"""Counting flipped predictions from two arrays of predictions, whatever lies between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import IntArray

# Columns of `sample_flips`.
POSITIONS, FLIPS, NOTABLE, NOTABLE_FLIPS = range(4)


def count_flips(pred: IntArray, ablated: IntArray, vocab: Sequence[str] | None = None) -> pd.DataFrame:
    """Count flips per token: flips(t) / count(t) over all positions (docs/concepts.md, 5).

    flips(t) = #(pred != ablated and t in {pred, ablated}), count(t) = #(t in {pred, ablated}). A flipped position
    counts for two tokens and an unflipped one for a single token, so the proportion of any set of tokens is larger
    than the share of flipped positions (about 2 r / (1 + r) at a share r): never compare the two, compare tokens with
    tokens (`frequency_control`). Tokens of tiny count have proportions of 0 or 1; read `count` beside `proportion`.

    Args:
        pred: (sample, position) predictions of the model, -1 at padding.
        ablated: (sample, position) predictions of the ablated model, -1 at the same places.
        vocab: text of every token id; None shows the ids.

    Returns:
        One row per token that occurs in either, most flips first, then largest count, then by id: `token`, `text`,
        `flips`, `count`, `proportion`.

    Raises:
        ValueError: arrays of different shapes or with padding at different places.

    Source: docs/concepts.md, 5, zero ablation.

    Example:
        >>> count_flips(np.array([[7, 8, -1]]), np.array([[7, 9, -1]]))[["token", "flips", "count"]]
           token  flips  count
        0      8      1      1
        1      9      1      1
        2      7      0      1
    """
    before, after = _valid(pred, ablated)
    flipped = before != after
    token, column = np.unique(np.concatenate([before, after[flipped]]), return_inverse=True)
    count = np.bincount(column, minlength=token.size)
    both = np.concatenate([flipped, np.ones(np.count_nonzero(flipped), dtype=bool)])
    flips = np.bincount(column[both], minlength=token.size)
    table = pd.DataFrame(
        {
            "token": token,
            "text": pd.Series(_access.words(vocab, token), dtype=str),
            "flips": flips,
            "count": count,
            "proportion": flips / np.maximum(count, 1),
        }
    )
    return table.sort_values(["flips", "count", "token"], ascending=[False, False, True], ignore_index=True)


def sample_flips(pred: IntArray, ablated: IntArray, notable: Sequence[int] | IntArray) -> npt.NDArray[np.int64]:
    """Count, sample by sample, what the bootstrap resamples.

    Args:
        pred: (sample, position) predictions, -1 at padding.
        ablated: (sample, position) predictions of the ablated model.
        notable: token ids.

    Returns:
        (sample, 4): positions, flipped positions, positions with a notable token in {pred, ablated}, those of them
        that are flipped.
    """
    _valid(pred, ablated)
    valid = pred >= 0
    flipped = valid & (pred != ablated)
    with_notable = valid & (np.isin(pred, notable) | np.isin(ablated, notable))
    return np.stack([a.sum(axis=1) for a in (valid, flipped, with_notable, with_notable & flipped)], axis=1)


def token_flips(
    pred: IntArray, ablated: IntArray, tokens: IntArray
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count flips(t) and count(t) sample by sample.

    Args:
        pred: (sample, position) predictions, -1 at padding.
        ablated: (sample, position) predictions of the ablated model.
        tokens: (t,) ascending token ids.

    Returns:
        flips (sample, t), count (sample, t).
    """
    _valid(pred, ablated)
    valid = pred >= 0
    flipped = valid & (pred != ablated)
    size = pred.shape[0] * tokens.size

    def tally(predicted: IntArray, where: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        sample, position = np.nonzero(where & np.isin(predicted, tokens))
        column = np.searchsorted(tokens, predicted[sample, position])
        return np.bincount(sample * tokens.size + column, minlength=size).reshape(pred.shape[0], tokens.size)

    other = tally(ablated, flipped)
    return tally(pred, flipped) + other, tally(pred, valid) + other


def _valid(pred: IntArray, ablated: IntArray) -> tuple[IntArray, IntArray]:
    if pred.shape != ablated.shape or ((pred < 0) != (ablated < 0)).any():
        raise ValueError(
            f"`pred` {pred.shape} and `ablated` {ablated.shape} must have one shape and padding (-1) at the same "
            "places; predict both from the same tokens"
        )
    valid = pred >= 0
    return pred[valid], ablated[valid]

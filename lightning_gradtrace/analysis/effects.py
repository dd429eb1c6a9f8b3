"""What did switching off change: flips and losses, in all and token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._bootstrap import FloatArray, bootstrap, ratio
from lightning_gradtrace.analysis.ablate import Ablated
from lightning_gradtrace.analysis.flips import count_flips


def ablation_effects(
    ablated: Ablated, *, confidence: float = 0.95, n_resamples: int = 999, seed: int = 0
) -> pd.DataFrame:
    """Summarise each ablation: how many predictions flipped, and how much the loss changed.

    Args:
        ablated: from `ablate`.
        confidence: of the intervals.
        n_resamples: bootstrap resamples; the unit is the sample, as positions of one text depend on each other.
        seed: of the resampling.

    Returns:
        One row per ablation: what names it, `n_samples`, `n_predictions`, `flips`, `flip_rate`, `n_targets`
        (positions with a next token), `loss` (mean over these, in nats), `ablated_loss`, `loss_change` (positive
        where the model got worse), `low`, `high` (interval of `loss_change`).

    Source: docs/concepts.md, 5, zero ablation. Losses are in nats per token.
    """
    valid, target = ablated.pred >= 0, np.isfinite(ablated.loss)
    per_sample = target.sum(axis=1).astype(np.float64)
    before = np.where(target, ablated.loss.astype(np.float64), 0.0).sum(axis=1)
    rows = []
    for number in range(len(ablated.ablated)):
        after = np.where(target, ablated.ablated_loss[number].astype(np.float64), 0.0).sum(axis=1)
        rng = np.random.default_rng([seed, number])

        def change(weights: FloatArray, gain: FloatArray = after - before) -> FloatArray:
            return ratio(weights @ gain, weights @ per_sample)

        found = bootstrap(change, [len(before)], confidence=confidence, n_resamples=n_resamples, rng=rng)
        flips, total = int((valid & (ablated.pred != ablated.ablated[number])).sum()), max(1.0, per_sample.sum())
        rows.append(
            {
                "n_samples": int(valid.any(axis=1).sum()),
                "n_predictions": int(valid.sum()),
                "flips": flips,
                "flip_rate": flips / max(1, int(valid.sum())),
                "n_targets": int(per_sample.sum()),
                "loss": before.sum() / total,
                "ablated_loss": after.sum() / total,
                "loss_change": found.effect,
                "low": found.low,
                "high": found.high,
            }
        )
    return pd.concat([ablated.keys, pd.DataFrame(rows)], axis=1)


def token_losses(ablated: Ablated, *, vocab: Sequence[str] | None = None, min_count: int = 1) -> pd.DataFrame:
    """Say for each ablation and each token how much worse the model predicts this token.

    Args:
        ablated: from `ablate`.
        vocab: text of every token id; None shows the ids.
        min_count: leave out tokens that are the next token fewer times.

    Returns:
        In the order of the ablations, largest change first: what names the ablation, `token`, `text`, `count` (times
        it is the next token), `loss` (mean, in nats), `ablated_loss`, `loss_change`.

    Raises:
        ValueError: `min_count` below 1.

    Source: docs/concepts.md, 5, zero ablation. Losses are in nats per token.
    """
    _access.check_count("min_count", min_count)
    sample, position = np.nonzero(np.isfinite(ablated.loss))
    token, column = np.unique(ablated.tokens[sample, position + 1], return_inverse=True)
    count = np.bincount(column, minlength=token.size)
    loss = np.bincount(column, ablated.loss[sample, position], minlength=token.size) / np.maximum(count, 1)
    keep = count >= min_count
    common: dict[str, Any] = {
        "token": token,
        "text": np.array(_access.words(vocab, token), dtype=object),
        "count": count,
    }
    parts = []
    for number, one in enumerate(ablated.ablated_loss):
        after = np.bincount(column, one[sample, position], minlength=token.size) / np.maximum(count, 1)
        table = pd.DataFrame({**common, "loss": loss, "ablated_loss": after, "loss_change": after - loss})[keep]
        parts.append(_named(ablated, number, table.sort_values(["loss_change", "token"], ascending=[False, True])))
    empty = pd.DataFrame(columns=[*ablated.keys.columns, *common, "loss", "ablated_loss", "loss_change"])
    return pd.concat(parts, ignore_index=True) if parts else empty


def flip_tables(ablated: Ablated, *, vocab: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the flip table of every ablation (see `count_flips`).

    Args:
        ablated: from `ablate`.
        vocab: text of every token id; None shows the ids.

    Returns:
        What names the ablation, then `token`, `text`, `flips`, `count`, `proportion`.
    """
    parts = [_named(ablated, i, count_flips(ablated.pred, one, vocab)) for i, one in enumerate(ablated.ablated)]
    columns = [*ablated.keys.columns, "token", "text", "flips", "count", "proportion"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _named(ablated: Ablated, number: int, table: pd.DataFrame) -> pd.DataFrame:
    keys = ablated.keys.iloc[[number] * len(table)].reset_index(drop=True)
    return pd.concat([keys, table.reset_index(drop=True)], axis=1)

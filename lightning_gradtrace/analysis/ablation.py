"""What does the model predict without a neuron (docs/concepts.md, 5, zero ablation)?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis._access import Entries, IntArray
from lightning_gradtrace.analysis._bootstrap import ratio
from lightning_gradtrace.analysis._components import KEYS, kind_of
from lightning_gradtrace.analysis._study import predictor_of, studies
from lightning_gradtrace.analysis.flips import FLIPS, NOTABLE, NOTABLE_FLIPS, POSITIONS, count_flips, sample_flips
from lightning_gradtrace.analysis.interventions import zero_ablation as zero_ablation
from lightning_gradtrace.analysis.predictions import Predictor, check_apart, check_tokens, predict

if TYPE_CHECKING:
    from torch import nn

    from lightning_gradtrace.analysis.predictions import Forward
    from lightning_gradtrace.store import Trace


def flip_table(
    model: nn.Module,
    tokens: IntArray,
    param: str,
    neuron: int,
    axis: str = "in",
    *,
    batch_size: int = 32,
    forward: Forward | None = None,
    vocab: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Compare a model's predictions with and without one neuron, token by token.

    Both models predict every position of every sample in eval mode; positions of different samples are never
    compared and padding is never predicted.

    Args:
        model: the model.
        tokens: (sample, position) token ids, -1 after the last one. Pass each sample once: repeated samples repeat
            their flips.
        param: name of a weight of shape (out, in).
        neuron: column (`axis="in"`) or row (`axis="out"`).
        axis: "in" or "out".
        batch_size: samples at once.
        forward: callable(model, tokens) -> logits (sample, position, vocabulary); None calls `model(tokens)`.
        vocab: text of every token id; None shows the ids.

    Returns:
        The table of `count_flips`: `token`, `text`, `flips`, `count`, `proportion`.

    Raises:
        ValueError: as in `zero_ablation` and `predict`, or a model that mixes the samples of a batch, as one does that
            wants positions first.

    Source: docs/concepts.md, 5, zero ablation.
    """
    if batch_size != 1:
        check_apart(model, check_tokens(tokens, batch_size)[0], forward)
    with zero_ablation(model, param, neuron, axis):
        ablated = predict(model, tokens, batch_size=batch_size, forward=forward)
    return count_flips(predict(model, tokens, batch_size=batch_size, forward=forward), ablated, vocab)


def neuron_ablation(
    trace: Trace,
    model: nn.Module | Predictor,
    components: pd.DataFrame,
    entries: Entries,
    *,
    heads: pd.DataFrame | None = None,
    n_samples: int = 2000,
    batch_size: int = 32,
    forward: Forward | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Switch each neuron, head or entry off and count flipped predictions on its attributed samples.

    Up to `n_samples` of its attributed samples are drawn at random, each sample once however often it was
    selected: the same text twice would repeat its flips. The number of distinct flipped tokens, and with it `share`,
    depends on the number of samples; compare at equal `n_samples`, or against the controls, which do.

    Args:
        trace: an open trace with a `TopK` record and inputs.
        model: the trained model, or a `Predictor` to share predictions with the controls.
        components: rows of `neurons` or of `components` (heads, parts of heads, entries); all are ablated, so select
            the ones of interest first.
        entries: the kept entries that they were made from.
        heads: for heads, the table of `attention_heads`.
        n_samples: at most so many samples for each.
        batch_size: samples at once (a `Predictor` has its own).
        forward: as in `flip_table` (a `Predictor` has its own).
        seed: of the draw, which doesn't depend on the other rows.

    Returns:
        One row for each, in the order given: what names it (neurons: `param`, `module`, `axis`, `neuron`), `n_samples`,
        `n_predictions` (positions), `flips` (positions whose prediction changes), `flip_rate`, `n_notable`,
        `flipped_tokens` (distinct tokens with flips), `notable_flipped` (those of them that were notable beforehand),
        `share` (their quotient, NaN without flips), `notable_positions` (positions with a notable token in
        {pred, ablated}), `notable_flips` (the flipped ones), `notable_flip_rate`.

    Raises:
        ValueError: no `TopK` record or inputs, components that the trace or the model doesn't have.

    Source: docs/concepts.md, 5; the post's neuron 173 of 3.2 has 18 notable among 28 flipped tokens.
    """
    predictor = predictor_of(trace, model, batch_size, forward)
    rows = []
    for study in studies(trace, predictor, components, entries, heads=heads, n_samples=n_samples, seed=seed):
        pred, ablated = predictor(study.rows), predictor(study.rows, study.switch)
        counted = sample_flips(pred, ablated, study.tokens).sum(axis=0)
        table = count_flips(pred, ablated)
        flipped = table.loc[table["flips"] > 0, "token"]
        notable_flipped = int(flipped.isin(study.tokens).sum())
        rows.append(
            {
                **study.keys,
                "n_samples": study.rows.size,
                "n_predictions": counted[POSITIONS],
                "flips": counted[FLIPS],
                "n_notable": len(study.tokens),
                "flipped_tokens": len(flipped),
                "notable_flipped": notable_flipped,
                "notable_positions": counted[NOTABLE],
                "notable_flips": counted[NOTABLE_FLIPS],
            }
        )
    columns = [
        *KEYS[kind_of(components)],
        "n_samples",
        "n_predictions",
        "flips",
        "flip_rate",
        "n_notable",
        "flipped_tokens",
    ]
    columns += ["notable_flipped", "share", "notable_positions", "notable_flips", "notable_flip_rate"]
    table = pd.DataFrame(rows, columns=[c for c in columns if c not in ("flip_rate", "share", "notable_flip_rate")])
    for name, over, under in (
        ("flip_rate", "flips", "n_predictions"),
        ("share", "notable_flipped", "flipped_tokens"),
        ("notable_flip_rate", "notable_flips", "notable_positions"),
    ):
        table[name] = ratio(table[over].to_numpy(np.float64), table[under].to_numpy(np.float64))
    return table[columns]

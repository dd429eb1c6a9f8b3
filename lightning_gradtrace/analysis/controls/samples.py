"""Random control: the same neuron, head or entry on samples drawn at random from the training data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis._access import Entries
from lightning_gradtrace.analysis._study import predictor_of, studies
from lightning_gradtrace.analysis.controls._compare import Group, compare_groups, table

if TYPE_CHECKING:
    from torch import nn

    from lightning_gradtrace.analysis.predictions import Forward, Predictor
    from lightning_gradtrace.store import Trace


def random_control(
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
    confidence: float = 0.95,
    n_resamples: int = 999,
) -> pd.DataFrame:
    """Compare a component's flips on its attributed samples with its flips on as many random samples.

    Random samples are drawn without replacement from the training data outside *all* attributed samples of the
    component, so no sample is in both groups. Where fewer are left, both groups shrink to that number (`n`,
    `n_control`); one to which every sample is attributed has no control and gets NaN.

    Attributed samples contain the notable tokens more often, by construction. A larger `notable_share` on them says
    only that these words are predicted there more often; `notable_flip_rate`, per position at which they are
    predicted, doesn't grow with their frequency alone.

    Args:
        trace: an open trace with a `TopK` record and inputs.
        model: the trained model, or a `Predictor` to share predictions between calls.
        components: rows of `neurons` or of `components` (heads, parts of heads, entries).
        entries: the kept entries that they were made from.
        heads: for heads, the table of `attention_heads`.
        n_samples: at most so many samples per group.
        batch_size: samples at once (a `Predictor` has its own).
        forward: as in `flip_table` (a `Predictor` has its own).
        seed: of all draws.
        confidence: of the intervals.
        n_resamples: bootstrap resamples; the unit is the sample, as positions of one text depend on each other.

    Returns:
        Four rows per component: what names it (neurons: `param`, `module`, `axis`, `neuron`), `control` ("random"),
        `measure`, `value` (attributed), `control_value` (random), `effect` (their difference), `low`, `high`, `n`,
        `n_control` (samples).
        Measures: `flip_rate` (flipped / all positions), `notable_flip_rate` (flipped / all positions with a notable
        token in {pred, ablated}), `notable_share` (flipped positions with a notable token / flipped positions),
        `token_share` (the post's: distinct notable flipped / distinct flipped tokens; no interval, since resampling
        samples biases numbers of distinct tokens: pool it with `pool_controls`).

    Raises:
        ValueError: as in `neuron_ablation`.

    Source: docs/concepts.md, 5, controls.
    """
    predictor = predictor_of(trace, model, batch_size, forward)
    rows = []
    for study in studies(trace, predictor, components, entries, heads=heads, n_samples=n_samples, seed=seed):
        others = np.setdiff1d(np.arange(len(predictor.tokens)), study.attributed)
        size = min(study.rows.size, others.size)
        drawn = study.rows[:size]
        others = study.rng.choice(others, size=size, replace=False)
        group, other = (
            Group.of(predictor(chosen), predictor(chosen, study.switch), study.tokens) for chosen in (drawn, others)
        )
        rows += compare_groups(
            study.keys, "random", group, other, confidence=confidence, n_resamples=n_resamples, rng=study.rng
        )
    return table(rows, components)

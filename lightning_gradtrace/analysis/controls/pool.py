"""One number per control: effects averaged over neurons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis._bootstrap import FloatArray, bootstrap

_COLUMNS = ["control", "measure", "neurons", "value", "control_value", "effect", "low", "high"]


def pool_controls(
    controls: pd.DataFrame,
    by: str | Sequence[str] = (),
    *,
    seed: int = 0,
    confidence: float = 0.95,
    n_resamples: int = 999,
) -> pd.DataFrame:
    """Average the effects of controls over neurons, with bootstrap intervals over neurons.

    Every neuron weighs the same. Neurons for which an effect is undefined are left out of it and of its means
    (`neurons` counts those that are in). Neurons of one model share weights, samples and tokens, so the interval
    speaks of further neurons of this model chosen the same way, not of further models.

    Source: docs/concepts.md, 5, the four controls; values are rates and shares.

    Args:
        controls: one or several control tables, concatenated.
        by: further columns to group by, e.g. "param" for a table by layer.
        seed: of the resampling.
        confidence: of the intervals.
        n_resamples: bootstrap resamples of the neurons.

    Returns:
        One row per group, in order of first appearance: the columns `by`, `control`, `measure`, `neurons`, `value`,
        `control_value`, `effect` (means), `low`, `high`.

    Raises:
        ValueError: a column is missing.
    """
    by = [by] if isinstance(by, str) else list(by)
    missing = {*by, "control", "measure", "value", "control_value", "effect"} - set(controls.columns)
    if missing:
        raise ValueError(f"`controls` lacks the columns {sorted(missing)}; pass tables of the controls")
    rng = np.random.default_rng(seed)
    rows = []
    for key, group in controls.groupby([*by, "control", "measure"], sort=False, observed=True):
        defined = group[np.isfinite(group["effect"].to_numpy(float))]
        effect = defined["effect"].to_numpy(float)

        def mean(weights: FloatArray, effect: FloatArray = effect) -> FloatArray:
            return weights @ effect / weights.sum(axis=1)

        low, high = np.nan, np.nan
        if effect.size:
            _, low, high = bootstrap(mean, [effect.size], confidence=confidence, n_resamples=n_resamples, rng=rng)
        means = [float(defined[c].mean()) if effect.size else np.nan for c in ("value", "control_value", "effect")]
        rows.append([*key, effect.size, *means, low, high])
    return pd.DataFrame(rows, columns=[*by, *_COLUMNS])

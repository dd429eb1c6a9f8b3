"""The post's layer table: how far do flips follow the notable tokens, layer by layer (docs/concepts.md, 5)?"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd


def layer_table(ablation: pd.DataFrame, by: str | Sequence[str] = "param") -> pd.DataFrame:
    """Average the ablation of neurons by layer.

    The post averages over neurons with notable tokens; select them beforehand (`n_notable > 0`) to do the same. A
    neuron without flips has no share: it counts in `neurons` and in the mean number of flipped tokens, not in the
    mean share. The share is a mean of ratios, so a neuron with few flipped tokens weighs as much as one with many.
    It says nothing by itself: frequent tokens are both notable and flipped more often than rare ones. Read it beside
    the null (`null_control`, measure `token_share`).

    Args:
        ablation: from `neuron_ablation`: columns `flipped_tokens`, `notable_flipped` and those in `by`.
        by: column or columns that name the layer, e.g. "param" or "module".

    Returns:
        One row per layer, in order of first appearance: the columns `by`, `neurons`, `neurons_without_flips`,
        `mean_flipped_tokens`, `notable_share` (mean over neurons of notable flipped tokens / flipped tokens; NaN if
        no neuron flips anything).

    Raises:
        ValueError: a column is missing.

    Source: docs/concepts.md, 5.

    Example:
        The first-layer row of the 2023 post:

        >>> neurons = pd.DataFrame({"param": "1.2", "flipped_tokens": [330, 191], "notable_flipped": [8, 4]})
        >>> layer_table(neurons).round(6)
          param  neurons  neurons_without_flips  mean_flipped_tokens  notable_share
        0   1.2        2                      0                260.5       0.022592
    """
    by = [by] if isinstance(by, str) else list(by)
    missing = {*by, "flipped_tokens", "notable_flipped"} - set(ablation.columns)
    if missing:
        raise ValueError(
            f"`ablation` lacks the columns {sorted(missing)}, it has {list(ablation.columns)}; pass the table of "
            "`neuron_ablation`"
        )
    flipped = ablation["flipped_tokens"].astype(float)
    table = ablation[by].assign(
        flipped=flipped, none=flipped == 0, share=ablation["notable_flipped"] / flipped.where(flipped > 0)
    )
    return table.groupby(by, as_index=False, sort=False).agg(
        neurons=("flipped", "size"),
        neurons_without_flips=("none", "sum"),
        mean_flipped_tokens=("flipped", "mean"),
        notable_share=("share", "mean"),
    )

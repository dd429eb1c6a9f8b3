"""Null: the same pipeline with the links between occurrences and shifts permuted. What it finds is chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Entries, IntArray, entry_numbers
from lightning_gradtrace.analysis._bootstrap import FloatArray, Interval
from lightning_gradtrace.analysis._components import Components, tokens_of
from lightning_gradtrace.analysis._study import Study, predictor_of, studies
from lightning_gradtrace.analysis.components import with_tokens
from lightning_gradtrace.analysis.controls._compare import Group, compare_groups, row, table
from lightning_gradtrace.analysis.tokens import notable_tokens

if TYPE_CHECKING:
    from torch import nn

    from lightning_gradtrace.analysis.predictions import Forward, Predictor
    from lightning_gradtrace.store import Trace

FindTokens = Callable[..., pd.DataFrame]


def permuted_links(trace: Trace, seed: int = 0, within: str = "trace") -> IntArray:
    """Permute the links between occurrences and shifts.

    All shifts of an occurrence move together, so entries that are selected together stay together, and every entry
    keeps its number of occurrences. What else is kept depends on `within`, and so does what the null can disprove:

    - "trace": nothing. Chance if neither the sample nor the time matters.
    - "epoch": the epoch. Each entry still meets as many occurrences of each epoch as it did.
    - "step": the step. Disproves that it is the time of the selection, not the sample: needed where the data is not
      shuffled, as neighbouring samples then share a topic.
    - "sample": samples exchange their texts as wholes, so that a sample selected in every epoch becomes another
      sample selected in every epoch. The strictest of all where `min_count` can be reached by repeating one text.

    Args:
        trace: an open trace.
        seed: of the permutation.
        within: "trace", "epoch", "step" or "sample".

    Returns:
        (occurrence,) the occurrence whose sample each occurrence is linked to, for the argument `links`.

    Raises:
        ValueError: `within` is none of these.
    """
    rng = np.random.default_rng([seed, 0x6E756C6C])
    occurrences = trace.occurrences
    size = len(occurrences)
    if within == "sample":
        sample, ids = pd.factorize(occurrences["sample_id"].to_numpy())
        first = np.full(len(ids), size, dtype=np.int64)
        np.minimum.at(first, sample, np.arange(size))
        return first[rng.permutation(len(ids))[sample]]
    step = occurrences["step"].to_numpy()
    if within == "trace":
        group = np.zeros(size, dtype=np.int64)
    elif within == "step":
        group = step
    elif within == "epoch":
        steps = trace.steps.set_index("step") if "step" in trace.steps.columns else trace.steps
        group = steps["epoch"].reindex(step).to_numpy()
    else:
        raise ValueError(f'`within` is {within!r}, expected "trace", "epoch", "step" or "sample"')
    links = np.empty(size, dtype=np.int64)
    links[np.argsort(group, kind="stable")] = np.lexsort([rng.random(size), group])
    return links


def null_tokens(
    trace: Trace,
    entries: Entries,
    components: pd.DataFrame,
    *,
    heads: pd.DataFrame | None = None,
    find_tokens: FindTokens = notable_tokens,
    n_permutations: int = 20,
    within: str = "trace",
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Compare the notable tokens of each neuron, head or entry with those found under permuted links; needs no model.

    Args:
        trace: an open trace with a `TopK` record and inputs.
        entries: the kept entries.
        components: rows of `neurons` or of `components`; their tokens are found anew, with `find_tokens`.
        heads: for heads, the table of `attention_heads`.
        find_tokens: the method, called as `find_tokens(trace, entries, links=links)`; for other thresholds
            `functools.partial(notable_tokens, min_count=5)`, for the words of heads as wholes
            `functools.partial(notable_tokens, by="head", heads=heads)`.
        n_permutations: how many; each costs as much as finding the tokens once.
        within: as in `permuted_links`.
        seed: of the permutations.
        confidence: of the intervals.

    Returns:
        Three rows per component, columns of `random_control`, `control` "null", `control_value` the mean over the
        permutations. Measures: `n_notable` (number of notable tokens), `log2_relative` (mean log2 relative frequency
        over its entries and notable tokens, NaN where there are none), `overlap` (share of the true notable
        tokens that are found; 1 for the truth, by chance for the null). `low` and `high` come from the distribution
        over permutations, not from a bootstrap: `value` minus its upper and lower quantile, so that the interval
        holds 0 if the truth lies where the permutations lie; with few permutations it is as coarse as they are.
        `n` is 1, `n_control` the number of permutations (that have a value).

    Raises:
        ValueError: `n_permutations` below 1, or as in `notable_tokens` and `permuted_links`.

    Source: docs/concepts.md, 5, controls.
    """
    _check_permutations(n_permutations)
    numbers = entry_numbers(trace, entries)
    named = Components(trace, components, heads)
    truth = named.placed(find_tokens(trace, entries), numbers)
    true_tokens = tokens_of(truth, len(named))[0]
    values = _measure(truth, true_tokens)
    controls = []
    for number in range(n_permutations):
        notable = find_tokens(trace, entries, links=permuted_links(trace, seed + number, within))
        controls.append(_measure(named.placed(notable, numbers), true_tokens))
    null = np.stack(controls)
    rows = []
    tail = (1 - confidence) / 2
    for place, component in enumerate(named):
        for column, measure in enumerate(("n_notable", "log2_relative", "overlap")):
            value = values[place, column]
            chance = null[:, place, column]
            chance = chance[np.isfinite(chance)]
            low, high, mean = np.nan, np.nan, np.nan
            if chance.size:
                low, high = value - np.quantile(chance, [1 - tail, tail])
                mean = chance.mean()
            found_interval = Interval(float(value - mean), float(low), float(high))
            rows.append(
                row(component.keys, "null", measure, float(value), float(mean), found_interval, (1, chance.size))
            )
    return table(rows, components)


def null_control(
    trace: Trace,
    model: nn.Module | Predictor,
    components: pd.DataFrame,
    entries: Entries,
    *,
    heads: pd.DataFrame | None = None,
    find_tokens: FindTokens = notable_tokens,
    n_permutations: int = 1,
    within: str = "trace",
    n_samples: int = 2000,
    batch_size: int = 32,
    forward: Forward | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    n_resamples: int = 999,
) -> pd.DataFrame:
    """Run the whole pipeline, ablation included, on permuted links and compare its overlap with the true one.

    Under the null a neuron (or head, or entry) keeps its number of occurrences, gets other samples and whatever
    notable tokens these share, and is ablated on them. The overlap of flipped and notable tokens that this gives is
    chance: both kinds are frequent tokens. Each permutation uses as many samples as the truth.

    Args:
        trace: an open trace with a `TopK` record and inputs.
        model: the trained model, or a `Predictor` to share predictions between calls.
        components: rows of `neurons` or of `components`, their tokens found with `find_tokens`.
        entries: the kept entries.
        heads: for heads, the table of `attention_heads`.
        find_tokens: as in `null_tokens`; must be what `components` was made with.
        n_permutations: how many; each costs one search for tokens and one ablation of every component.
        within: as in `permuted_links`.
        n_samples: at most so many samples per component and permutation.
        batch_size: samples at once (a `Predictor` has its own).
        forward: as in `flip_table` (a `Predictor` has its own).
        seed: of all draws.
        confidence: of the intervals.
        n_resamples: bootstrap resamples of the samples.

    Returns:
        Four rows per component, with the measures and columns of `random_control`; `control` is "null", `n_control` the
        number of samples over all permutations, `control_value` of `token_share` the mean over permutations. One
        without notable tokens under the null has a `notable_share` of 0 there and no `notable_flip_rate`.

    Raises:
        ValueError: `n_permutations` below 1, or as in `neuron_ablation` and `permuted_links`.

    Source: docs/concepts.md, 5, controls.
    """
    _check_permutations(n_permutations)
    predictor = predictor_of(trace, model, batch_size, forward)
    truth = list(studies(trace, predictor, components, entries, heads=heads, n_samples=n_samples, seed=seed))
    chance: list[list[Group]] = [[] for _ in truth]
    sizes = [study.rows.size for study in truth]
    for number in range(n_permutations):
        links = permuted_links(trace, seed + number, within)
        found = with_tokens(trace, entries, find_tokens(trace, entries, links=links), components, heads)
        options: dict[str, Any] = {"heads": heads, "n_samples": n_samples, "seed": seed + number, "links": links}
        permuted = studies(trace, predictor, found, entries, **options)
        for place, study in enumerate(permuted):
            sizes[place] = min(sizes[place], study.rows.size)
            chance[place].append(_group(predictor, study, min(study.rows.size, truth[place].rows.size)))
    rows: list[dict[str, Any]] = []
    for study, groups, size in zip(truth, chance, sizes, strict=True):
        shares = np.array([g.token_share for g in groups])
        shares = shares[np.isfinite(shares)]
        other = Group(np.concatenate([g.counts for g in groups]), float(shares.mean()) if shares.size else np.nan)
        rows += compare_groups(
            study.keys,
            "null",
            _group(predictor, study, size),
            other,
            confidence=confidence,
            n_resamples=n_resamples,
            rng=study.rng,
        )
    return table(rows, components)


def _group(predictor: Predictor, study: Study, size: int) -> Group:
    chosen = study.rows[:size]
    return Group.of(predictor(chosen), predictor(chosen, study.switch), study.tokens)


def _measure(placed: pd.DataFrame, true_tokens: Sequence[tuple[int, ...]]) -> FloatArray:
    """Return (component, 3): number of notable tokens, mean log2 relative frequency, share of the true tokens found."""
    values = np.full((len(true_tokens), 3), np.nan)
    mean = np.log2(placed["relative"]).groupby(placed["place"]).mean()
    values[mean.index.to_numpy(), 1] = mean.to_numpy()
    for at, (tokens, true) in enumerate(zip(tokens_of(placed, len(true_tokens))[0], true_tokens, strict=True)):
        values[at, 0] = len(tokens)
        if true:
            values[at, 2] = len(set(tokens) & set(true)) / len(true)
    return values


def _check_permutations(n_permutations: int) -> None:
    _access.check_count("n_permutations", n_permutations)

"""Frequency-matched control: notable tokens against other tokens that are predicted about as often."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Entries, IntArray
from lightning_gradtrace.analysis._bootstrap import FloatArray, bootstrap, ratio
from lightning_gradtrace.analysis._study import Study, predictor_of, studies
from lightning_gradtrace.analysis.controls._compare import row, table
from lightning_gradtrace.analysis.flips import count_flips, token_flips

if TYPE_CHECKING:
    from torch import nn

    from lightning_gradtrace.analysis.predictions import Forward, Predictor
    from lightning_gradtrace.store import Trace


def frequency_control(
    trace: Trace,
    model: nn.Module | Predictor,
    components: pd.DataFrame,
    entries: Entries,
    *,
    heads: pd.DataFrame | None = None,
    by: str = "component",
    n_matches: int = 5,
    max_ratio: float = 2.0,
    min_count: int = 5,
    n_samples: int = 2000,
    batch_size: int = 32,
    forward: Forward | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    n_resamples: int = 999,
) -> pd.DataFrame:
    """Compare the flip proportion of notable tokens with that of non-notable tokens of similar count(t).

    For each notable token, the `n_matches` non-notable tokens whose count(t) on the same samples is nearest on a
    logarithmic scale are its controls, ties at random. This is the control to read for "the neuron serves just these
    words": notable tokens are more frequent than most, and a flip proportion depends on the frequency.

    Tokens with fewer than `min_count` predictions have proportions of little more than 0 or 1 and take no part on
    either side. A notable token without a match within `max_ratio` is left out: `n` says how many take part.

    Args:
        trace: an open trace with a `TopK` record and inputs.
        model: the trained model, or a `Predictor` to share predictions between calls.
        components: rows of `neurons` or of `components` (heads, parts of heads, entries).
        entries: the kept entries that they were made from.
        heads: for heads, the table of `attention_heads`.
        by: "component" averages over a component's notable tokens; "token" returns each of them.
        n_matches: at most so many controls per notable token; a token may be a control of several.
        max_ratio: largest quotient between the counts of a notable token and its control.
        min_count: smallest count(t) of a token on either side.
        n_samples: at most so many samples per component.
        batch_size: samples at once (a `Predictor` has its own).
        forward: as in `flip_table` (a `Predictor` has its own).
        seed: of all draws.
        confidence: of the intervals.
        n_resamples: bootstrap resamples, of the samples (matches stay) and, by component, of its notable tokens too.

    Returns:
        The columns of `random_control`, with `control` "frequency", `measure` "proportion", `value` the (mean)
        proportion of notable tokens, `control_value` that of their controls. By component one row each; `n` notable
        tokens that take part, `n_control` distinct control tokens; the interval is NaN with fewer than two. By token
        one row per notable token that takes part, with `token`, `text`, `count` after what names it; `n` is the number
        of samples, `n_control` that of controls.

    Raises:
        ValueError: `by` is neither, a threshold is out of range, or as in `neuron_ablation`.

    Source: docs/concepts.md, 5, controls.
    """
    if by not in ("component", "token"):
        raise ValueError(f'`by` is {by!r}, expected "component" or "token"')
    if n_matches < 1 or max_ratio < 1:
        raise ValueError(f"`n_matches` is {n_matches} and `max_ratio` {max_ratio}, expected 1 or more each")
    predictor = predictor_of(trace, model, batch_size, forward)
    options = {"confidence": confidence, "n_resamples": n_resamples}
    rows: list[dict[str, Any]] = []
    for study in studies(trace, predictor, components, entries, heads=heads, n_samples=n_samples, seed=seed):
        pred, ablated = predictor(study.rows), predictor(study.rows, study.switch)
        counts = count_flips(pred, ablated).set_index("token")["count"]
        matches = _match(counts[counts >= min_count], study, n_matches, max_ratio)
        tokens = np.unique(np.array([*matches, *(m for found in matches.values() for m in found)], dtype=np.int64))
        flips, count = token_flips(pred, ablated, tokens)
        own = np.searchsorted(tokens, np.array(list(matches), dtype=np.int64))
        others = np.zeros((tokens.size, own.size))
        for place, found in enumerate(matches.values()):
            others[np.searchsorted(tokens, found), place] = 1.0
        if by == "component":
            rows.append(_of_component(study, flips, count, own, others, options))
            continue
        for place, token in enumerate(matches):
            one = _of_token(study, flips, count, own[[place]], others[:, [place]], options)
            text = _access.words(trace.vocab, np.array([token]))[0]
            rows.append({**one, "token": token, "text": text, "count": int(counts[token])})
    return table(rows, components, ["token", "text", "count"] if by == "token" else [])


def _match(counts: pd.Series[int], study: Study, n_matches: int, max_ratio: float) -> dict[int, IntArray]:
    notable = counts.index.isin(study.tokens)
    shuffled = counts[~notable].sample(frac=1.0, random_state=study.rng)
    matches = {}
    for token, count in counts[notable].sort_index().items():
        distance = np.abs(np.log(shuffled.to_numpy() / count))
        order = np.argsort(distance, kind="stable")[:n_matches]
        near = order[distance[order] <= np.log(max_ratio) + 1e-12]
        if near.size:
            matches[int(str(token))] = shuffled.index.to_numpy()[near]
    return matches


def _proportions(
    weights: FloatArray, flips: npt.NDArray[np.int64], count: npt.NDArray[np.int64], own: IntArray, others: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the proportion of each notable token and the mean of its controls: (resample, notable) each."""
    proportion = ratio(weights @ flips.astype(np.float64), weights @ count.astype(np.float64))
    defined = np.isfinite(proportion)
    return proportion[:, own], ratio(np.where(defined, proportion, 0.0) @ others, defined.astype(np.float64) @ others)


def _of_token(
    study: Study,
    flips: npt.NDArray[np.int64],
    count: npt.NDArray[np.int64],
    own: IntArray,
    others: FloatArray,
    options: dict[str, Any],
) -> dict[str, Any]:
    def difference(samples: FloatArray) -> FloatArray:
        value, control = _proportions(samples, flips, count, own, others)
        return (value - control)[:, 0]

    value, control = _proportions(np.ones((1, len(flips))), flips, count, own, others)
    found = bootstrap(difference, [len(flips)], rng=study.rng, **options)
    sizes = (len(flips), int(others.sum()))
    return row(study.keys, "frequency", "proportion", float(value[0, 0]), float(control[0, 0]), found, sizes)


def _of_component(
    study: Study,
    flips: npt.NDArray[np.int64],
    count: npt.NDArray[np.int64],
    own: IntArray,
    others: FloatArray,
    options: dict[str, Any],
) -> dict[str, Any]:
    def difference(samples: FloatArray, tokens: FloatArray) -> FloatArray:
        value, control = _proportions(samples, flips, count, own, others)
        gain = value - control
        defined = np.isfinite(gain)
        return ratio((np.where(defined, gain, 0.0) * tokens).sum(axis=1), (defined * tokens).sum(axis=1))

    sizes = (len(flips), own.size)
    value, control = _proportions(np.ones((1, sizes[0])), flips, count, own, others)
    mean, control_mean = (float(v.mean()) if own.size else np.nan for v in (value, control))
    found = bootstrap(difference, sizes, rng=study.rng, **options)
    n_controls = int(np.count_nonzero(others.any(axis=1)))
    return row(study.keys, "frequency", "proportion", mean, control_mean, found, (own.size, n_controls))

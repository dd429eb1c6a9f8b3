"""Does a step bring together just the pairs of tokens that its texts hold, beyond how often each token comes?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from lightning_gradtrace.analysis._access import IntArray
from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis.bigrams import snapshots_in

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

Matrix = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Alignment:
    """How the shift of the scores of some pairs of tokens goes with their counts.

    Attributes:
        pearson: correlation of shift and count, each without what rows and columns alone say.
        spearman: the same of their ranks.
        null_mean: mean of `pearson` over permutations of the next tokens.
        null_std: standard deviation over them.
        p_value: share of the permutations (and the truth itself) with at least this `pearson`.
        unigram_share: share of the squared shift that rows and columns alone make up.
    """

    pearson: float
    spearman: float
    null_mean: float
    null_std: float
    p_value: float
    unigram_share: float


def bigram_alignment(
    trace: Trace,
    embedding: str,
    head: str | None = None,
    *,
    texts: IntArray | None = None,
    summed: bool = False,
    max_span: int | None = None,
    steps: slice | None = None,
    max_tokens: int = 1000,
    n_permutations: int = 199,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the bigram shift between weight snapshots with the bigrams of the texts read meanwhile.

    With M = U E' (see `bigram_shifts`), D[v, t] is the shift of the score of token v after token t, and C[v, t] how
    often v follows t in the texts. Where the model still predicts by frequency alone, the gradient of the scores is in
    the direction of C - r c' / N, with r and c the sums of C: bigrams beyond unigrams. So D without the means of its
    rows and columns is compared with C - r c' / N over all pairs of the tokens of the texts. A model that has learned
    the bigrams of the language makes shifts that depend on more than the last token, and the correlation falls.

    The null permutes the next tokens of the texts: the same tokens, as often, in other pairs. It says whether pairs
    matter at all, not whether they matter much; `pearson` says that.

    With `weights_every_n_steps=EveryNSteps(25, width=2)` every second span is a single step. M leaves out what lies
    between embedding and head in the model, positions and layers, so a correlation below 1 is no finding by itself.

    Args:
        trace: an open trace with weight snapshots and inputs.
        embedding: name of the embedding's weight, (vocabulary, width).
        head: name of the output head's weight; None where it is tied to the embedding.
        texts: (sample, position) token ids, -1 after the last one, whose bigrams are counted; None takes the texts of
            the occurrences between the snapshots. Texts that were not trained on show what generalises.
        summed: one span from the first to the last snapshot of `steps`, instead of one between each two neighbours.
        max_span: leave out snapshots that are more steps apart.
        steps: snapshots to look at, a slice of step numbers that holds both its ends; None for all.
        max_tokens: the most frequent first and next tokens of the texts; memory is 8 bytes times its square.
        n_permutations: of the null.
        seed: of the permutations.

    Returns:
        One row per span: `first_step`, `last_step`, `bigrams` (number counted), `pairs` (of tokens compared), then
        the attributes of `Alignment`. NaN where no bigram is among the tokens.

    Raises:
        ValueError: no inputs, fewer than two snapshots in `steps`, or a number below 1.
        KeyError: the trace has no weights of this name.

    Source: docs/concepts.md, 5, the tables at its end.
    """
    if max_tokens < 2 or n_permutations < 1:
        raise ValueError(
            f"`max_tokens` is {max_tokens} and `n_permutations` {n_permutations}, expected 2 and 1 or more"
        )
    inside = snapshots_in(trace, steps)
    spans = [(inside[0], inside[-1])] if summed else list(pairwise(inside))
    head = embedding if head is None else head
    rng, rows = np.random.default_rng(seed), []
    for first, last in spans:
        if max_span is not None and last - first > max_span:
            continue
        read = _texts_between(trace, first, last) if texts is None else np.asarray(texts)
        columns, lines, pairs = _frequent_pairs(read, max_tokens)
        before, after = ([trace.weights(name, step) for name in (head, embedding)] for step in (first, last))
        shift = _product(after, lines, columns) - _product(before, lines, columns)
        found = align(shift, pairs, n_permutations=n_permutations, rng=rng)
        sizes = {"bigrams": len(pairs[0]), "pairs": shift.size}
        rows.append({"first_step": first, "last_step": last, **sizes, **vars(found)})
    names = ["first_step", "last_step", "bigrams", "pairs", *Alignment.__dataclass_fields__]
    return pd.DataFrame(rows, columns=names)


def align(
    shift: Matrix, pairs: tuple[IntArray, IntArray], *, n_permutations: int = 199, rng: np.random.Generator
) -> Alignment:
    """Correlate shifts of scores with counts of pairs beyond what rows and columns say.

    Args:
        shift: D (v, t).
        pairs: row (n,) and column (n,) of every pair that was counted.
        n_permutations: of the rows of the pairs.
        rng: draws them.

    Example:
        >>> pairs = (np.array([0, 1, 2]), np.array([0, 1, 2]))
        >>> print(round(align(np.eye(3), pairs, rng=np.random.default_rng(0)).pearson, 6))
        1.0
    """
    row, column = pairs
    shift = shift.astype(np.float64)
    inner = shift - shift.mean(axis=0) - shift.mean(axis=1, keepdims=True) + shift.mean()
    size = float(np.square(inner).sum())
    whole = float(np.square(shift).sum())
    sums = np.outer(np.bincount(row, minlength=len(shift)), np.bincount(column, minlength=shift.shape[1]))
    expected = sums / max(1, row.size)
    # E is no constant along rows or columns, so its product with the inner shift does not vanish.
    square, constant = float(np.square(expected).sum()), float((inner * expected).sum())

    def pearson(row: IntArray) -> float:
        place, count = np.unique(row * shift.shape[1] + column, return_counts=True)
        # Sum over all pairs of (C - E)^2 and of D (C - E), of which only a few have a count.
        spread = square + float((count * (count - 2 * expected.reshape(-1)[place])).sum())
        product = float(inner.reshape(-1)[place] @ count) - constant
        return product / np.sqrt(spread * size) if spread > 0 and size > 0 else np.nan

    if not row.size or size == 0:
        return Alignment(*[np.nan] * 6)
    found = pearson(row)
    null = np.array([pearson(rng.permutation(row)) for _ in range(n_permutations)])
    beyond = -sums  # N (C - E), whole numbers, so that ties are ties
    np.add.at(beyond, (row, column), row.size)
    ranks = float(stats.spearmanr(inner, beyond, axis=None).statistic) if np.ptp(beyond) > 0 else np.nan
    p_value = (1 + int((null >= found).sum())) / (1 + n_permutations)
    return Alignment(found, ranks, float(null.mean()), float(null.std()), p_value, 1 - size / whole)


def _product(weights: list[Any], lines: IntArray, columns: IntArray) -> FloatArray:
    head, embedding = (np.asarray(one, dtype=np.float64) for one in weights)
    product: FloatArray = head[lines] @ embedding[columns].T
    return product


def _texts_between(trace: Trace, first: int, last: int) -> IntArray:
    step = trace.occurrences["step"].to_numpy()
    sample = trace.occurrences["sample_id"].to_numpy()[(step >= first) & (step < last)]
    return np.asarray(trace.inputs(sample))


def _frequent_pairs(texts: IntArray, most: int) -> tuple[IntArray, IntArray, tuple[IntArray, IntArray]]:
    """Return the most frequent first and next tokens, and row and column of each bigram of these."""
    first, following = texts[:, :-1].reshape(-1), texts[:, 1:].reshape(-1)
    held = (first >= 0) & (following >= 0)
    first, following = first[held], following[held]
    columns, lines = (_most_frequent(tokens, most) for tokens in (first, following))
    inside = np.isin(first, columns) & np.isin(following, lines)
    return columns, lines, (np.searchsorted(lines, following[inside]), np.searchsorted(columns, first[inside]))


def _most_frequent(tokens: IntArray, most: int) -> IntArray:
    token, count = np.unique(tokens, return_counts=True)
    return np.sort(token[np.argsort(-count, kind="stable")[:most]])

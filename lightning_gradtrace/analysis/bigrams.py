"""Which pairs of tokens did a step bring together (docs/concepts.md, 5, bigram shift)?"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._bootstrap import FloatArray

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

Matrix = npt.NDArray[np.floating]

# Rows and columns of a block of products: 4 or 8 bytes each pair.
_BLOCK = 2048


def bigram_shifts(
    trace: Trace,
    embedding: str,
    head: str | None = None,
    *,
    n: int = 20,
    summed: bool = False,
    steps: slice | None = None,
) -> pd.DataFrame:
    """List the pairs (token, next token) whose direct score changed most between weight snapshots.

    An embedding E (V x d) followed at once by an output head U (V x d) scores token v after token t by
    M[v, t] = U[v] . E[t]. The shift of M over one or several steps is exactly dU E' + U dE' + dU dE'; summed over a
    range it is the difference between its ends. The product V x V is never formed: blocks of it are, and only those
    that can hold one of the largest values, by a bound on their rows and columns.

    With `weights_every_n_steps=1` neighbouring snapshots are one step apart; otherwise as many as lie between them.
    What lies between E and U in the model (blocks, normalisation, biases) is not part of M.

    Args:
        trace: an open trace with weight snapshots.
        embedding: name of the embedding's weight, (vocabulary, width).
        head: name of the output head's weight, (vocabulary, width); None where it is tied to the embedding.
        n: how many pairs for each span of steps.
        summed: one span from the first to the last snapshot of `steps`, instead of one between each two neighbours.
        steps: snapshots to look at, a slice of step numbers that holds both its ends; None for all.

    Returns:
        One row per span and pair, spans in order, the largest |shift| first, ties by token: `first_step`, `last_step`
        (the steps from the first to the one before `last_step` made the change), `rank`, `token`, `next_token`,
        `text`, `next_text`, `shift`.

    Raises:
        ValueError: fewer than two snapshots in `steps`, `n` below 1, or weights that don't fit each other.
        KeyError: the trace has no weights of this name.

    Source: docs/concepts.md, 5, the tables at its end. `shift` is in units of the score.
    """
    inside = snapshots_in(trace, steps)
    inside = [inside[0], inside[-1]] if summed else inside
    head = embedding if head is None else head
    parts = []
    for first, last in pairwise(inside):
        before, after = ((trace.weights(head, step), trace.weights(embedding, step)) for step in (first, last))
        table = largest_pairs(*before, *after, n=n)
        parts.append(table.assign(first_step=first, last_step=last))
    found = pd.concat(parts, ignore_index=True)
    for name, text in (("token", "text"), ("next_token", "next_text")):
        found[text] = pd.Series(_access.words(trace.vocab, found[name].to_numpy()), dtype=str)
    return found[["first_step", "last_step", "rank", "token", "next_token", "text", "next_text", "shift"]]


def snapshots_in(trace: Trace, steps: slice | None = None) -> list[int]:
    """Return the steps before which weights were stored.

    Args:
        trace: an open trace.
        steps: a slice of step numbers that holds both its ends; None for all.

    Raises:
        ValueError: fewer than two, so that no shift lies between them.
    """
    from lightning_gradtrace.store.steps import step_numbers

    known = trace.weight_steps
    inside = known if steps is None else np.intersect1d(known, step_numbers(steps, pd.Index(known)))
    if len(inside) < 2:
        raise ValueError(
            f"`steps` holds {len(inside)} of the snapshots before the steps {known.tolist()}, expected 2 or more: a "
            "shift lies between two; record with `GradTrace(..., weights_every_n_steps=...)`"
        )
    return [int(step) for step in inside]


def largest_pairs(
    head: Matrix, embedding: Matrix, new_head: Matrix, new_embedding: Matrix, n: int = 20
) -> pd.DataFrame:
    """Find the largest entries of `new_head @ new_embedding.T - head @ embedding.T` block by block.

    Args:
        head: U (V, d) before.
        embedding: E (V, d) before.
        new_head: U afterwards.
        new_embedding: E afterwards.
        n: how many.

    Returns:
        `rank`, `token` (row of E), `next_token` (row of U), `shift`; the largest absolute value first, ties by token,
        then by next token. Zeros are left out.

    Raises:
        ValueError: shapes that don't fit, values that are not finite, or `n` below 1.

    Example:
        >>> before, after = np.eye(3), np.eye(3)
        >>> after[2, 0] = 0.5
        >>> largest_pairs(np.eye(3), before, np.eye(3), after)
           rank  token  next_token  shift
        0     1      2           0    0.5
    """
    shapes = [np.shape(a) for a in (head, embedding, new_head, new_embedding)]
    if any(len(s) != 2 for s in shapes) or shapes[:2] != shapes[2:] or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"head {shapes[0]} and embedding {shapes[1]} before, {shapes[2]} and {shapes[3]} afterwards: expected "
            "(vocabulary, width) each, of one width"
        )
    _access.check_count("n", n, of="pairs")
    # dU E' + U_after dE': two products without the cancellation of the difference of two.
    d_head, d_embedding = new_head - head, new_embedding - embedding
    left = np.concatenate([d_head, new_head], axis=1)
    right = np.concatenate([embedding, d_embedding], axis=1)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError(
            "head or embedding hold values that are not finite; take snapshots from before the training broke"
        )
    norms = [
        [np.linalg.norm(a.astype(np.float64), axis=1) for a in pair]
        for pair in ((d_head, new_head), (embedding, d_embedding))
    ]
    rows, columns = (
        _blocks(np.argsort(-(pair[k] + 1e-300), kind="stable")) for pair, k in ((norms[0], 0), (norms[1], 1))
    )
    best = _Largest(n)
    # Cauchy-Schwarz on each of the two products, widened by the rounding of float32 sums.
    bound = [
        [sum(norms[0][k][r].max() * norms[1][k][c].max() for k in range(2)) * (1 + 1e-3) for c in columns] for r in rows
    ]
    order = np.argsort(-np.array(bound).reshape(-1), kind="stable")
    for place in order.tolist():
        i, j = divmod(place, len(columns))
        if bound[i][j] < best.floor or bound[i][j] == 0:
            break
        best.add(left[rows[i]] @ right[columns[j]].T, rows[i], columns[j])
    next_token, token, shift = best.result()
    return pd.DataFrame(
        {"rank": np.arange(1, token.size + 1), "token": token, "next_token": next_token, "shift": shift}
    )


def _blocks(order: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    return [order[start : start + _BLOCK] for start in range(0, order.size, _BLOCK)]


class _Largest:
    """The n entries of largest absolute value among blocks of a matrix."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._row = self._column = np.zeros(0, np.int64)
        self._value: FloatArray = np.zeros(0)
        self.floor = 0.0

    def add(self, block: Matrix, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> None:
        size = np.abs(block)
        limit = max(self.floor, np.finfo(np.float64).tiny)
        if size.size > self._n:
            limit = max(limit, float(np.partition(size.reshape(-1), -self._n)[-self._n]))
        i, j = np.nonzero(size >= limit)
        row, column = np.concatenate([self._row, rows[i]]), np.concatenate([self._column, columns[j]])
        value = np.concatenate([self._value, block[i, j].astype(np.float64)])
        keep = np.lexsort([row, column, -np.abs(value)])[: self._n]
        self._row, self._column, self._value = row[keep], column[keep], value[keep]
        if keep.size == self._n:
            self.floor = float(np.abs(self._value[-1]))

    def result(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], FloatArray]:
        return self._row, self._column, self._value

"""The baseline of the post: which neurons are active on a token, and which samples activate a neuron most?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Entries, IntArray, Steps
from lightning_gradtrace.analysis._activation import activations
from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis._grid import check_neuron
from lightning_gradtrace.analysis._ranking import LargestOfRows, ranks
from lightning_gradtrace.analysis._texts import read_texts
from lightning_gradtrace.analysis.movement import movers

if TYPE_CHECKING:
    from torch import nn

    from lightning_gradtrace.analysis.predictions import Forward
    from lightning_gradtrace.store import Trace


def activation_baseline(
    trace: Trace,
    model: nn.Module,
    neurons: pd.DataFrame,
    *,
    n_samples: int | None = None,
    batch_size: int = 32,
    forward: Forward | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank each neuron by its mean activation on its notable tokens, among all neurons of its weight.

    The activation is that of the object which an ablation switches off: for a column (`axis="in"`) the input
    coordinate that the weight W receives, for a row the output coordinate of W x (without bias). For every notable
    token, the mean activation of every column (or row) of W over the positions at which the token stands.

    If attribution by shifts only found what activations show, flagged neurons would rank first or last. What can
    mislead: a neuron with a large mean on all tokens ranks high on each; `mean_all` tells.

    Args:
        trace: an open trace with inputs.
        model: the trained model.
        neurons: rows of the table of `neurons`, with their notable `tokens`.
        n_samples: texts to run, drawn at random; None for all.
        batch_size: samples at once.
        forward: callable(model, tokens) -> anything, with tokens (sample, position); None calls `model(tokens)`.
        seed: of the draw.

    Returns:
        One row per neuron and notable token that occurs in these texts: `param`, `axis`, `neuron`, `token`, `text`,
        `positions` (at which the token stands), `mean` (activation on them), `mean_all` (on all positions),
        `rank_high` (1: no neuron of this weight has a larger mean on the token), `rank_low`, `n_neurons`.

    Raises:
        ValueError: no inputs, neurons that trace or model don't have, a weight that is used more than once in a
            forward pass or in a function whose input can't be told.

    Source: the activation baseline of the post; docs/concepts.md, 5.
    """
    missing = {"param", "axis", "neuron", "tokens"} - set(neurons.columns)
    if missing:
        raise ValueError(f"`neurons` lacks the columns {sorted(missing)}; pass rows of the table of `neurons`")
    tokens = _texts(trace, n_samples, seed)
    wanted = np.unique([int(t) for one in neurons["tokens"] for t in one]).astype(np.int64)
    rows = []
    for (param, axis), part in neurons.groupby(["param", "axis"], sort=False):
        for neuron in part["neuron"]:
            check_neuron(trace, str(param), int(neuron), str(axis))
        total, count, everything, n_positions = _means(
            activations(model, tokens, str(param), str(axis), batch_size, forward), tokens, wanted
        )
        for one in part.to_dict("records"):
            for token in one["tokens"]:
                at = int(np.searchsorted(wanted, token))
                if not count[at]:
                    continue
                mean, neuron = total[at] / count[at], int(one["neuron"])
                rows.append(
                    {
                        "param": param,
                        "axis": axis,
                        "neuron": neuron,
                        "token": int(token),
                        "text": _access.words(trace.vocab, np.array([token]))[0],
                        "positions": int(count[at]),
                        "mean": mean[neuron],
                        "mean_all": everything[neuron] / n_positions,
                        "rank_high": int((mean > mean[neuron]).sum()) + 1,
                        "rank_low": int((mean < mean[neuron]).sum()) + 1,
                        "n_neurons": mean.size,
                    }
                )
    columns = ["param", "axis", "neuron", "token", "text", "positions", "mean", "mean_all", "rank_high", "rank_low"]
    return pd.DataFrame(rows, columns=[*columns, "n_neurons"])


def top_samples(
    trace: Trace,
    model: nn.Module,
    neurons: pd.DataFrame,
    entries: Entries | None = None,
    *,
    n: int = 10,
    n_samples: int | None = None,
    batch_size: int = 32,
    forward: Forward | None = None,
    seed: int = 0,
    steps: Steps = None,
) -> pd.DataFrame:
    """List the samples that activate each neuron most beside those that moved it most.

    Args:
        trace: an open trace with a `TopK` record and inputs.
        model: the trained model.
        neurons: table with the columns `param`, `axis`, `neuron`.
        entries: count the shifts of these entries only; None for all.
        n: samples of each kind.
        n_samples: texts to run for activations, drawn at random; None for all.
        batch_size: samples at once.
        forward: as in `activation_baseline`.
        seed: of the draw.
        steps: steps whose shifts count; None for all.

    Returns:
        `param`, `axis`, `neuron`, `kind` ("activation": largest absolute value at any position, with its sign;
        "shift": sum of |s|), `rank`, `sample_id`, `value`, `position` (of the activation; -1 for shifts), `both`
        (whether the sample is in the neuron's list of the other kind too), `text` (of the sample).

    Raises:
        ValueError: as in `activation_baseline`, or `n` below 1.

    Source: the activation baseline of the post, by sample; docs/concepts.md, 5.
    """
    _access.check_count("n", n, of="samples")
    texts = read_texts(trace)
    chosen = _draw(len(texts.tokens), n_samples, seed)
    parts = []
    for (param, axis), part in neurons.groupby(["param", "axis"], sort=False):
        numbers = part["neuron"].to_numpy(np.int64)
        for neuron in numbers.tolist():
            check_neuron(trace, str(param), neuron, str(axis))
        best = LargestOfRows(len(numbers), n)
        for rows, values in activations(model, texts.tokens[chosen], str(param), str(axis), batch_size, forward):
            mine = values[:, :, numbers]
            at = np.abs(mine).argmax(axis=1)  # (sample, neuron)
            value = np.take_along_axis(mine, at[:, None], axis=1)[:, 0]
            row = np.tile(np.arange(len(numbers)), len(rows))
            sample = np.repeat(chosen[rows], len(numbers))
            best.add(row, np.abs(value).reshape(-1).astype(np.float64), value.reshape(-1), sample, at.reshape(-1))
        row, _, value, sample, position = best.result(3)
        keys = {"param": param, "axis": axis, "neuron": numbers[row]}
        ids = texts.sample_id[sample]
        active = {"kind": "activation", "rank": ranks(row), "sample_id": ids, "value": value, "position": position}
        parts.append(pd.DataFrame({**keys, **active}))
        moved = movers(trace, _of_param(trace, str(param), entries), "neuron", n=n, axis=str(axis), steps=steps)
        moved = moved[moved["neuron"].isin(numbers)]
        moved = moved.assign(kind="shift", value=moved["moved"], position=-1)
        parts.append(moved[["param", "axis", "neuron", "kind", "rank", "sample_id", "value", "position"]])
    columns = ["param", "axis", "neuron", "kind", "rank", "sample_id", "value", "position"]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
    table["both"] = table.duplicated(["param", "axis", "neuron", "sample_id"], keep=False)
    shown = [" ".join(_access.words(trace.vocab, t[t >= 0])) for t in trace.inputs(table["sample_id"].to_numpy())]
    table["text"] = pd.Series(shown, dtype=str)
    return table.sort_values(["param", "axis", "neuron", "kind", "rank"], kind="stable", ignore_index=True)


def _of_param(trace: Trace, param: str, entries: Entries | None) -> IntArray:
    shape = _access.matrix(trace, param)
    own = np.arange(shape.offset, shape.offset + int(np.prod(shape.shape)))
    return own if entries is None else np.intersect1d(own, _access.entry_numbers(trace, entries))


def _draw(size: int, n_samples: int | None, seed: int) -> IntArray:
    if n_samples is not None and n_samples < 1:
        raise ValueError(f"`n_samples` is {n_samples}, expected 1 or more, or None for all")
    if n_samples is None or n_samples >= size:
        return np.arange(size)
    return np.sort(np.random.default_rng(seed).choice(size, size=n_samples, replace=False))


def _texts(trace: Trace, n_samples: int | None, seed: int) -> IntArray:
    texts = read_texts(trace)
    return texts.tokens[_draw(len(texts.tokens), n_samples, seed)]


def _means(
    values: Iterator[tuple[IntArray, FloatArray]], tokens: IntArray, wanted: IntArray
) -> tuple[FloatArray, IntArray, FloatArray, int]:
    """Return sums (token, neuron), counts (token,), the sum over everything (neuron,) and the number of positions."""
    total, everything = np.zeros((wanted.size, 0)), np.zeros(0)
    count, n_positions = np.zeros(wanted.size, dtype=np.int64), 0
    for rows, found in values:
        here = tokens[rows, : found.shape[1]]
        flat = found.reshape(-1, found.shape[-1]).astype(np.float64)
        if not n_positions:
            total, everything = np.zeros((wanted.size, flat.shape[1])), np.zeros(flat.shape[1])
        everything += flat.sum(axis=0)
        n_positions += len(flat)
        place = np.searchsorted(wanted, here.reshape(-1))
        match: IntArray = np.flatnonzero(np.isin(here.reshape(-1), wanted))
        np.add.at(total, place[match], flat[match])
        count += np.bincount(place[match], minlength=wanted.size)
    return total, count, everything, n_positions

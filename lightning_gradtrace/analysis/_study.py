"""A neuron, the samples attributed to it and the draw among them: what ablations and controls go through."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Entries, IntArray
from lightning_gradtrace.analysis._texts import Texts, read_texts, text_rows
from lightning_gradtrace.analysis.interventions import named_parameter
from lightning_gradtrace.analysis.neurons import attributed_samples
from lightning_gradtrace.analysis.predictions import Predictor

if TYPE_CHECKING:
    from torch import nn

    from lightning_gradtrace.analysis.predictions import Forward
    from lightning_gradtrace.store import Trace

KEYS = ["param", "module", "axis", "neuron"]


@dataclass(frozen=True)
class Study:
    """One neuron under study.

    Attributes:
        keys: `param`, `module`, `axis`, `neuron`: the first columns of every table.
        tokens: ascending ids of its notable tokens.
        attributed: all distinct samples attributed to it, rows of the predictor's texts, in random order.
        rows: those drawn, the first ones of `attributed`.
        rng: randomness of its own, the same whatever other neurons are studied.
    """

    keys: dict[str, Any]
    tokens: IntArray
    attributed: IntArray
    rows: IntArray
    rng: np.random.Generator

    @property
    def neuron(self) -> tuple[str, int, str]:
        """What `Predictor` ablates."""
        return self.keys["param"], self.keys["neuron"], self.keys["axis"]


def predictor_of(trace: Trace, model: nn.Module | Predictor, batch_size: int, forward: Forward | None) -> Predictor:
    """Return the predictor itself, or one for this model and the trace's texts.

    Raises:
        ValueError: the predictor has other texts than the trace.
    """
    texts = read_texts(trace)
    if not isinstance(model, Predictor):
        return Predictor(model, texts.tokens, batch_size=batch_size, forward=forward)
    if not np.array_equal(model.tokens, texts.tokens):
        raise ValueError(
            f"the `Predictor` has texts of shape {model.tokens.shape} that differ from those of the trace, "
            f"{texts.tokens.shape}; make it with `Predictor(model, trace.tokens()[1])`"
        )
    return model


def studies(
    trace: Trace,
    predictor: Predictor,
    neurons: pd.DataFrame,
    entries: Entries,
    *,
    n_samples: int,
    seed: int,
    links: IntArray | None = None,
    texts: Texts | None = None,
) -> Iterator[Study]:
    """Yield each neuron of a table with its attributed samples.

    Raises:
        ValueError: a column is missing, `n_samples` below 1, a parameter that the model doesn't have in the trace's
            shape, or as in `attributed_samples`.
    """
    missing = {"param", "axis", "neuron", "tokens"} - set(neurons.columns)
    if missing:
        raise ValueError(f"`neurons` lacks the columns {sorted(missing)}; pass rows of the table of `neurons`")
    if n_samples < 1:
        raise ValueError(f"`n_samples` is {n_samples}, expected 1 or more")
    texts = read_texts(trace) if texts is None else texts
    of_occurrence = text_rows(trace, texts, links)
    table = attributed_samples(trace, entries, neurons, links=links)
    place, occurrence = table["place"].to_numpy(), table["occurrence"].to_numpy()
    start = np.searchsorted(place, np.arange(len(neurons) + 1))
    for at, row in enumerate(neurons.to_dict("records")):
        param, axis, neuron = str(row["param"]), str(row["axis"]), int(row["neuron"])
        keys = {"param": param, "module": _check_model(trace, predictor.model, param), "axis": axis, "neuron": neuron}
        rng = np.random.default_rng([seed, zlib.crc32(param.encode()), int(axis == "out"), neuron])
        attributed = rng.permutation(np.unique(of_occurrence[occurrence[start[at] : start[at + 1]]]))
        tokens = np.unique(np.asarray(row["tokens"], dtype=np.int64))
        yield Study(keys, tokens, attributed, attributed[:n_samples], rng)


def _check_model(trace: Trace, model: nn.Module, param: str) -> str:
    """Return the module that owns a parameter, after comparing its shape in the model with that in the trace."""
    tracked = _access.matrix(trace, param)
    shape = tuple(named_parameter(model, param).shape)
    if shape != tracked.shape:
        raise ValueError(
            f"`{param}` has shape {shape} in `{type(model).__name__}`, but {tracked.shape} in the trace; pass the "
            "model that was trained while the trace was recorded"
        )
    return tracked.module

"""A neuron, head or entry, its samples and the draw among them: what ablations and controls go through."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Entries, IntArray
from lightning_gradtrace.analysis._components import Component, Components
from lightning_gradtrace.analysis._texts import Texts, read_texts, text_rows
from lightning_gradtrace.analysis.components import attributed_samples
from lightning_gradtrace.analysis.interventions import named_parameter
from lightning_gradtrace.analysis.predictions import Predictor

if TYPE_CHECKING:
    from torch import nn

    from lightning_gradtrace.analysis.predictions import Forward
    from lightning_gradtrace.analysis.switches import Switch
    from lightning_gradtrace.store import Trace


@dataclass(frozen=True)
class Study:
    """One component under study.

    Attributes:
        component: what it is.
        tokens: ascending ids of its notable tokens.
        attributed: all distinct samples attributed to it, rows of the predictor's texts, in random order.
        rows: those drawn, the first ones of `attributed`.
        rng: randomness of its own, the same whatever else is studied.
    """

    component: Component
    tokens: IntArray
    attributed: IntArray
    rows: IntArray
    rng: np.random.Generator

    @property
    def keys(self) -> dict[str, Any]:
        """What names the component: the first columns of every table."""
        return self.component.keys

    @property
    def switch(self) -> Switch:
        """What `Predictor` switches off."""
        return self.component.switch


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
    table: pd.DataFrame,
    entries: Entries,
    *,
    heads: pd.DataFrame | None,
    n_samples: int,
    seed: int,
    links: IntArray | None = None,
    texts: Texts | None = None,
) -> Iterator[Study]:
    """Yield each component of a table with its attributed samples.

    Raises:
        ValueError: a column is missing, `n_samples` below 1, a parameter that the model doesn't have in the trace's
            shape, or as in `attributed_samples`.
    """
    if "tokens" not in table.columns:
        raise ValueError(
            f"the table has the columns {list(table.columns)}, but lacks `tokens`; pass rows of `neurons` "
            "or `components`"
        )
    _access.check_count("n_samples", n_samples)
    texts = read_texts(trace) if texts is None else texts
    of_occurrence = text_rows(trace, texts, links)
    samples = attributed_samples(trace, entries, table, heads=heads, links=links)
    place, occurrence = samples["place"].to_numpy(), samples["occurrence"].to_numpy()
    start = np.searchsorted(place, np.arange(len(table) + 1))
    for at, (component, notable) in enumerate(zip(Components(trace, table, heads), table["tokens"], strict=True)):
        for param in component.switch.params:
            _check_model(trace, predictor.model, param)
        rng = np.random.default_rng([seed, *_seed_words(component.keys)])
        attributed = rng.permutation(np.unique(of_occurrence[occurrence[start[at] : start[at + 1]]]))
        tokens = np.unique(np.asarray(notable, dtype=np.int64))
        yield Study(component, tokens, attributed, attributed[:n_samples], rng)


def _seed_words(keys: dict[str, Any]) -> list[int]:
    axes = {"in": 0, "out": 1}
    named = [value for name, value in keys.items() if name != "module" or "neuron" not in keys]
    return [axes.get(v, zlib.crc32(v.encode())) if isinstance(v, str) else int(v) for v in named]


def _check_model(trace: Trace, model: nn.Module, param: str) -> None:
    """Raise unless a parameter has the same shape in the model as in the trace."""
    tracked = _access.shape_of(trace, param)
    shape = tuple(named_parameter(model, param).shape)
    if shape != tracked.shape:
        raise ValueError(
            f"`{param}` has shape {shape} in `{type(model).__name__}`, but {tracked.shape} in the trace; pass the "
            "model that was trained while the trace was recorded"
        )

"""What can be switched off in a model: neurons, attention heads, single entries, as sets of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis.heads import COLUMNS as HEAD_COLUMNS
from lightning_gradtrace.analysis.interventions import named_parameter

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Switch:
    """Weights that are switched off together.

    Attributes:
        keys: what names them in tables: `param`, `axis`, `neuron` of a neuron, and so on.
        parts: name of a parameter and the index into it (as in NumPy: slices and numbers) of the weights.
    """

    keys: dict[str, Any]
    parts: tuple[tuple[str, tuple[slice | int, ...]], ...]

    @property
    def name(self) -> str:
        """Equal for equal weights."""
        return repr(self.parts)

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters, each once, ascending."""
        return tuple(sorted({name for name, _ in self.parts}))

    def mask(self, param: str, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Return 0 where a weight is switched off and 1 elsewhere, of the parameter's shape."""
        mask = np.ones(shape, dtype=bool)
        for name, index in self.parts:
            if name == param:
                mask[index] = False
        return mask


def neuron_switch(param: str, neuron: int, axis: str = "in") -> Switch:
    """Return the column (`axis="in"`) or row ("out") of a weight (out, in)."""
    _access.check_axis(axis)
    neuron = int(neuron)  # of NumPy's numbers the names would differ
    index: tuple[slice | int, ...] = (slice(None), neuron) if axis == "in" else (neuron,)
    return Switch({"param": param, "axis": axis, "neuron": neuron}, ((param, index),))


def head_switch(blocks: pd.DataFrame) -> Switch:
    """Return rows of `attention_heads` that belong to one head, as one switch."""
    pieces = tuple(
        (str(one["param"]), (*[slice(None)] * int(one["axis"]), slice(int(one["start"]), int(one["stop"]))))
        for one in blocks.to_dict("records")
    )
    first = blocks.iloc[0]
    return Switch({"module": str(first["module"]), "head": int(first["head"])}, pieces)


def entry_switch(param: str, index: int) -> Switch:
    """Return a single entry by its flat index, which `resolve` turns into coordinates."""
    return Switch({"param": param, "index": index}, ((param, (index,)),))


def switches_of(what: pd.DataFrame | Sequence[Switch]) -> list[Switch]:
    """Turn a table into switches, one for each row (of heads: one for each head).

    Args:
        what: a table with the columns `param`, `axis`, `neuron` (of `neurons`), `module`, `head`, `part`, ... (of
            `attention_heads`: all its parts together; select the rows of one part to switch off that part), or
            `param`, `index`, `shape`, or `param`, `index` (of `frequent_entries`).

    Raises:
        ValueError: the columns are none of these, or the table is empty.
    """
    if not isinstance(what, pd.DataFrame):
        return list(what)
    columns = set(what.columns)
    if {"param", "axis", "neuron"} <= columns:
        names = zip(what["param"].astype(str), what["neuron"], what["axis"].astype(str), strict=True)
        return [neuron_switch(param, neuron, axis) for param, neuron, axis in names]
    if set(HEAD_COLUMNS) <= columns:
        return [head_switch(part) for _, part in what.groupby(["module", "head"], sort=False)]
    if {"param", "index"} <= columns:
        pairs = zip(what["param"].astype(str), what["index"], strict=True)
        return [entry_switch(param, int(index)) for param, index in pairs]
    raise ValueError(
        f"a table with the columns {list(what.columns)} names nothing to switch off; pass rows of `neurons`, "
        "`attention_heads` or `frequent_entries`"
    )


def resolve(model: nn.Module, switches: Sequence[Switch]) -> list[Switch]:
    """Check switches against a model, and turn flat indices of entries into coordinates.

    Raises:
        ValueError: no such parameter, or an index outside it.
    """
    found = []
    for switch in switches:
        parts = []
        for name, index in switch.parts:
            shape = tuple(named_parameter(model, name).shape)
            if "index" in switch.keys and len(index) == 1:
                flat = index[0]
                if not isinstance(flat, int) or not 0 <= flat < int(np.prod(shape)):
                    raise ValueError(f"`{name}` of this model has shape {shape}, so no entry of index {flat}")
                index = tuple(int(i) for i in np.unravel_index(flat, shape))
            if "neuron" in switch.keys and len(shape) != 2:
                raise ValueError(f"`{name}` has shape {shape}; only parameters of shape (out, in) have neurons")
            for at, size in zip(index, shape, strict=False):
                last = at if isinstance(at, int) else (at.stop or size) - 1
                if not 0 <= last < size:
                    raise ValueError(f"`{name}` of this model has shape {shape}, which doesn't hold {switch.keys}")
            parts.append((name, index))
        found.append(Switch(switch.keys, tuple(parts)))
    return found

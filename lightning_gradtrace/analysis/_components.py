"""What is studied and switched off as one thing: a neuron, an attention head or a part of it, a single entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import IntArray
from lightning_gradtrace.analysis._grid import check_neuron
from lightning_gradtrace.analysis._groups import groups_of
from lightning_gradtrace.analysis.switches import Switch, entry_switch, head_switch, neuron_switch

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

# Columns that name a component of each kind. The first kind whose columns a table has is what it holds.
KINDS = {
    "neuron": ("param", "axis", "neuron"),
    "head_part": ("module", "head", "part", "param"),
    "head": ("module", "head"),
    "entry": ("param", "index"),
}
# The first columns of every table about them.
KEYS = KINDS | {"neuron": ("param", "module", "axis", "neuron"), "entry": ("entry", "param", "index")}


@dataclass(frozen=True)
class Component:
    """One component.

    Attributes:
        keys: the columns that name it in tables.
        switch: its weights.
        number: its own number among `n_siblings` of its kind in the same parameter (heads: in the same module).
        n_siblings: how many there are, itself included.
        sibling: makes the switch of one of them from its number.
    """

    keys: dict[str, Any]
    switch: Switch
    number: int
    n_siblings: int
    sibling: Callable[[int], Switch]

    def peers(self, n: int, rng: np.random.Generator) -> list[Switch]:
        """Draw others of its kind without replacement, all of them if there are fewer than `n`."""
        drawn = rng.choice(self.n_siblings - 1, size=min(n, self.n_siblings - 1), replace=False)
        return [self.sibling(int(i) + int(i >= self.number)) for i in drawn]


class Components:
    """The components that a table names, one for each row.

    Args:
        trace: an open trace.
        table: rows of `neurons`, `components` or `frequent_entries`: with the columns of one of `KINDS`.
        heads: for heads, the table of `attention_heads`.

    Raises:
        ValueError: the table names none or names one twice, the trace doesn't have it, or `heads` is missing.
    """

    def __init__(self, trace: Trace, table: pd.DataFrame, heads: pd.DataFrame | None = None) -> None:
        self.by = kind_of(table)
        self._trace, self._table, self._heads = trace, table, heads
        if self.by in ("head", "head_part") and heads is None:
            raise ValueError("the table names attention heads, which needs `heads`; pass the table that they come from")
        columns = KINDS[self.by]
        self._names = [_named(row) for row in table[list(columns)].itertuples(index=False, name=None)]
        if len(set(self._names)) < len(self._names):
            raise ValueError(f"the table names some {_PLURAL[self.by]} twice, expected each once; drop the duplicates")
        if self.by == "neuron":
            for (param, axis), numbers in table.groupby(["param", "axis"], sort=False)["neuron"]:
                for neuron in {numbers.min(), numbers.max()}:
                    check_neuron(trace, str(param), int(neuron), str(axis))

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the columns in `Component.keys`."""
        return KEYS[self.by]

    def __len__(self) -> int:
        """Number of components."""
        return len(self._names)

    def __iter__(self) -> Iterator[Component]:
        """Iterate over the components in the order of the table."""
        return map({"neuron": self._neuron, "entry": self._entry}.get(self.by, self._head), self._names)

    def entries(self, numbers: IntArray) -> list[tuple[IntArray, IntArray]]:
        """Find the entries that lie in the components.

        Args:
            numbers: global entry numbers, each once.

        Returns:
            Pairs of arrays entry (m,), place (m,): entry lies in the component of row number place. No entry is twice
            in one pair; columns and rows of one matrix, which share entries, make two pairs.
        """
        places = {name: place for place, name in enumerate(self._names)}
        found: list[tuple[IntArray, IntArray]] = []
        for axis in dict.fromkeys(self._table["axis"]) if self.by == "neuron" else ("in",):
            groups = groups_of(self._trace, numbers, self.by, axis=str(axis), heads=self._heads)
            names = groups.table[list(KINDS[self.by])].itertuples(index=False, name=None)
            at = np.array([places.get(_named(name), -1) for name in names], dtype=np.int64)
            place = at[groups.row] if at.size else np.zeros(0, dtype=np.int64)
            found.append((groups.entry[place >= 0], place[place >= 0]))
        return found

    def placed(self, notable: pd.DataFrame, numbers: IntArray) -> pd.DataFrame:
        """Return a table of notable tokens with a column `place`: the component that each row belongs to.

        Args:
            notable: from `notable_tokens`, of single entries (those of a component's entries are united) or of
                components of this kind.
            numbers: global entry numbers that components are made of.

        Raises:
            ValueError: the table is neither, or lacks a column.
        """
        names = KINDS[self.by]
        by_entry = "entry" in notable.columns
        missing = {"token", "text", "count", *(() if by_entry else names)} - set(notable.columns)
        if missing:
            raise ValueError(
                f"`notable` lacks the columns {sorted(missing)}; pass the table of `notable_tokens`, of entries or "
                f'`by="{self.by}"`'
            )
        if by_entry:
            pairs = [pd.DataFrame({"entry": entry, "place": place}) for entry, place in self.entries(numbers)]
            return notable.merge(pd.concat(pairs) if pairs else pd.DataFrame({"entry": [], "place": []}), on="entry")
        places = pd.DataFrame(self._names, columns=list(names)).assign(place=np.arange(len(self)))
        return notable.merge(places, on=list(names))

    def _neuron(self, name: tuple[Any, ...]) -> Component:
        param, axis, neuron = name
        matrix = _access.matrix(self._trace, param)
        keys = {"param": param, "module": matrix.module, "axis": axis, "neuron": neuron}
        size = matrix.shape[1 if axis == "in" else 0]
        switch = neuron_switch(param, neuron, axis)
        return Component(keys, switch, neuron, size, lambda n: neuron_switch(param, n, axis))

    def _entry(self, name: tuple[Any, ...]) -> Component:
        param, index = name
        known = _access.shape_of(self._trace, param)
        size = int(np.prod(known.shape))
        if not 0 <= index < size:
            raise ValueError(f"`{param}` has shape {known.shape}, so entries 0 to {size - 1}, but `index` is {index}")
        keys = {"entry": known.offset + index, "param": param, "index": index}
        return Component(keys, entry_switch(param, index), index, size, lambda n: entry_switch(param, n))

    def _head(self, name: tuple[Any, ...]) -> Component:
        """Compare a head with those of its module that have the same parts: grouped keys and values lie in few."""
        assert self._heads is not None
        keys = dict(zip(KINDS[self.by], name, strict=True))
        same = self._heads["module"] == keys["module"]
        for column in ("part", "param") if self.by == "head_part" else ():
            same &= self._heads[column] == keys[column]
        blocks = {int(str(head)): part for head, part in self._heads[same].groupby("head")}
        if keys["head"] not in blocks:
            raise ValueError(f"`heads` holds no {keys}; pass the table of `attention_heads` that it comes from")
        parts = sorted(blocks[keys["head"]]["part"])
        alike = [head for head, block in blocks.items() if sorted(block["part"]) == parts]

        def sibling(number: int) -> Switch:
            return head_switch(blocks[alike[number]])

        number = alike.index(keys["head"])
        return Component(keys, sibling(number), number, len(alike), sibling)


_PLURAL = {"neuron": "neurons", "head": "heads", "head_part": "parts of heads", "entry": "entries"}


def kind_of(table: pd.DataFrame) -> str:
    """Return what a table names: one of `KINDS`.

    Raises:
        ValueError: none of them.
    """
    for kind, columns in KINDS.items():
        if set(columns) <= set(table.columns):
            return kind
    raise ValueError(
        f"a table with the columns {list(table.columns)} names no neurons, heads or entries; pass rows of `neurons`, "
        "`components` or `frequent_entries`"
    )


def tokens_of(placed: pd.DataFrame, size: int) -> tuple[list[tuple[int, ...]], list[tuple[str, ...]]]:
    """Unite the notable tokens at each place, the one with the largest summed count first.

    Args:
        placed: from `Components.placed`.
        size: number of places.

    Returns:
        token ids and texts of every place.
    """
    tokens: list[tuple[int, ...]] = [()] * size
    text: list[tuple[str, ...]] = [()] * size
    table = placed.groupby(["place", "token"], as_index=False).agg(text=("text", "first"), count=("count", "sum"))
    table = table.sort_values(["place", "count", "token"], ascending=[True, False, True])
    for at, part in table.groupby("place"):
        tokens[int(str(at))] = tuple(part["token"].tolist())
        text[int(str(at))] = tuple(part["text"].tolist())
    return tokens, text


def _named(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value if isinstance(value, str) else int(value) for value in values)

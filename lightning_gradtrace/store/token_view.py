"""The TokenGrads record of a trace: what single loss tokens moved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.store.views import occurrences_of

if TYPE_CHECKING:
    from lightning_gradtrace.store.reader import Trace


class TokenGradsView:
    """Shifts of chosen loss tokens, group ``token_grads``.

    Args:
        trace: the trace.
    """

    group = "token_grads"

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    @property
    def k(self) -> int:
        """Entries kept per loss token."""
        return int(self._trace.array(f"{self.group}/index").shape[2])

    def tokens(self, steps: int | Iterable[int] | slice | None = None) -> pd.DataFrame:
        """Tabulate the loss tokens whose shifts were kept.

        Args:
            steps: number of a step, several of them, or a slice of them; None for all.

        Returns:
            One row per loss token: step, slot, sample_id, position, token, loss_token (its place in the arrays),
            occurrence, n_chosen (all chosen tokens of the occurrence).

        Raises:
            KeyError: if the trace has no such step.
        """
        rows = occurrences_of(self._trace, steps)
        position = self._read("position", rows)
        row, place = np.nonzero(position >= 0)
        occurrence = rows[row]
        where = self._trace.occurrences.iloc[occurrence]
        columns = {name: where[name].to_numpy() for name in ("step", "slot", "sample_id")}
        columns |= {"position": position[row, place], "token": self._read("token", rows)[row, place]}
        columns |= {"loss_token": place, "occurrence": occurrence, "n_chosen": self._read("n_chosen", rows)[row]}
        return pd.DataFrame(columns)

    def frame(self, steps: int | Iterable[int] | slice | None = None) -> pd.DataFrame:
        """Tabulate what was kept.

        Args:
            steps: number of a step, several of them, or a slice of them; None for all, which must fit into memory.

        Returns:
            One row per kept entry: step, slot, sample_id, position, token, param, index (flat, inside the parameter),
            shift, occurrence.

        Raises:
            KeyError: if the trace has no such step.
        """
        rows = occurrences_of(self._trace, steps)
        tokens = self.tokens(steps)
        at = np.searchsorted(rows, tokens["occurrence"].to_numpy()), tokens["loss_token"].to_numpy()
        repeated = tokens.loc[tokens.index.repeat(self.k), ["step", "slot", "sample_id", "position", "token"]]
        entries = self._trace.entries(self._read("index", rows)[at].reshape(-1).astype(np.int64))
        frame = repeated.reset_index(drop=True)
        frame["param"], frame["index"] = entries["param"].array, entries["index"].to_numpy()
        frame["shift"] = self._read("shift", rows)[at].reshape(-1)
        frame["occurrence"] = np.repeat(tokens["occurrence"].to_numpy(), self.k)
        return frame

    def _read(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Read the rows of an array; the occurrences of a step are neighbours, so most reads are of one slice."""
        array = self._trace.array(f"{self.group}/{name}")
        if not len(rows):
            return np.asarray(array[:0])
        start, stop = int(rows[0]), int(rows[-1]) + 1
        return np.asarray(array[start:stop])[rows - start]

"""The TokenGrads record of a trace: what single loss tokens moved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.store.record_view import Rows, array_of, read_rows
from lightning_gradtrace.store.views import chosen_steps

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
        self._rows = Rows(trace, self.group)

    @property
    def k(self) -> int:
        """Entries kept per loss token."""
        return int(array_of(self._trace, f"{self.group}/index").shape[2])

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
        kept = self._kept(steps)
        position = self._read("position", kept)
        row, place = np.nonzero(position >= 0)
        occurrence = kept[row]
        where = self._trace.occurrences.iloc[occurrence]
        columns = {name: where[name].to_numpy() for name in ("step", "slot", "sample_id")}
        columns |= {"position": position[row, place], "token": self._read("token", kept)[row, place]}
        columns |= {"loss_token": place, "occurrence": occurrence, "n_chosen": self._read("n_chosen", kept)[row]}
        return pd.DataFrame(columns)

    def shifts(self, steps: int | Iterable[int] | slice | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Read what was kept of each loss token, in the order of `tokens`.

        Args:
            steps: number of a step, several of them, or a slice of them; None for all, which must fit into memory.

        Returns:
            Global entry numbers and shifts, shape (loss token, k) each.

        Raises:
            KeyError: if the trace has no such step.
        """
        kept = self._kept(steps)
        at = np.nonzero(self._read("position", kept) >= 0)
        return self._read("index", kept)[at].astype(np.int64), self._read("shift", kept)[at]

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
        tokens, (entry, shift) = self.tokens(steps), self.shifts(steps)
        repeated = tokens.loc[tokens.index.repeat(self.k), ["step", "slot", "sample_id", "position", "token"]]
        entries = self._trace.entries(entry.reshape(-1))
        frame = repeated.reset_index(drop=True)
        frame["param"], frame["index"] = entries["param"].array, entries["index"].to_numpy()
        frame["shift"] = shift.reshape(-1)
        frame["occurrence"] = np.repeat(tokens["occurrence"].to_numpy(), self.k)
        return frame

    def _kept(self, steps: int | Iterable[int] | slice | None) -> np.ndarray:
        """Occurrences of the steps that the record was kept at, ascending."""
        of_row = self._trace.occurrences["step"].to_numpy()[self._rows.labels]
        return self._rows.labels[np.isin(of_row, chosen_steps(self._trace, steps))]

    def _read(self, name: str, occurrences: np.ndarray) -> np.ndarray:
        return read_rows(array_of(self._trace, f"{self.group}/{name}"), self._rows.of(occurrences))

"""The Norms record: how far each occurrence moved each parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.store.record_view import Rows, array_of, read_rows

if TYPE_CHECKING:
    from lightning_gradtrace.store.reader import Trace


class NormsView:
    """What a Norms record kept.

    Args:
        trace: the trace.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._array = array_of(trace, "norms/norm")
        self._rows = Rows(trace, "norms")

    @property
    def occurrence(self) -> np.ndarray:
        """Occurrence of every row, shape (rows,)."""
        return self._rows.labels

    def frame(self, occurrences: Any = None) -> pd.DataFrame:
        """Tabulate the norms.

        Args:
            occurrences: numbers of occurrences; None for all that the record holds.

        Returns:
            One row per occurrence, one column per parameter: the Euclidean norm of the shift, in units of the weights.

        Raises:
            KeyError: if the record holds no such occurrence.
        """
        labels = self.occurrence if occurrences is None else np.atleast_1d(np.asarray(occurrences, np.int64))
        index = pd.Index(labels, name="occurrence")
        columns = pd.Index(self._trace.params["param"], name="param")
        return pd.DataFrame(read_rows(self._array, self._rows.of(labels)), index, columns)

    def total(self, occurrences: Any = None) -> pd.Series[Any]:
        """Return the Euclidean norm over all tracked parameters together, by occurrence.

        Args:
            occurrences: as in `frame`.

        Raises:
            KeyError: if the record holds no such occurrence.
        """
        frame = self.frame(occurrences)
        return pd.Series(np.linalg.norm(frame.to_numpy(np.float64), axis=1), frame.index, name="norm")

"""The first steps of the method, which several commands share: entries, their tokens, neurons."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from lightning_gradtrace.store import Trace


@dataclass(frozen=True)
class Chain:
    """Thresholds of the method (docs/concepts.md, 5), and what it is asked of: `by` as in `analysis.components`."""

    n_entries: int = 5000
    min_count: int = 20
    n_relative: int = 200
    n_notable: int = 5
    min_relative: float = 0.0
    axis: str = "in"
    steps: slice | int | None = None
    by: str = "neuron"
    heads: pd.DataFrame | None = None

    @property
    def find_tokens(self) -> Any:
        """`notable_tokens` with these thresholds, as controls want it."""
        from lightning_gradtrace import analysis

        whole: dict[str, Any] = {} if self.by in ("neuron", "entry") else {"by": self.by, "heads": self.heads}
        return partial(
            analysis.notable_tokens,
            min_count=self.min_count,
            n_relative=self.n_relative,
            n_notable=self.n_notable,
            min_relative=self.min_relative,
            **whole,
        )

    def entries(self, trace: Trace, client: Any = None) -> pd.DataFrame:
        """Return the most frequent entries."""
        from lightning_gradtrace import analysis

        return analysis.frequent_entries(trace, min(self.n_entries, trace.n_entries), self.steps, client=client)

    def components(
        self, trace: Trace, entries: pd.DataFrame, *, without_words: bool = False, client: Any = None
    ) -> pd.DataFrame:
        """Return the neurons, heads, parts of heads or entries with their notable tokens.

        Args:
            trace: the trace.
            entries: from `entries`.
            without_words: of a trace that keeps no inputs, return them without words instead of raising.
            client: a `dask.distributed.Client`, or None.
        """
        from lightning_gradtrace import analysis

        if without_words and not trace.committed["sample"]:
            notable = analysis.no_tokens()
        else:
            notable = self.find_tokens(trace, entries, steps=self.steps, client=client)
        options: dict[str, Any] = {"axis": self.axis, "heads": self.heads, "steps": self.steps, "client": client}
        return analysis.components(trace, entries, notable, self.by, **options)

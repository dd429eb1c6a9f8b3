"""The cursor: how far a trace has been written, as a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_gradtrace.store.target import StoreError


@dataclass(frozen=True)
class Cursor:
    """How far a trace has been written: a place to go on from.

    Example:
        >>> cursor = Cursor({"step": 2, "occurrence": 8}, {"inputs/tokens": 7}, "3f2a")
        >>> Cursor.from_state(cursor.state()) == cursor
        True

    Attributes:
        rows: number of rows by axis, as in the root attribute ``committed``.
        widths: columns of the arrays whose second axis grows, by path.
        run_id: which run wrote the trace, None if it had no id.
    """

    rows: dict[str, int]
    widths: dict[str, int] = field(default_factory=dict)
    run_id: str | None = None

    def state(self) -> dict[str, Any]:
        """Return the cursor as numbers and text, which every checkpoint can hold."""
        return {"rows": dict(self.rows), "widths": dict(self.widths), "run_id": self.run_id}

    def of_root(self) -> Cursor:
        """Return the place in the root of a trace of several ranks, which has no rows of its own."""
        return Cursor(dict.fromkeys(("step", "occurrence", "sample", "snapshot"), 0), {}, self.run_id)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Cursor:
        """Read what `state` returned.

        Raises:
            StoreError: if it is something else.
        """
        try:
            rows = {str(axis): int(n) for axis, n in state["rows"].items()}
            widths = {str(path): int(n) for path, n in state["widths"].items()}
            return cls({**rows, "step": rows["step"]}, widths, state["run_id"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"the checkpoint holds no place of a trace to go on from ({type(error).__name__}: {error}); expected "
                "what `GradTrace` of this version wrote: give the callback a new path to begin a new trace"
            ) from error

"""The cursor: how far a trace has been written, as a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_gradtrace.store.schema import AXES
from lightning_gradtrace.store.target import StoreError


@dataclass(frozen=True)
class Cursor:
    """How far a trace has been written: a place to go on from.

    Example:
        >>> cursor = Cursor({"step": 2, "occurrence": 8, "sample": 5, "snapshot": 0}, last_step=1, token_width=7)
        >>> Cursor.from_state(cursor.state()) == cursor
        True

    Attributes:
        rows: number of rows by axis.
        last_step: number of the last step, -1 for none.
        token_width: columns of ``inputs/tokens``.
        run_id: which run wrote the trace, None if it had no id.
    """

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 0))
    last_step: int = -1
    token_width: int = 0
    run_id: str | None = None

    def state(self) -> dict[str, Any]:
        """Return the cursor as numbers and text, which every checkpoint can hold."""
        return {
            "rows": dict(self.rows),
            "last_step": self.last_step,
            "token_width": self.token_width,
            "run_id": self.run_id,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Cursor:
        """Read what `state` returned.

        Raises:
            StoreError: if it is something else.
        """
        try:
            rows = {axis: int(state["rows"][axis]) for axis in AXES}
            return cls(rows, int(state["last_step"]), int(state["token_width"]), state["run_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"the checkpoint holds no place of a trace to go on from ({type(error).__name__}: {error}); expected "
                "what `GradTrace` of this version wrote: give the callback a new path to begin a new trace"
            ) from error

"""What a checkpoint holds of a run that several ranks record: the state of each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_gradtrace.ranks.meeting import Ranks


def joint_state(ranks: Ranks, state: Callable[[], dict[str, Any]], failure: Exception | None = None) -> dict[str, Any]:
    """Return the states of all ranks, all of which call this; of a single process its own.

    Args:
        ranks: the ranks.
        state: gives the state of this one.
        failure: what went wrong on this one since the ranks last met.

    Raises:
        RankError: another rank can't give its state.
    """
    return state() if ranks.size == 1 else {"ranks": ranks.together(state, failure)}


def lone_state(ranks: Ranks, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of this rank alone, after something failed: nobody can be asked for theirs any more."""
    if ranks.size == 1:
        return state
    return {"ranks": [state if rank == ranks.rank else None for rank in range(ranks.size)]}


def state_of_rank(state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Return what a checkpoint holds of this rank.

    Args:
        state: from `joint_state` or `lone_state`; empty if the checkpoint holds none.
        ranks: the ranks that want to go on.

    Raises:
        ValueError: another number of ranks made the checkpoint, or it was made after a failure.
    """
    if not state:
        return state
    states: list[Mapping[str, Any] | None] = state.get("ranks", [state])
    if len(states) != ranks.size:
        raise ValueError(
            f"GradTrace: the checkpoint belongs to a trace that {_number(len(states))} recorded, and this run has "
            f"{_number(ranks.size)}. Every process goes on with its own part of the trace: resume with as many "
            "processes as before, or give `GradTrace` a new path to begin a new trace."
        )
    mine = states[ranks.rank]
    if mine is None:
        raise ValueError(
            f"GradTrace: the checkpoint holds nothing of rank {ranks.rank}: it was made by one rank after an error, "
            "when the others could not be asked any more. Resume from an earlier checkpoint, or give `GradTrace` a new "
            "path to begin a new trace."
        )
    return dict(mine)


def _number(n: int) -> str:
    return "one process" if n == 1 else f"{n} processes"

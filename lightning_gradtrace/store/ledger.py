"""Steps of a trace whose ledger does not close, and what usually causes that (docs/concepts.md, 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from lightning_gradtrace.store.reader import Trace

# A residual this many times what rounding of the weights can leave is more than rounding.
_ROUNDINGS = 4.0
# A step is out of line with the others if its residual is this many times their median, and above the floor.
_TIMES_MEDIAN = 30.0
_FLOOR = 1e-5
_FEWEST_STEPS = 5


def check_ledger(trace: Trace, tolerance: float | None = None) -> tuple[list[str], list[str]]:
    """Judge the residuals and the errors of the sums of a trace.

    A residual is too large if it exceeds both the tolerance and four times what rounding of the weights can leave. A
    step is out of line if its residual is 30 times the median of all, and more than rounding.

    Args:
        trace: the trace.
        tolerance: largest residual and error of a sum that is no problem; None for what the optimizer's rule and the
            precision of the run let expect, 1e-3 where neither is known.

    Returns:
        Problems and notes, one sentence or two each.
    """
    problems, notes = [], []
    steps = trace.steps
    half = steps["half_precision"].to_numpy(bool) | _trained_in_half_precision(trace)
    usual, expected = _limits(trace, half) if tolerance is None else 2 * (pd.Series(tolerance, steps.index),)
    residual = steps["residual"]
    rounding = _ROUNDINGS * steps["rounding"].fillna(0.0)
    wrong = residual[(residual > expected) & (residual > rounding)]
    if len(wrong):
        problems.append(_too_large("ledger residual", wrong, expected) + ". " + _cause(trace, len(wrong), residual))
    sums = steps["sum_error"]
    if (sums > usual).any():
        problems.append(
            _too_large("sum of shares against .grad", sums[sums > usual], usual)
            + ". Usually a use of the parameter that capture does not see, or a hook on the parameter itself that "
            "changes its gradient inside the backward pass."
        )
    odd = _out_of_line(residual, rounding)
    odd = odd.drop(wrong.index, errors="ignore")
    if len(odd):
        notes.append(
            f"ledger residual of {len(odd)} steps is out of line with the others (median {residual.median():.3g}), "
            f"largest {odd.max():.3g} at step {odd.idxmax()}. {_SINGLE}"
        )
    return problems, notes


def _out_of_line(residual: pd.Series[float], rounding: pd.Series[float]) -> pd.Series[float]:
    known = residual[np.isfinite(residual)]
    if len(known) < _FEWEST_STEPS:
        return known.iloc[:0]
    limit = max(_TIMES_MEDIAN * float(known.median()), _FLOOR)
    return known[(known > limit) & (known > rounding[known.index])]


_SINGLE = (
    "In single steps the usual cause is something else that moves weights at that moment: averaging, pruning or "
    "resetting them in a hook, a second optimizer, a loaded checkpoint; or a gradient that overflowed."
)


def _cause(trace: Trace, n_wrong: int, residual: pd.Series[float]) -> str:
    without = [name for name, rule in _optimizers(trace) if rule is None]
    if without:
        return (
            f"The optimizer {', '.join(f'`{name}`' for name in without)} has no rule, so that shifts are -lr * clipped "
            "gradient and the rest of its step is missing."
        )
    if n_wrong > int(residual.notna().sum()) / 2:
        return (
            "In most steps the usual cause is something that is added to gradients before the step (noise, a penalty, "
            "a projection), weights that a hook changes as well, or low precision."
        )
    return _SINGLE


def _optimizers(trace: Trace) -> list[tuple[str, Any]]:
    """Class and rule of every optimizer; a trace that does not say counts as having rules."""
    listed = trace.attrs.get("optimizer")
    found = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return [(str(one.get("class", "?")).rpartition(".")[2], one.get("rule", "unknown")) for one in found]


def _of_rules(trace: Trace, precision: str, usual: float) -> float:
    """Largest residual that the optimizers' rules let expect."""
    listed = trace.attrs.get("optimizer")
    limits = []
    for one in listed if isinstance(listed, list) else []:
        tolerances = one.get("residual_tolerance") if isinstance(one, dict) else None
        limit = tolerances.get(precision) if isinstance(tolerances, dict) else None
        limits.append(float(limit) if isinstance(limit, int | float) else usual)
    return max(limits, default=usual)


def _trained_in_half_precision(trace: Trace) -> bool:
    """Say what the settings say; traces before format 1.3 don't say it of single steps."""
    config = trace.attrs.get("config")
    trainer = config.get("trainer") if isinstance(config, dict) else None
    return "16" in str(trainer.get("precision") if isinstance(trainer, dict) else None)


def _limits(trace: Trace, half: np.ndarray) -> tuple[pd.Series[float], pd.Series[float]]:
    """Return the largest error of a sum and the largest residual that rounding explains, for every step."""
    usual = 1e-3, 5e-2
    expected = [_of_rules(trace, name, limit) for name, limit in zip(("single", "half"), usual, strict=True)]
    index = trace.steps.index
    return pd.Series(np.where(half, *usual[::-1]), index), pd.Series(np.where(half, *expected[::-1]), index)


def _too_large(name: str, wrong: pd.Series[float], limits: pd.Series[float]) -> str:
    limit = f"{limits[wrong.index].min():g}"
    return f"{name} of {len(wrong)} steps is above {limit}, largest {wrong.max():.3g} at step {wrong.idxmax()}"

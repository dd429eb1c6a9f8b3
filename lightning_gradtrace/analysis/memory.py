"""Momentum's memory: what a sample did to a weight in the end, when later steps still carried it on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_gradtrace.analysis._access import topk

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

Floats = npt.NDArray[np.float64]

_FIRST_MOMENT = ("Adam", "RAdam", "Adamax", "NAdam")
_WITHOUT_MEMORY = ("Adagrad", "Adadelta", "Adafactor", "Rprop")
_KNOWN = ("SGD", "RMSprop", *_FIRST_MOMENT, *_WITHOUT_MEMORY)


def eventual_shift(trace: Trace, occurrence: int | Sequence[int], horizon: int) -> pd.DataFrame:
    """Follow the kept shifts of occurrences through the optimizer's memory for some steps.

    A sample's gradient moves weights at its own step, and again at every later step as part of `carry`; weight decay
    takes some of it back. All of that is linear in the gradient once denominators are held as they were, so that it can
    be followed for one sample alone (docs/concepts.md, 3). For SGD the outcome is exact: the difference to a training
    whose gradients are the same except that this one is missing. For Adam, RAdam, Adamax and NAdam denominators are
    read from a `Gains` record, which costs one number per tracked weight and step; RMSprop needs it only with weight
    decay.

    Weight decay, dampening and the like are taken as they were at the start of the run, learning rate and momentum
    step by step. A step that gave a parameter no gradient can't be told from one that did, except by `Gains`.

    Args:
        trace: a trace with a `TopK` record, of every step and of one optimizer.
        occurrence: one number of `trace.occurrences`, or several.
        horizon: number of steps to follow after the occurrence's own; the end of the trace ends it earlier.

    Returns:
        One row per kept entry: occurrence, step, param, index, shift, eventual (contribution to the change of the
        weight up to then), steps (later steps that were followed). In a trace of gradients `shift` is the gradient.

    Raises:
        ValueError: the optimizer's memory is not linear or not known, the trace lacks steps or gains that are needed,
            or the learning rate was 0 at the occurrence's step, so that its shift says nothing about its gradient.
    """
    if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 0:
        raise ValueError(f"`horizon` is {horizon!r}, expected a whole number of steps, at least 0")
    wanted = np.atleast_1d(np.asarray(occurrence, np.int64))
    unknown = wanted[(wanted < 0) | (wanted >= trace.n_occurrences)]
    if len(unknown):
        raise ValueError(f"`occurrence` names {unknown[:5].tolist()}; this trace holds 0 to {trace.n_occurrences - 1}")
    settings = _settings(trace)
    steps = np.unique(trace.occurrences["step"].to_numpy()[wanted])
    frame = topk(trace).frame(steps=steps)
    frame = frame[frame["occurrence"].isin(wanted)]
    parts = []
    for (step, param), part in frame.groupby(["step", "param"], observed=True, sort=False):
        index = part["index"].to_numpy()
        path = _Path.after(trace, settings, int(step), str(param), horizon)
        part = part[["occurrence", "step", "param", "index", "shift"]].copy()
        part["eventual"] = part["shift"].to_numpy(np.float64) * path.follow(index)
        part["steps"] = len(path.rate) - 1
        parts.append(part)
    if not parts:
        return pd.DataFrame(columns=["occurrence", "step", "param", "index", "shift", "eventual", "steps"])
    return pd.concat(parts).sort_values(["occurrence", "param", "index"], ignore_index=True)


def _settings(trace: Trace) -> dict[str, Any]:
    """Describe the optimizer as the trace does.

    Raises:
        ValueError: there is not exactly one, or its memory can't be followed.
    """
    listed = trace.attrs.get("optimizer") or []
    if len(listed) != 1 or "rule" not in listed[0]:
        raise ValueError(
            f"this trace describes {len(listed)} optimizers, expected exactly one with its rule: memory is followed "
            "through the steps of one optimizer, in traces of this version"
        )
    if listed[0]["rule"] not in _KNOWN:
        name = str(listed[0]["class"]).rpartition(".")[2]
        raise ValueError(
            f"the memory of `{name}` can't be followed: it is not linear in the gradient, or not known. It can be for "
            f"{', '.join(_KNOWN)}"
        )
    return dict(listed[0])


@dataclass
class _Path:
    """What happened to one parameter from an occurrence's step on, which comes first in every array.

    Attributes:
        rule: the optimizer's rule.
        group: settings of its parameter group.
        rate: learning rates, shape (steps,).
        momentum: momentum or first beta, shape (steps,).
        gains: absolute gains, shape (steps, weights of the parameter); None if not recorded.
        clip: clipping factor of the first step, None in a trace of shifts.
        first: whether the first step is the training's first one.
        nesterov: for NAdam, factors of the gradient and of the first moment in the numerator, shape (steps, 2).
    """

    rule: str
    group: Mapping[str, Any]
    rate: Floats
    momentum: Floats
    gains: Floats | None
    clip: float | None
    first: bool
    nesterov: Floats | None = None

    @classmethod
    def after(cls, trace: Trace, settings: Mapping[str, Any], step: int, param: str, horizon: int) -> _Path:
        number = trace.steps.index.to_numpy()
        row = int(np.searchsorted(number, step))
        rows = np.arange(row, min(row + horizon + 1, len(number)))
        if (np.diff(number[rows]) != 1).any():
            raise ValueError(
                f"the trace lacks steps between {step} and {number[rows[-1]]}: memory changes at every step, so record "
                "every step, `GradTrace(every_n_steps=1)`"
            )
        rows = rows[~trace.steps["skipped"].to_numpy(bool)[rows]]  # a skipped step leaves weights and memory alone
        found = [i for i, group in enumerate(settings["groups"]) if param in group["tracked"]]
        if not found:
            raise ValueError(f"`{param}` was in no parameter group when the training began; its settings are not known")
        suffix = f"_{found[0]}" if found[0] else ""
        rule, group = settings["rule"], settings["groups"][found[0]]
        gains = nesterov = None
        if "gains" in trace.records:
            from lightning_gradtrace.store.schema import escape

            stored = trace.checked(f"gains/{escape(param)}/gain")
            gains = np.abs(np.stack([np.asarray(stored[r], np.float64).reshape(-1) for r in rows]))
            if rule == "NAdam":
                until = int(rows[-1]) + 1
                first = np.asarray(stored[(slice(0, until), *[slice(0, 1)] * (stored.ndim - 1))], np.float64).reshape(
                    -1
                )
                moved = ~np.isnan(first) & ~trace.steps["skipped"].to_numpy(bool)[:until]
                beta = trace.steps[f"momentum{suffix}"].to_numpy(np.float64)[:until]
                nesterov = _nesterov_factors(beta, moved, float(group["momentum_decay"]))[rows]
        clip = float(trace.steps["clip_factor"].iloc[row]) if trace.attrs.get("quantity") == "gradient" else None
        table = trace.steps.iloc[rows]
        rate, momentum = table[f"lr{suffix}"].to_numpy(), table[f"momentum{suffix}"].to_numpy()
        return cls(rule, group, rate, momentum, gains, clip, step == 0, nesterov)

    def follow(self, index: npt.NDArray[np.integer[Any]]) -> Floats:
        """Return eventual contribution over recorded value, for some weights of the parameter, shape (n,)."""
        gains = None if self.gains is None else self.gains[:, index]
        decay = float(self.group.get("weight_decay", 0.0))
        decoupled = bool(self.group.get("decoupled_weight_decay", False)) or self.rule == "Adafactor"
        own = moved = memory = np.zeros(len(index))
        for j in range(len(self.rate)):
            entering = (1.0 if j == 0 else 0.0) + (0.0 if decoupled else decay * moved)
            if gains is not None and np.isnan(gains[j]).all():
                continue  # the step gave the parameter no gradient
            moved = moved * (1.0 - self.rate[j] * decay) if decoupled else moved
            memory, change = self._step(j, entering, memory, None if gains is None else gains[j])
            moved = moved - change
            own = moved if j == 0 else own
        if self.clip is not None:
            if np.isnan(self.clip):
                raise ValueError(
                    "in a trace of gradients memory is followed from the clipping factor, and this step was clipped "
                    "weight by weight; record shifts, `GradTrace(quantity='shift')`"
                )
            return moved * self.clip * (-1.0 if self.group.get("maximize", False) else 1.0)
        if (own == 0).any():
            raise ValueError(
                "the learning rate was 0 at the step of an occurrence, so that its shift is 0 and says nothing about "
                "its gradient; record gradients, `GradTrace(quantity='gradient')`"
            )
        return np.asarray(moved / own)

    def _step(self, j: int, entering: Any, memory: Floats, gain: Floats | None) -> tuple[Floats, Floats]:
        """Take one step with what enters at it: the memory after it, and what is subtracted from the weight."""
        m, rate = self.momentum[j], self.rate[j]
        if self.rule == "SGD":
            if m == 0:  # the optimizer neither reads nor writes its buffer then
                return memory, rate * entering
            fresh = 1.0 if self.first and j == 0 else 1.0 - float(self.group.get("dampening", 0.0))
            memory = m * memory + fresh * entering
            return memory, rate * (entering + m * memory if self.group.get("nesterov", False) else memory)
        if self.rule in _FIRST_MOMENT:
            wide = self._needed(gain)
            memory = m * memory + (1.0 - m) * entering
            direct, through = (0.0, 1.0) if self.nesterov is None else self.nesterov[j]
            return memory, wide / (direct + through * (1.0 - m)) * (direct * entering + through * memory)
        # Without weight decay only the first gradient enters, and its unit cancels.
        cancels = self.clip is None and not self._decays()
        known = gain if cancels else self._needed(gain)
        if self.rule == "RMSprop" and m > 0:
            if known is not None and rate == 0:
                raise ValueError("the learning rate was 0 at one of the steps, so that its gain hides the denominators")
            memory = m * memory + entering * (1.0 if known is None else known / rate)
            return memory, rate * memory
        return memory, entering * (1.0 if known is None else known)

    def _decays(self) -> bool:
        return bool(float(self.group.get("weight_decay", 0.0))) and self.rule != "Adafactor"

    def _needed(self, gain: Floats | None) -> Floats:
        if gain is None:
            raise ValueError(
                f"the memory of {self.rule} depends on its denominators, which this trace does not hold; record them "
                "with `GradTrace(record=[TopK(...), Gains()])`, one number per tracked weight and step"
            )
        return gain


def _nesterov_factors(beta: Floats, moved: npt.NDArray[np.bool_], decay: float) -> Floats:
    """Return by what NAdam multiplies gradient and first moment at every step, from the first step of the training on.

    Args:
        beta: first betas, shape (steps,).
        moved: whether the parameter had a gradient, shape (steps,).
        decay: the setting ``momentum_decay``.

    Returns:
        ``(1 - mu_t) / (1 - P_t)`` and ``mu_next / (1 - P_t mu_next)``, shape (steps, 2); see `update/nadam.py`.
    """
    count = np.cumsum(moved)
    now, following = (beta * (1.0 - 0.5 * 0.96 ** ((count + later) * decay)) for later in (0, 1))
    product = np.cumprod(np.where(moved, now, 1.0))
    with np.errstate(divide="ignore"):  # before the first gradient, where nobody looks
        return np.stack([(1.0 - now) / (1.0 - product), following / (1.0 - product * following)], 1)

"""When a record is kept: every n steps, in ranges of steps, at steps that thin out, or as a predicate says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import override


class Schedule(ABC):
    """Says at which optimizer steps a record is kept. Steps are counted from 0, as in `trace.steps`."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Say whether the record is kept at a step; the same answer every time."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the schedule as JSON can hold it."""

    def count(self, n_steps: int) -> int:
        """Count the steps below ``n_steps`` at which the record is kept."""
        return sum(self.due(step) for step in range(n_steps))

    def __repr__(self) -> str:
        """Name the schedule and its arguments."""
        arguments = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


class EveryNSteps(Schedule):
    """Steps ``first``, ``first + n``, ``first + 2 n``, ..., and ``width - 1`` steps after each of them.

    Args:
        n: distance, at least 1.
        first: the first one.
        width: length of each run of steps, from 1 to ``n``. Weights stored with ``width=2`` give single steps' shifts.

    Raises:
        ValueError: an argument is out of range.

    Example::

        >>> [step for step in range(10) if EveryNSteps(4, first=1).due(step)]
        [1, 5, 9]
        >>> [step for step in range(10) if EveryNSteps(4, width=2).due(step)]
        [0, 1, 4, 5, 8, 9]
    """

    def __init__(self, n: int, first: int = 0, width: int = 1) -> None:
        self.n = _whole("EveryNSteps", "n", n, 1)
        self.first = _whole("EveryNSteps", "first", first, 0)
        self.width = _whole("EveryNSteps", "width", width, 1)
        if self.width > self.n:
            raise ValueError(f"`EveryNSteps(n={n}, width={width})`: expected a width of at most n steps")

    @override
    def due(self, step: int) -> bool:
        return step >= self.first and (step - self.first) % self.n < self.width

    @override
    def count(self, n_steps: int) -> int:
        whole, rest = divmod(max(0, n_steps - self.first), self.n)
        return whole * self.width + min(rest, self.width)

    @override
    def describe(self) -> dict[str, Any]:
        return {"kind": "every_n_steps", "n": self.n, "first": self.first, "width": self.width}


class StepRanges(Schedule):
    """All steps inside half-open ranges.

    Args:
        ranges: pairs (start, stop); the last stop may be None, for no end.

    Raises:
        ValueError: a range is empty, or they don't rise.

    Example::

        >>> [step for step in range(10) if StepRanges([(0, 2), (7, None)]).due(step)]
        [0, 1, 7, 8, 9]
    """

    def __init__(self, ranges: Sequence[Sequence[int | None]]) -> None:
        self.ranges: list[tuple[int, int | None]] = []
        end: int | None = 0
        for pair in ranges:
            start, stop = pair if len(pair) == 2 else (None, None)
            if start is None or end is None or start < end or (stop is not None and stop <= start):
                raise ValueError(
                    f"`StepRanges({list(ranges)})`: expected pairs (start, stop) of steps, start below stop, that "
                    "rise and don't overlap; the last stop may be None"
                )
            self.ranges.append((start, stop))
            end = stop
        if not self.ranges:
            raise ValueError("`StepRanges([])`: expected at least one pair (start, stop) of steps")

    @override
    def due(self, step: int) -> bool:
        return any(start <= step and (stop is None or step < stop) for start, stop in self.ranges)

    @override
    def count(self, n_steps: int) -> int:
        return sum(max(0, min(n_steps, n_steps if stop is None else stop) - start) for start, stop in self.ranges)

    @override
    def describe(self) -> dict[str, Any]:
        return {"kind": "step_ranges", "ranges": [list(pair) for pair in self.ranges]}


class LogSpaced(Schedule):
    """Step 0, then ``per_decade`` steps for every factor of ten, rounded; all steps where these are closer than one.

    Args:
        per_decade: number of steps from 10^n to 10^(n + 1), at least 1.

    Raises:
        ValueError: ``per_decade`` is out of range.

    Example::

        >>> [step for step in range(1001) if LogSpaced(per_decade=3).due(step)]
        [0, 1, 2, 5, 10, 22, 46, 100, 215, 464, 1000]
    """

    def __init__(self, per_decade: int) -> None:
        self.per_decade = _whole("LogSpaced", "per_decade", per_decade, 1)
        self._steps, self._last, self._exponent = {0}, 0, 0

    @override
    def due(self, step: int) -> bool:
        while step > self._last:
            self._last = round(10 ** (self._exponent / self.per_decade))
            self._steps.add(self._last)
            self._exponent += 1
        return step in self._steps

    @override
    def describe(self) -> dict[str, Any]:
        return {"kind": "log_spaced", "per_decade": self.per_decade}


class Predicate(Schedule):
    """Steps for which a function returns true.

    The trace keeps the function's name, not the function.

    Args:
        function: of the number of a step; must give the same answer every time.

    Raises:
        ValueError: ``function`` can't be called.

    Example::

        >>> Predicate(lambda step: step in (3, 1000)).due(3)
        True
    """

    def __init__(self, function: Callable[[int], Any]) -> None:
        if not callable(function):
            raise ValueError(f"`Predicate({function!r})`: expected a function of the number of a step")
        self.function = function

    @override
    def due(self, step: int) -> bool:
        return bool(self.function(step))

    @override
    def describe(self) -> dict[str, Any]:
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return {"kind": "predicate", "name": f"{getattr(self.function, '__module__', '?')}.{name}"}

    @override
    def __repr__(self) -> str:
        return f"Predicate({self.describe()['name']})"


def as_schedule(record: str, value: Any) -> Schedule | None:
    """Turn what a user gives as ``schedule`` into one.

    Args:
        record: name of the record, for messages.
        value: a schedule; n for every n-th step; a function of the step; None for every step.

    Returns:
        The schedule, None for every step.

    Raises:
        ValueError: it is none of these.
    """
    if value is None or isinstance(value, Schedule):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return EveryNSteps(value)
    if callable(value):
        return Predicate(value)
    raise ValueError(
        f"`{record}(schedule={value!r})`: expected a Schedule, a whole number n for every n-th step, a "
        "function of the step, or None for every step"
    )


def _whole(owner: str, name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{owner}({name}={value!r})`: expected a whole number of steps, at least {least}")
    return value

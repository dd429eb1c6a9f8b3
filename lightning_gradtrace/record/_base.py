"""What is kept of a step: the shifts a record reads, and the interface of a record."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from lightning_gradtrace.capture.engines.loss_tokens import TokenChoice
from lightning_gradtrace.capture.shares import Share
from lightning_gradtrace.record.schedule import Schedule
from lightning_gradtrace.store.schema import ArraySpec, with_own_rows
from lightning_gradtrace.update.ledger import Entry


@dataclass(frozen=True)
class ParameterInfo:
    """One row of the params table.

    Attributes:
        name: name in ``named_parameters()``.
        shape: its shape.
        offset: global entry number of its first weight.
        kind: what it belongs to, e.g. "linear".
        module: dotted name of the module that owns it.
        dtype: dtype in which its shifts are formed: float32 or wider.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    kind: str = ""
    module: str = ""
    dtype: str = "float32"

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass
class ParameterShifts:
    """The shifts of one parameter at one step: ``s[i] = scale * g[i]``.

    Attributes:
        info: the parameter.
        scale: a number or a tensor of the parameter's shape.
        shares: ``g`` per micro-batch, None where the loss did not reach the parameter. Where the optimizer multiplies
            gradients by matrices (Muon), they are in it already.
        gain: the part of `scale` that is the optimizer's, without clipping; a number or a tensor of the parameter's
            shape, None if the step did not move the parameter.
    """

    info: ParameterInfo
    scale: float | Tensor
    shares: list[Share | None]
    gain: float | Tensor | None = None

    def shifts(self, micro_batch: int, samples: slice = slice(None)) -> Tensor:
        """Write out ``s[samples]`` of one micro-batch, shape (n, *shape)."""
        share = self.shares[micro_batch]
        if share is None:
            raise ValueError(f"`{self.info.name}` has no share in micro-batch {micro_batch}")
        return share.dense(samples) * self.scale

    def total(self) -> Tensor | None:
        """Sum of the shifts over all occurrences, shape of the parameter; None if the loss did not reach it."""
        total: Tensor | None = None
        for share in self.shares:
            if share is not None:
                total = share.total() if total is None else total + share.total()
        return None if total is None else total * self.scale


@dataclass
class TokenShifts:
    """Shifts of one loss token of every occurrence of a step.

    Attributes:
        position: position of the token, -1 where there is none; shape (occurrence,), int32.
        token: the token that is predicted there, -1 for none; shape (occurrence,), int32.
        step: the shifts.
    """

    position: np.ndarray
    token: np.ndarray
    step: StepShifts


@dataclass
class StepShifts:
    """All shifts of one optimizer step: what update hands to record.

    Attributes:
        n_samples: number of samples of every micro-batch; occurrences are numbered through all of them.
        parameters: the tracked parameters in the order of the params table.
        number: number of the optimizer step.
        shared: what one record leaves for the others of the same step, by key.
        tokens: the first chosen loss token of every occurrence, the second, and so on, if a record asks for them.
        n_chosen: number of loss tokens chosen in each occurrence, shape (occurrence,), int32.
        ledger: yields the line of every parameter that the step moved, if a record asks for the ledger.
    """

    n_samples: list[int]
    parameters: list[ParameterShifts]
    number: int = 0
    shared: dict[Any, Any] = field(default_factory=dict)
    tokens: list[TokenShifts] = field(default_factory=list)
    n_chosen: np.ndarray | None = None
    ledger: Callable[[], Iterator[Entry]] | None = None

    @property
    def micro_batches(self) -> list[slice]:
        """Occurrences of every micro-batch, counted from the first one of the step."""
        edges = [0, *itertools.accumulate(self.n_samples)]
        return [slice(first, last) for first, last in itertools.pairwise(edges)]

    @property
    def n_occurrences(self) -> int:
        """Number of occurrences of the step."""
        return sum(self.n_samples)

    @property
    def n_entries(self) -> int:
        """Number of tracked weights."""
        return sum(p.info.numel for p in self.parameters)


class Record(ABC):
    """One kind of record: its arrays and its reduction of a step.

    Records are plain classes, not dataclasses: Hydra takes dataclasses in a list for configurations.

    Attributes:
        schedule: at which steps the record is kept; None for every step that GradTrace records.
        wants_tokens: whether it needs the shares of single loss tokens, see `choice`.
        wants_ledger: whether it needs the ledger of the step, see `StepShifts.ledger`.
    """

    schedule: Schedule | None = None
    wants_tokens = False
    wants_ledger = False

    @property
    @abstractmethod
    def group(self) -> str:
        """Zarr group of the record's arrays."""

    def choice(self, vocab: Sequence[str] | None) -> TokenChoice | None:
        """Return which loss tokens the record needs shares of, None for none.

        Args:
            vocab: text of each token id, if known.
        """
        return None

    @abstractmethod
    def specs(self, parameters: Sequence[ParameterInfo]) -> list[ArraySpec]:
        """Declare the arrays for a model with these tracked parameters."""

    @abstractmethod
    def reduce(self, step: StepShifts, first_occurrence: int) -> dict[str, np.ndarray]:
        """Reduce the shifts of a step.

        Args:
            step: the shifts.
            first_occurrence: number of the step's first occurrence in the trace.

        Returns:
            Rows to append, by path of the array.
        """

    def later_specs(self, step: StepShifts) -> list[ArraySpec]:
        """Declare arrays that only the data of a step can: called before `reduce`, returns each array once.

        Such arrays have rows of their own, and the record writes the arrays that list them.
        """
        return []

    def state(self) -> dict[str, Any]:
        """Return what a later process needs to go on with the same outcome to the last bit, as JSON can hold it."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; called after `specs`."""
        return

    def due(self, step: int) -> bool:
        """Say whether the record is kept at an optimizer step."""
        return self.schedule is None or self.schedule.due(step)

    def arrays(self, parameters: Sequence[ParameterInfo]) -> list[ArraySpec]:
        """Return `specs`, and, for a record with a schedule, the arrays that list the rows it has."""
        specs = self.specs(parameters)
        self._listed: list[ArraySpec] = []
        if self.schedule is not None:
            specs = [*with_own_rows(s for s in specs if not s.own_rows), *(s for s in specs if s.own_rows)]
            self._listed = [spec for spec in specs if spec.own_rows and spec.name == spec.axis]
        return specs

    def rows(self, step: StepShifts, first_occurrence: int) -> dict[str, np.ndarray]:
        """Return `reduce`, and, for a record with a schedule, which steps or occurrences these rows belong to.

        Args:
            step: the shifts.
            first_occurrence: number of the step's first occurrence in the trace.
        """
        rows = self.reduce(step, first_occurrence)
        occurrences = np.arange(first_occurrence, first_occurrence + step.n_occurrences)
        labels = {"occurrence": occurrences, "step": np.array([step.number])}
        return {**{spec.path: labels[spec.axis] for spec in self._listed}, **rows}

    def describe(self) -> dict[str, Any]:
        """Return the record as JSON can hold it: class, arguments and schedule."""
        arguments = {n: v for n, v in vars(self).items() if not n.startswith("_") and n != "schedule"}
        schedule = None if self.schedule is None else self.schedule.describe()
        return {"record": type(self).__name__, "arguments": arguments, "schedule": schedule}

    def __repr__(self) -> str:
        """Name the record and its arguments."""
        arguments = {n: v for n, v in vars(self).items() if not n.startswith("_")}
        if self.schedule is None:
            arguments.pop("schedule", None)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"

"""What arrives from the dataloader: a batch, who its samples are, where they stand, and inputs not yet stored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from lightning_gradtrace.capture.forward.tape import Tape
from lightning_gradtrace.capture.intake.batch import copied, count_samples, find_batch_axis
from lightning_gradtrace.capture.intake.inputs import InputFilter, InputSource
from lightning_gradtrace.capture.intake.repeated import Repeated
from lightning_gradtrace.capture.intake.sample_ids import IdSource
from lightning_gradtrace.capture.intake.strung import strung_in
from lightning_gradtrace.capture.probing.memory import Memory
from lightning_gradtrace.capture.probing.probe import PermutationProbe


@dataclass(frozen=True)
class Arrival:
    """One batch of the training.

    Attributes:
        batch: what the dataloader yielded, on the device of the model.
        number: index of the batch in the epoch.
        ids: sample ids in slot order, int64, shape (sample,).
        axis: axis of the batch's tensors that holds the samples.
        is_strung: whether samples are strung together in it.
    """

    batch: Any
    number: int
    ids: np.ndarray
    axis: int
    is_strung: bool = False

    def probe(
        self,
        module: nn.Module,
        parameters: Mapping[str, Tensor],
        rehearse: Callable[[int, Any], None],
        tape: Any,
        memory: Memory | None = None,
    ) -> PermutationProbe:
        """Return a probe of the batch.

        Args:
            module: the model.
            parameters: tracked parameters by name.
            rehearse: runs the training step's forward pass on (index of the batch, batch).
            tape: the tape of the real one.
            memory: what the model remembered when it began; None if that is not known.
        """
        run = functools.partial(rehearse, self.number)
        graded = isinstance(tape, Tape) and tape.taint.left_torch_function
        of = (module, parameters, run, self.batch, len(self.ids), self.axis)
        return PermutationProbe(*of, tape.state, memory, graded=graded)


class BatchReader:
    """Reads the batches of a training in the order of their arrival.

    Args:
        ids: gives the sample ids.
        batch_axis: 0, 1, or "auto" to find out by size and from the data set's items.
        inputs: see `InputFilter`.
    """

    def __init__(self, ids: IdSource, batch_axis: Literal["auto", 0, 1], inputs: InputSource) -> None:
        self._ids = ids
        self._axis: int | None = None if batch_axis == "auto" else batch_axis
        self._inputs = InputFilter(inputs)
        self._n_arrived = self._n_finished = 0
        self._repeated = Repeated()

    def read(self, batch: Any, number: int) -> Arrival:
        """Read the next batch; every batch must be read, also one of which nothing is recorded.

        Args:
            batch: the batch.
            number: its index in the epoch.

        Returns:
            The batch with its ids; without known ids, samples are numbered in the order of their arrival.

        Raises:
            ValueError: the batch has no samples, or not as many as there are ids.
        """
        ids = self._ids.ids(batch)
        n_ids = None if ids is None else len(ids)
        strung = strung_in(batch, n_ids)
        n_samples = strung.n_samples if strung else count_samples(batch, self._axis, n_ids)
        if self._axis is None:
            few = None if ids is None else functools.partial(self._ids.items, ids[:3])
            axis = find_batch_axis(batch, n_samples, few, strung) if ids is not None else 0
            self._axis = axis if n_samples > 1 else None
        else:
            axis = self._axis
        if ids is None:
            ids = np.arange(self._n_arrived, self._n_arrived + n_samples)
        self._n_arrived += n_samples
        if not strung:
            self._repeated.look_at(batch, ids, axis)
        return Arrival(copied(batch), number, ids, axis, bool(strung))

    def state(self) -> dict[str, int | None]:
        """Return what a later process needs to go on after the last batch that was finished."""
        return {"axis": self._axis, "n_arrived": self._n_finished}

    def restore(self, state: Mapping[str, Any], stored: np.ndarray) -> None:
        """Go on where `state` was taken.

        Args:
            state: what it returned.
            stored: ids of the samples whose inputs are stored, int64, shape (n,).
        """
        self._axis = state["axis"] if self._axis is None else self._axis
        self._n_arrived = self._n_finished = int(state["n_arrived"])
        self._inputs.remember(stored)

    def finish(self) -> None:
        """Take note that the training on the last batch is over: a run that is resumed won't see it again."""
        self._n_finished = self._n_arrived
        self._repeated.tell()

    def new_inputs(self, arrival: Arrival) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Return ids, token ids and lengths of the samples whose inputs were not returned before, None for none."""
        return self._inputs.new(arrival.batch, arrival.ids, None if arrival.is_strung else arrival.axis)

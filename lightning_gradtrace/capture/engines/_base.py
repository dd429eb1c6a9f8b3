"""What an engine is: a way to per-sample gradients of the real training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.passes import Passes
from lightning_gradtrace.capture.placing.placement import Probe
from lightning_gradtrace.capture.placing.settling import Doubt
from lightning_gradtrace.capture.probing.random_state import RandomState


class Recording(Protocol):
    """What is entered around the forward pass of a micro-batch: a tape, or a note of the moment.

    Attributes:
        state: random states when the forward pass began, None if they are not needed.
    """

    state: RandomState | None

    def __enter__(self) -> Any:
        """Begin to record."""

    def __exit__(self, *args: Any) -> Any:
        """End recording."""

    def forget_backward(self) -> None:
        """Forget what a backward pass left."""

    def clear(self) -> None:
        """Keep no tensor of the forward pass alive that no share needs."""


R = TypeVar("R", bound=Recording)


class Engine(Protocol[R]):
    """A way to per-sample gradients of the real training step. What it is handed it never changes."""

    def tape(self, parameters: Mapping[str, Tensor], batch: Any, n_samples: int, batch_axis: int) -> R:
        """Return the recording of a micro-batch that comes.

        Args:
            parameters: the tracked parameters by name.
            batch: the batch.
            n_samples: number of samples in it.
            batch_axis: axis of the samples in the batch's tensors.
        """

    def passes(self, tape: R, loss: Tensor, n_samples: int) -> Passes | None:
        """Return the backward passes that come before the real one; None for none.

        Args:
            tape: the recording.
            loss: the loss that is about to be back-propagated.
            n_samples: number of samples.
        """

    def collect(self, tape: R, n_samples: int, probe: Probe, factor: float = 1.0) -> MicroBatch:
        """Return the shares of a micro-batch whose backward pass is done.

        Args:
            tape: the recording.
            n_samples: number of samples.
            probe: runs the model on the batch and on the batch permuted.
            factor: what the user's loss was multiplied by before the backward pass.
        """

    def asks(self, tape: R, probe: Probe) -> Doubt:
        """Say what `collect` would run the probe for."""

    def advice(self, micro_batches: Sequence[MicroBatch], gradients: Mapping[str, Tensor]) -> str:
        """Say what to do if the shares of these micro-batches don't add up to the gradients."""

    def state(self) -> list[str]:
        """Return what a later process must know to find the same parameters used as never before."""

    def restore(self, state: Sequence[str]) -> None:
        """Go on where `state` was taken."""

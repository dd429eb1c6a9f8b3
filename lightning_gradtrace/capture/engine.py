"""The tape engine: from the uses of one micro-batch to a share per parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.attribution import Attribution
from lightning_gradtrace.capture.derived import Lineage, OverwrittenError, Root
from lightning_gradtrace.capture.placement import Placer, Probe, UnattributableError
from lightning_gradtrace.capture.shares import Share, add_shares
from lightning_gradtrace.capture.tape import Tape


@dataclass
class MicroBatch:
    """Per-sample gradients of one micro-batch: what capture hands to update.

    Attributes:
        n_samples: number of samples.
        shares: the share of every tracked parameter that the loss reached, by name.
        sample_ids: id of every sample, in slot order; shape (sample,). Filled in by the caller.
    """

    n_samples: int
    shares: dict[str, Share]
    sample_ids: Any = None


@dataclass
class TapeEngine:
    """Turns taped uses into shares; keeps what it learned about the model's layout between steps.

    Attributes:
        placer: remembers where the samples are in every use.
        attribution: remembers by which way the shares of every use are computed.
    """

    placer: Placer = field(default_factory=Placer)
    attribution: Attribution = field(default_factory=Attribution)

    def tape(self, parameters: Mapping[str, Tensor], batch: Any = None, n_samples: int | None = None) -> Tape:
        """Return a tape for one forward and backward pass; enter it around the forward pass.

        Args:
            parameters: the tracked parameters by name.
            batch: the batch; None if it is unknown, then every tensor that is not tracked counts as batched.
            n_samples: its number of samples.

        Returns:
            The tape.
        """
        return Tape(parameters, batch, n_samples)

    def collect(self, tape: Tape, n_samples: int, probe: Probe) -> MicroBatch:
        """Turn what the tape holds after the backward pass into shares.

        Args:
            tape: a tape whose uses have their cotangents.
            n_samples: number of samples of the micro-batch.
            probe: see `Placer.place`.

        Returns:
            The shares, by parameter. Uses that the backward pass did not reach are left out.

        Raises:
            UnattributableError: the samples of a use can't be found, or its input was overwritten.
        """
        mixture = tape.unattributable()
        if mixture is not None:
            names = ", ".join(f"`{name}`" for name in mixture.parameters)
            raise UnattributableError(
                f"GradTrace: can't attribute {names}: the loss is computed from it by `{mixture.function}` in a way "
                f"where no axis holds the {n_samples} samples of the batch. A penalty on the weights and a statistic "
                "of the whole batch belong to no sample. Use the optimizer's `weight_decay` for a penalty, or leave "
                "the parameter out with `GradTrace(params=...)`."
            )
        uses = [use for use in tape.uses if use.reached]
        received: dict[Lineage, list[Share]] = {}
        for use, placement in zip(uses, self.placer.place(uses, n_samples, probe), strict=True):
            for lineage, share in self.attribution.shares(use, placement.of(use, n_samples), n_samples).items():
                received.setdefault(lineage, []).append(share)
        parts: dict[str, list[Share]] = {}
        for lineage, shares in received.items():
            for root, share in _pull_back(lineage, add_shares(shares)).items():
                parts.setdefault(root.name, []).append(share)
        tape.clear()
        return MicroBatch(n_samples, {name: add_shares(found) for name, found in parts.items()})


def _pull_back(lineage: Lineage, share: Share) -> dict[Root, Share]:
    try:
        return lineage.pull_back(share)
    except OverwrittenError as error:
        names = ", ".join(f"`{name}`" for name in lineage.roots)
        raise UnattributableError(
            f"GradTrace: a tensor that was combined with {names} before they met the batch was changed in place "
            "afterwards, so the shares can't be followed back. Replace the in-place operation in the model by its "
            "out-of-place form."
        ) from error

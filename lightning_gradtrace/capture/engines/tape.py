"""The tape engine: from the uses of one micro-batch to a share per parameter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.attribution import Attribution
from lightning_gradtrace.capture.forward.derived import Lineage, OverwrittenError, Root
from lightning_gradtrace.capture.forward.tape import Tape
from lightning_gradtrace.capture.forward.use import Site, Use
from lightning_gradtrace.capture.intake.permuting import own_part
from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.passes import Passes
from lightning_gradtrace.capture.placing.placement import Placer, Probe, UnattributableError
from lightning_gradtrace.capture.placing.settling import Doubt
from lightning_gradtrace.capture.precision import coarsest_by_name
from lightning_gradtrace.capture.probing.draws import EVERYWHERE
from lightning_gradtrace.capture.probing.sharing import Sharing, drawn
from lightning_gradtrace.capture.shares import Share, add_shares


@dataclass
class TapeEngine:
    """Turns taped uses into shares; keeps what it learned about the model's layout between steps.

    Attributes:
        placer: remembers where the samples are in every use.
        attribution: remembers by which way the shares of every use are computed.
        sharing: remembers which random numbers all samples share.
    """

    placer: Placer = field(default_factory=Placer)
    attribution: Attribution = field(default_factory=Attribution)
    sharing: Sharing = field(default_factory=Sharing)
    _met: set[str] = field(default_factory=set, init=False)

    def tape(
        self, parameters: Mapping[str, Tensor], batch: Any = None, n_samples: int | None = None, batch_axis: int = 0
    ) -> Tape:
        """Return a tape for one forward and backward pass; enter it around the forward pass.

        Args:
            parameters: the tracked parameters by name.
            batch: the batch; None if it is unknown, then every tensor that is not tracked counts as batched.
            n_samples: its number of samples.
            batch_axis: axis of the samples in the batch's tensors; elsewhere their place is found use by use.

        Returns:
            The tape.
        """
        batch = batch if n_samples is None else own_part(batch, n_samples, batch_axis)
        of = (parameters, batch, n_samples, batch_axis)
        aside = None if self.sharing.is_known(n_samples) else Tape(*of, shared=EVERYWHERE)
        return Tape(*of, shared=self.sharing.shared, aside=aside)

    def passes(self, tape: Any, loss: Tensor, n_samples: int) -> Passes | None:
        """Return None: the hooks of the tape see the real backward pass."""
        return None

    def asks(self, tape: Tape, probe: Probe) -> Doubt:
        """Say what `collect` would run the probe for."""
        reached = [use for use in tape.uses if use.reached]
        places, shared = self.placer.asks(reached, probe), self.sharing.shared
        if probe.n_samples < 2:
            return Doubt(places, shared=shared)
        return Doubt(places, self.sharing.unknown(tape), drawn(tape), shared)

    def collect(self, tape: Tape, n_samples: int, probe: Probe, factor: float = 1.0) -> MicroBatch:
        """Turn what the tape holds after the backward pass into shares.

        Args:
            tape: a tape whose uses have their cotangents.
            n_samples: number of samples of the micro-batch.
            probe: see `Placer.place`.
            factor: not needed, the cotangents carry it.

        Returns:
            The shares, by parameter. Uses that the backward pass did not reach are left out.

        Raises:
            UnattributableError: the samples of a use can't be found, or its input was overwritten.
        """
        taped = tape
        tape, probe = self.sharing.choose(tape, n_samples, probe)
        mixture = tape.mixtures.unattributable()
        if mixture is not None:
            names = ", ".join(f"`{name}`" for name in mixture.parameters)
            raise UnattributableError(
                f"GradTrace: can't attribute {names}: the loss is computed from it by `{mixture.function}` in a way "
                f"where no axis holds the {n_samples} samples of the batch. A penalty on the weights, a factor of the "
                "whole loss and a statistic of the whole batch belong to no sample. Use the optimizer's `weight_decay` "
                "for a penalty, or leave the parameter out with `GradTrace(params=...)`. If samples do come through "
                "it, in pairs or inside of a custom `torch.autograd.Function` such as an adjoint method's, "
                '`engine="functional"` serves it.'
            )
        uses = [use for use in tape.uses if use.reached]
        precision = coarsest_by_name(use.precision for use in uses)
        received: dict[Lineage, list[Share]] = {}
        for use, places in zip(uses, self.placer.place(uses, n_samples, probe), strict=True):
            for lineage, share in self.attribution.shares(use, places, n_samples).items():
                received.setdefault(lineage, []).append(share)
        parts: dict[str, list[Share]] = {}
        for lineage, shares in received.items():
            for root, share in _pull_back(lineage, add_shares(shares)).items():
                parts.setdefault(root.name, []).append(share)
        taped.forget_backward()
        by_name = {name: add_shares(found) for name, found in parts.items()}
        return MicroBatch(n_samples, by_name, unlike=self._unlike(uses), precision=precision)

    def _unlike(self, uses: Sequence[Use]) -> set[str]:
        """Return the parameters whose uses, taken together, are not those of any pass before."""
        sites: dict[str, list[Site]] = {}
        for use in uses:
            for name in use.site.parameters:
                sites.setdefault(name, []).append(use.site)
        found = {name: hashlib.sha256(repr((name, of)).encode()).hexdigest()[:16] for name, of in sites.items()}
        unlike = {name for name, digest in found.items() if digest not in self._met}
        self._met |= set(found.values())
        return unlike

    def state(self) -> list[str]:
        """Return digests of the uses of parameters that were met."""
        return sorted(self._met)

    def restore(self, state: Sequence[str]) -> None:
        """Go on where `state` was taken."""
        self._met = set(state)

    def advice(self, micro_batches: Sequence[MicroBatch], gradients: Mapping[str, Tensor]) -> str:
        """Say what to do if the shares don't add up to the gradient."""
        return (
            "Some use of the parameter was not seen (inside a custom `torch.autograd.Function`, TorchScript, a "
            "function compiled by `torch.compile`, `torch.vmap` or `torch.func`, of a nested tensor, in a gradient of "
            "gradients, or as a penalty on the weights, which no sample causes), a hook of a tensor or a parameter "
            "changed its gradient, or its samples were taken from the wrong axis. Give `batch_axis=0` or "
            "`batch_axis=1` if the batch was misread, leave the parameter out with `GradTrace(params=...)`, or give "
            '`engine="functional"` a loss per sample.'
        )


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

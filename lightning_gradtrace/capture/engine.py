"""The tape engine: from the uses of one micro-batch to a share per parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.placement import Placement, Placer, Probe, UnattributableError
from lightning_gradtrace.capture.rules import Call
from lightning_gradtrace.capture.rules._general import general_shares
from lightning_gradtrace.capture.shares import Share, add_shares
from lightning_gradtrace.capture.tape import Tape, Use


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
    """

    placer: Placer = field(default_factory=Placer)

    def tape(self, parameters: Mapping[str, Tensor]) -> Tape:
        """Return a tape for one forward and backward pass; enter it around the forward pass."""
        return Tape(parameters)

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
        uses = [use for use in tape.uses if use.cotangents]
        parts: dict[str, list[Share]] = {}
        for use, placement in zip(uses, self.placer.place(uses, n_samples, probe), strict=True):
            for name, share in _shares(use, placement, n_samples).items():
                parts.setdefault(name, []).append(share)
        tape.uses.clear()
        return MicroBatch(n_samples, {name: add_shares(found) for name, found in parts.items()})


def _shares(use: Use, placement: Placement, n_samples: int) -> dict[str, Share]:
    shares = _closed_form(use, placement, n_samples)
    if shares is not None:
        return shares
    _check_untouched(use, use.operands)
    try:
        return general_shares(use, placement.inputs, placement.outputs, n_samples)
    except RuntimeError as error:
        names = ", ".join(f"`{name}`" for name in use.site.parameters)
        raise UnattributableError(
            f"GradTrace: can't attribute {names}: {use.site} has no closed-form rule, and the general rule can't "
            f"run it sample by sample ({error}). Leave the parameter out with `GradTrace(params=...)`."
        ) from error


def _closed_form(use: Use, placement: Placement, n_samples: int) -> dict[str, Share] | None:
    """Return the shares by the use's rule, None if it has none or the rule leaves this layout to the general rule."""
    bound = use.bound()
    if bound is None or use.cotangents.keys() != {0}:
        return None
    _check_untouched(use, bound.reads)
    axis = placement.outputs[0]
    cotangent = axis.samples_first(use.cotangents[0], n_samples)
    samples = cotangent
    if bound.place is not None:
        samples = placement.inputs[bound.place].samples_first(bound.values[bound.source], n_samples)
    wanted = frozenset(bound.lineages)
    shares = bound.rule.shares(Call(bound.values, bound.source, samples, cotangent, axis, n_samples, wanted))
    if shares is None:
        return None
    result: dict[str, Share] = {}
    for argument, share in shares.items():
        for name, pulled in bound.lineages[argument].pull_back(share).items():
            result[name] = add_shares([result[name], pulled]) if name in result else pulled
    return result


def _check_untouched(use: Use, places: Iterable[int]) -> None:
    """Refuse inputs that were overwritten in place after the use: the share would be that of other numbers."""
    for i in places:
        operand = use.leaves[i]
        if operand.tensor._version != operand.version:
            names = ", ".join(f"`{name}`" for name in use.site.parameters)
            raise UnattributableError(
                f"GradTrace: the input of {use.site} was changed in place after it was used, so the share of {names} "
                "can't be computed. Replace the in-place operation in the model by its out-of-place form."
            )

"""Turns one use into shares: by its closed form, by slicing or by masking, whichever is right and cheapest.

Which one is right is decided by a check, the first time that a use is seen: the shares, each with a weight of its own,
must add up to one vector-Jacobian product of the whole use with the cotangent weighted in the same way. That holds for
any weights only if every single share is right. Masking is right by definition and needs no check.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.derived import Derived, Lineage, OverwrittenError
from lightning_gradtrace.capture.forward.use import BoundUse, Use
from lightning_gradtrace.capture.placing.placement import UnattributableError, UsePlaces
from lightning_gradtrace.capture.precision import brought_to
from lightning_gradtrace.capture.routes.rows import Rows
from lightning_gradtrace.capture.rules import Call
from lightning_gradtrace.capture.rules._general import (
    UnrepeatableError,
    masked_shares,
    own_cotangents,
    sliced_shares,
    weighted_sums,
)
from lightning_gradtrace.capture.shares import Share

Shares = dict[Lineage, Share]
Way = Callable[[Use, UsePlaces, int], Shares | None]

# Largest relative error of a weighted sum of shares, with room for another order of summation.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 3e-2


@dataclass
class Attribution:
    """Remembers by which way the shares of every site of a model are computed."""

    _ways: dict[Any, str] = field(default_factory=dict)
    _entangled: dict[Any, bool] = field(default_factory=dict)

    def shares(self, use: Use, placement: UsePlaces, n_samples: int) -> Shares:
        """Return the shares of the tracked tensors that a use received.

        Args:
            use: the use, with its cotangents.
            placement: where the samples are.
            n_samples: number of samples.

        Returns:
            Shares of tensors that the use received, or, by masking, of the parameters behind them.

        Raises:
            UnattributableError: an argument was overwritten, or the use can't be run again.
            AssertionError: never; masking always gives shares.
        """
        key = (use.site, use.switches, n_samples == 1)
        names = ", ".join(f"`{name}`" for name in use.site.parameters)
        try:
            if len(use.cotangents) > 1:
                use = self._disentangled(key, use)
            way = self._ways.get(key)
            if way is not None:
                found = _WAYS[way](use, placement, n_samples)
                if found is not None:
                    return found
            for way, shares in _attempts(use, placement, n_samples):
                if way == "masked" or _agrees(use, placement, shares, n_samples):
                    self._ways[key] = way
                    return shares
                if way == "closed":
                    warnings.warn(
                        f"GradTrace: the closed form of `{use.site.function}` disagrees with autograd for {names} in "
                        f"{use.site}; the general rule serves instead. Please report this use.",
                        stacklevel=2,
                    )
        except OverwrittenError as error:
            raise UnattributableError(
                f"GradTrace: the input of {use.site} was changed in place after it was used, so the share of {names} "
                "can't be computed. Replace the in-place operation in the model by its out-of-place form."
            ) from error
        except UnrepeatableError as error:
            raise UnattributableError(
                f"GradTrace: can't attribute {names}: {use.site} draws random numbers that can't be drawn again. Move "
                "the dropout out of it, or leave the parameter out with `GradTrace(params=...)`."
            ) from error
        except RuntimeError as error:
            raise UnattributableError(
                f"GradTrace: can't attribute {names}: {use.site} has no closed-form rule, and the general rule can't "
                f"run it again ({error}). Leave the parameter out with `GradTrace(params=...)`."
            ) from error
        raise AssertionError("masking always gives shares")

    def _disentangled(self, key: Any, use: Use) -> Use:
        """Return the use with cotangents of its outputs alone; whether they differ is found out once."""
        if self._entangled.get(key, True):
            own = own_cotangents(use)
            self._entangled[key] = any(own[i] is not cotangent for i, cotangent in use.cotangents.items())
            use = replace(use, cotangents=own)
        return use


def _attempts(use: Use, placement: UsePlaces, n_samples: int) -> Iterator[tuple[str, Shares]]:
    for name, way in _WAYS.items():
        try:
            shares = way(use, placement, n_samples)
        except (RuntimeError, IndexError, ValueError):
            if name in ("closed", "masked"):
                raise
            continue
        if shares is not None:
            yield name, shares


def _agrees(use: Use, placement: UsePlaces, shares: Shares, n_samples: int) -> bool:
    """Check every share at once: weighted in the same way, shares and cotangents give the same sum."""
    device = next(iter(use.cotangents.values())).device
    numbers = torch.arange(1, n_samples + 1, dtype=torch.float64, device="cpu")
    weights = brought_to(device, 0.5 + torch.frac(numbers * 0.6180339887498949))
    try:
        wanted = weighted_sums(use, placement.outputs, weights)
    except OverwrittenError:
        if use.rule is None:
            raise
        return True  # the rule does not read what was overwritten; sums are compared with `.grad` all the same
    for lineage, share in shares.items():
        found, right = share.weighted_total(weights), wanted[lineage]
        error, size = torch.linalg.vector_norm(found - right), torch.linalg.vector_norm(right)
        if not size.isfinite():  # then nobody knows
            continue
        if not error <= _tolerance(use, right) * size:
            scale = torch.linalg.vector_norm(_without_cancellation(use, placement, weights)[lineage])
            if not error <= _tolerance(use, right) * (size + scale):
                return False
    return True


def _without_cancellation(use: Use, placement: UsePlaces, weights: Tensor) -> dict[Lineage, Tensor]:
    """Return sums of terms with random signs: what rounding is to be compared with where the true sum vanishes."""
    generator = torch.Generator().manual_seed(0)

    def signs(like: Tensor) -> Tensor:
        return torch.randint(2, like.shape, generator=generator, device="cpu").mul_(2).sub_(1).to(like)

    signed = replace(use, cotangents={i: c * signs(c) for i, c in use.cotangents.items()})
    return weighted_sums(signed, placement.outputs, weights)


def _tolerance(use: Use, gradient: Tensor) -> float:
    dtypes = {gradient.dtype, *(c.dtype for c in use.cotangents.values())}
    return max(_TOLERANCE.get(dtype, _COARSE) for dtype in dtypes) if use.around.autocast is None else _COARSE


def _closed_form(use: Use, placement: UsePlaces, n_samples: int) -> Shares | None:
    """Return the shares by the use's rule, None if it has none or the rule leaves this layout to the general rule."""
    bound = use.bound()
    if bound is None or use.cotangents.keys() != {0}:
        return None
    if placement.has_rows and not _keeps_rows(bound, placement):
        return None
    if not all(use.leaves[i].untouched for i in bound.reads):
        raise OverwrittenError
    axis = placement.outputs[0]
    cotangent = axis.samples_first(use.cotangents[0], n_samples)
    samples = cotangent
    if bound.place is not None:
        samples = placement.inputs[bound.place].samples_first(bound.values[bound.source], n_samples)
    wanted = frozenset(bound.lineages)
    found = bound.rule.shares(Call(bound.values, bound.source, samples, cotangent, axis, n_samples, wanted))
    return None if found is None else {bound.lineages[argument]: share for argument, share in found.items()}


def _keeps_rows(bound: BoundUse, placement: UsePlaces) -> bool:
    """Say whether a rule can read picked rows: its output holds the rows of its input, in the same leading axes.

    A rule that finds the samples in its output alone (bags of unlike sizes) doesn't mind where its input comes from.
    """
    if bound.place is None:
        return not isinstance(placement.outputs[0], Rows)
    place = placement.inputs.get(bound.place)
    if not isinstance(place, Rows) or not isinstance(placement.outputs[0], Rows):
        return False
    axes = {axis: out for axis, out in bound.axes.items() if axis < place.n_rows}
    return axes == {axis: axis for axis in range(place.n_rows)} and placement.outputs[0].n_rows == place.n_rows


def _sliced(use: Use, placement: UsePlaces, n_samples: int) -> Shares | None:
    if placement.has_rows:
        return None
    return sliced_shares(use, placement.inputs, placement.outputs, {}, n_samples)


def _sliced_too(use: Use, placement: UsePlaces, n_samples: int) -> Shares | None:
    """Slice derived tensors as well that hold a slice for each sample, such as an expanded class token."""
    if n_samples == 1 or placement.has_rows or any(axis.factor != "whole" for axis in placement.outputs.values()):
        return None
    (place, axis), *_ = placement.outputs.items()
    from_the_right = axis.axis - use.cotangents[place].dim()
    cut = {}
    for lineage in use.lineages.values():
        own = lineage.tensor.dim() + from_the_right
        if isinstance(lineage, Derived) and own >= 0 and lineage.tensor.shape[own] == n_samples:
            cut[lineage] = own
    return sliced_shares(use, placement.inputs, placement.outputs, cut, n_samples) if cut else None


def _masked(use: Use, placement: UsePlaces, n_samples: int) -> Shares | None:
    return masked_shares(use, placement.outputs, n_samples)


_WAYS: dict[str, Way] = {"closed": _closed_form, "sliced": _sliced, "sliced too": _sliced_too, "masked": _masked}

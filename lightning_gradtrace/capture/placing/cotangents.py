"""What cotangents tell of the places of samples: a sum hands its own to everything that it is the sum of.

Embeddings of zeros, such as token types, are the same whatever the order of the samples, so no permuted batch tells
which axis of them holds the samples. The embeddings of words that they are added to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.forward.use import BoundUse, Site, Use
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis
from lightning_gradtrace.capture.placing.settling import Options, Place
from lightning_gradtrace.capture.routes.rows import Rows

AnyAxis = SampleAxis | Rows
Told = dict[tuple[Any, ...], AnyAxis]
"""By address and layout of a cotangent, where it holds the samples."""


def after(bound: BoundUse, axis: AnyAxis) -> Any:
    """Return where the samples of a rule's input come out, None if nowhere; rows come out where they went in."""
    if isinstance(axis, Rows) or axis.factor == "single":
        return axis
    return replace(axis, axis=bound.axes[axis.axis]) if axis.axis in bound.axes else None


def told(
    uses: Sequence[Use], options: Mapping[Site, Options], known: Mapping[Site, Mapping[int, AnyAxis]]
) -> dict[Site, Options]:
    """Of several places keep those that cotangents tell.

    Args:
        uses: uses of one micro-batch, with cotangents.
        options: the places that are left at sites that were not known before.
        known: the places in the outputs at the others.

    Returns:
        The places that are left now.
    """
    by_cotangent = _told(uses, options, known)
    return {use.site: _chosen(use, options[use.site], by_cotangent) for use in uses if use.site in options}


def _told(uses: Sequence[Use], options: Mapping[Site, Options], known: Mapping[Site, Mapping[int, AnyAxis]]) -> Told:
    """Return where the samples are in the cotangents of those uses that leave no doubt."""
    told: Told = {}
    for use in uses:
        bound = use.bound()
        for i, cotangent in use.cotangents.items():
            if use.site in known:
                found: Any = known[use.site].get(i)
            else:
                place = _decisive(bound, i)
                left = options.get(use.site, {}).get(place, [])
                found = _comes_out(bound, place, left[0]) if len(left) == 1 else None
            if found is not None:
                told.setdefault(_identity(cotangent), found)
    return told


def _chosen(use: Use, options: Options, told: Told) -> Options:
    bound, kept = use.bound(), dict(options)
    for i, cotangent in use.cotangents.items():
        place, known = _decisive(bound, i), told.get(_identity(cotangent))
        left = options.get(place, [])
        fitting = [option for option in left if _comes_out(bound, place, option) == known]
        if known is not None and len(left) > 1 and fitting:
            kept[place] = fitting
    return kept


def _decisive(bound: BoundUse | None, output: int) -> Place:
    """Return the tensor of a use whose samples are looked for."""
    return Place(False, output) if bound is None or bound.place is None else Place(True, bound.place)


def _comes_out(bound: BoundUse | None, place: Place, axis: SampleAxis) -> Any:
    return after(bound, axis) if bound is not None and place.is_input else axis


def _identity(cotangent: Tensor) -> tuple[Any, ...]:
    return cotangent.data_ptr(), cotangent.shape, cotangent.stride()

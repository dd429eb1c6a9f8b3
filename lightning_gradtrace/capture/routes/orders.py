"""Whose the results of functions are that sort, count or number what the samples hold.

What is sorted along the axis of the samples is followed by its order. The order itself, the distinct values and the
counts of a batch are *nobody's* (`rows.py`): they hold no samples, whatever their size. So are whole numbers of the
samples that are strung together with others, such as words and negatives: those are of no sample, or of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.forward.functions import names_of
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis, candidates
from lightning_gradtrace.capture.routes.rows import LOST, NOBODY, Fate, Owners, Route, constant

SORTS = {"sort": (1, -1), "topk": (2, -1), "argsort": (1, -1)}
"""Place of the axis among the arguments, and its default."""
PLACES = names_of("nonzero argwhere")
_COUNTS = names_of("bincount histc histogram")
_UNIQUE = names_of("unique _unique _unique2 unique_consecutive")
GATHERS = _COUNTS | _UNIQUE
STRINGS = names_of("cat concat concatenate")


def gathered(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], own: Route | None, n_outputs: int, n_samples: int
) -> list[Route | None]:
    """Return the routes of the outputs of a function of `GATHERS`: of all but the numbers that lead back to them.

    Args:
        name: name of the function.
        args: its positional arguments, what is gathered first.
        kwargs: its named arguments.
        own: route of the first argument.
        n_outputs: number of tensors that it returned.
        n_samples: number of samples.
    """
    found: list[Route | None] = [NOBODY] * n_outputs
    if name in _COUNTS:
        return found
    dim, shape = kwargs.get("dim"), args[0].shape
    if dim is not None and (own is not None or {o.axis for o in candidates(shape, n_samples)} != {dim % len(shape)}):
        return [LOST] * n_outputs
    if n_outputs > 1 and (name.startswith("_") or kwargs.get("return_inverse")):
        # The numbers change with the order of the samples; where they are is found out from what they number.
        places: dict[SampleAxis, Owners] = {axis: axis for axis in candidates(shape, n_samples)} if dim is None else {}
        found[1] = Route(args[0].detach(), places) if places and own is None else own
    return found


def sorted_along(axis: int, owners: Tensor, outputs: Sequence[Tensor], is_noise: bool) -> list[Tensor | Fate]:
    """Return the owners of the outputs of a function of `SORTS`: values, if it returns them, and their order.

    Args:
        axis: the axis that was sorted.
        owners: those of what was sorted.
        outputs: what the function returned, the order last.
        is_noise: whether it was drawn: then nobody knows whether the sorted values are those of the samples, as times
            that were drawn in order, or of all of them, as a grid of times.
    """
    values = owners.gather(axis, outputs[-1])
    order = values if constant(owners, axis) else Fate.NOBODY
    return [Fate.LOST if is_noise else values, order][-len(outputs) :]


def placed(condition: Tensor, owners: Tensor, outputs: Sequence[Tensor]) -> list[Tensor | Fate]:
    """Return the owners of the outputs of a function of `PLACES`, which say where something holds."""
    rows = owners[condition != 0]
    return [rows.unsqueeze(-1).expand(t.shape) if t.dim() == 2 else rows for t in outputs]


def strings_numbers(args: Sequence[Any], kwargs: Mapping[str, Any], own: Callable[[Tensor], bool], n: int) -> bool:
    """Say whether a function of `STRINGS` appends whole numbers to those of the samples, along the samples' axis.

    Args:
        args: its positional arguments.
        kwargs: its named arguments.
        own: says whether a tensor holds the samples' own numbers, not constants or what was drawn.
        n: number of samples.
    """
    parts = args[0] if args else kwargs["tensors"]
    axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    samples = [part for part in parts if own(part)]
    if len(samples) in (0, len(parts)) or any(part.is_floating_point() or part.is_complex() for part in parts):
        return False
    shape = samples[0].shape
    return [option.axis for option in candidates(shape, n) if option.factor == "whole"] == [axis % len(shape)]

"""What a torch function does besides computing a result, read off its name and the tags of its operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


def names_of(text: str) -> frozenset[str]:
    """Return the names in a text, separated by blanks."""
    return frozenset(text.split())


_IN_PLACE = names_of(
    "__iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __ipow__ __imod__ __iand__ __ior__ __ixor__ __setitem__"
)
_ADDITIVE = names_of("add_ sub_ __iadd__ __isub__")
_FRESH = names_of("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty")
_SHAPE_ONLY = names_of("to type_as expand_as view_as reshape_as")
_FROM_DATA = names_of("tensor as_tensor from_numpy frombuffer asarray new_tensor stack cat pad_sequence")
_RANDOM = names_of(
    "rand randn randint normal rand_like randn_like randint_like bernoulli poisson multinomial normal_ uniform_ "
    "bernoulli_ random_ exponential_"
)
_RUNNING_STATISTICS = {"batch_norm": (3, 4, 5), "instance_norm": (3, 4, 5)}  # places of mean, variance, "training"
_ATTRIBUTES = names_of(
    "shape dtype device layout ndim is_nested is_sparse is_cpu is_cuda is_mps is_xpu is_meta is_mkldnn is_quantized "
    "is_leaf requires_grad itemsize nbytes"
)
_QUESTIONS = names_of(
    "dim size stride numel nelement is_floating_point is_complex is_contiguous get_device element_size"
)
METADATA = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES]
    + [getattr(of, name) for of in (torch.Tensor, torch) for name in _QUESTIONS if hasattr(of, name)]
)
"""Functions that say something about a tensor and read nothing of what is in it: nearly half of all calls."""


@dataclass(frozen=True)
class Facts:
    """Facts about one torch function.

    Attributes:
        name: its name.
        in_place: writes its result into its first argument.
        additive: in place, and its derivative does not depend on what the first argument was.
        fresh: returns a constant; tensors among its arguments give only a shape and a dtype.
        shape_only: tensors after the first argument give only a shape or a dtype.
        from_data: makes a tensor of numbers that are no tensor.
        draws: a source of random numbers, not a function of its arguments alone.
        random: draws random numbers, as dropout does.
        detached: returns a tensor that no gradient passes.
        pointwise: every entry of the result depends on the entries at the same place of its arguments.
    """

    name: str
    in_place: bool
    additive: bool
    fresh: bool
    shape_only: bool
    from_data: bool
    draws: bool
    random: bool
    detached: bool
    pointwise: bool


def tensors_among(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among arguments or results, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_among(value)


@functools.cache
def facts(function: Callable[..., Any]) -> Facts:
    """Return the facts about a torch function as a function mode sees it."""
    name = str(getattr(function, "__name__", function))
    if name == "__get__":  # an attribute such as `Tensor.T`
        name = str(getattr(getattr(function, "__self__", None), "__name__", name))
    public = name.strip("_") if name.startswith("__") else name.rstrip("_")
    tags = _tags(public)
    return Facts(
        name=name,
        in_place=name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")),
        additive=name in _ADDITIVE,
        fresh=name in _FRESH,
        shape_only=name in _SHAPE_ONLY,
        from_data=name in _FROM_DATA,
        draws=name in _RANDOM,
        random=torch.Tag.nondeterministic_seeded in tags,
        detached=name in ("detach", "data"),
        pointwise=torch.Tag.pointwise in tags,
    )


def _tags(name: str) -> set[torch.Tag]:
    """Return the tags of all overloads of an operator; of its out-of-place form for ``iadd`` and the like."""
    for candidate in (name, name[1:] if name[:1] in ("i", "r") else name):
        packet = getattr(torch.ops.aten, candidate, None)
        if packet is not None:
            return {tag for overload in packet.overloads() for tag in getattr(packet, overload).tags}
    return set()


def without_running_statistics(name: str, leaves: list[Any]) -> list[Any]:
    """Blank the running statistics of a normalisation that takes its statistics from the batch.

    It writes them and does not read them: their values must be changed by no second run and need not be kept.
    """
    places = _RUNNING_STATISTICS.get(name)
    if places is None or len(leaves) <= places[2] or leaves[places[2]] is not True:
        return leaves
    return [None if i in places[:2] else leaf for i, leaf in enumerate(leaves)]

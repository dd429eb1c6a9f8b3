"""The random numbers of a forward pass, and the same pass with the samples' own random numbers in another order.

A model that is run on its batch permuted gives its results permuted only if each sample keeps the random numbers that
it met. Which numbers are the samples' own can't be told from sizes - a mask over features may be as long as the
batch - so every draw has *options*: the places where its tensor could hold the samples, and to stay as it is.

Played again is what operators draw from sizes, from constants and from activations whose samples changed places as the
draw's do (sampled actions and tokens). What they draw from other activations would bring the first run's with it; it is
drawn anew.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_gradtrace.capture.forward.functions import names_of
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis, candidates
from lightning_gradtrace.capture.placing.comparing import is_permuted

T = TypeVar("T")

_TRAINERS = frozenset(("lightning", "pytorch_lightning", __name__.partition(".")[0]))
_OWN = _TRAINERS | {"torch"}
_CHECKPOINTS = "torch.utils.checkpoint"  # runs layers again, from elsewhere
_SOURCES = names_of(
    "rand randn randint randperm normal uniform bernoulli exponential geometric log_normal cauchy random poisson "
    "binomial multinomial _standard_gamma _sample_dirichlet rand_like randn_like randint_like"
)
_MASKED = "native_dropout"  # returns what it masked and the mask


@dataclass(frozen=True)
class DrawSite:
    """Where in a user's code random numbers are drawn with the number of samples among their axes.

    Attributes:
        function: name of the torch function.
        shape: the shape of what it draws, -1 for the number of samples.
        lines: the different lines of code that led to it, from the inside, up to the training step.
    """

    function: str
    shape: tuple[int, ...]
    lines: tuple[str, ...]

    @classmethod
    def here(cls, function: str, shape: Sequence[int], n_samples: int) -> DrawSite:
        """Return the site of a draw that has just been made."""
        frame: Any = sys._getframe(1)
        while frame is not None and _root(frame) in _OWN:
            frame = frame.f_back
        lines = dict[str, None]()
        while frame is not None and _root(frame) not in _TRAINERS and frame.f_globals.get("__name__") != _CHECKPOINTS:
            if _root(frame) != "torch":
                lines[f"{frame.f_code.co_filename}:{frame.f_lineno}"] = None
            if frame.f_code.co_name == "training_step":
                break
            frame = frame.f_back
        return cls(function, tuple(-1 if size == n_samples else size for size in shape), tuple(lines))

    def __str__(self) -> str:
        return f"`{self.function}` in {self.lines[0]}" if self.lines else f"`{self.function}`"


def _root(frame: Any) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


class _Everywhere:
    def __contains__(self, site: object) -> bool:
        return True


EVERYWHERE: Container[DrawSite] = _Everywhere()
"""All places in the code."""


@dataclass(frozen=True)
class Draw:
    """What one operator drew.

    Attributes:
        operator: the operator.
        values: copies of the tensors that it returned or filled.
        inputs: copies of the tensors that it read.
    """

    operator: Any
    values: Sequence[Tensor]
    inputs: Sequence[Tensor]

    def options(self, n_samples: int) -> list[SampleAxis | None]:
        """Return where its samples may be, None if all samples share it.

        An axis of their number comes first, because most draws are the samples' own; a multiple of it comes last,
        because most axes are longer for other reasons.
        """
        places = candidates(self.values[0].shape, n_samples) if self.values else []
        whole = [place for place in places if place.factor == "whole"]
        return [*whole, None, *(place for place in places if place.factor != "whole")]

    def is_like(self, other: Draw, order: Tensor | None = None) -> bool:
        """Say whether another pass drew from the same numbers: then it would draw the same.

        Args:
            other: the draw of the other pass.
            order: which samples that pass held; the numbers that it drew from may be in this order.
        """
        return (
            other.operator is self.operator
            and [v.shape for v in self.values] == [v.shape for v in other.values]
            and len(self.inputs) == len(other.inputs)
            and all(
                torch.equal(a, b) or (order is not None and is_permuted(a, b, order))
                for a, b in zip(self.inputs, other.inputs, strict=True)
            )
        )


class Draws(TorchDispatchMode):
    """Keeps the random numbers of a pass while it is active, or plays those of an earlier pass.

    Args:
        earlier: the draws of the earlier pass; none to draw anew.
        places: by number of the draw, where the samples are in it; others are played as they were.
        order: which samples the pass holds.

    Attributes:
        made: the draws.
        sites: which of them were made where, of those that may be the samples' own.
    """

    def __init__(
        self,
        earlier: Sequence[Draw] = (),
        places: Mapping[int, SampleAxis] | None = None,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.made: list[Draw] = []
        self.sites: dict[DrawSite, set[int]] = {}
        self._earlier = earlier
        self._places = places or {}
        self._order = order

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the operator, and keep or replace what it draws."""
        with torch._C.DisableTorchFunction():  # what a backward pass calls is no function of the user's
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if name.rstrip("_") in _SOURCES:
                written = 1 if name.endswith(("_", "_like")) else 0  # gives its shape alone
                inputs = _dense(tree_leaves((args[written:], kwargs or {})))
                self._play(Draw(func, _dense(tree_leaves(result)), inputs))
            elif name == _MASKED and args[2] and args[1] < 1:
                masked, mask = result
                if self._play(Draw(func, [mask], [])):
                    masked.copy_(args[0] * mask / (1 - args[1]))
        return result

    def note(self, site: DrawSite, tensor: Tensor) -> None:
        """Take note of where the last draw was made, if it is what a tensor holds."""
        if self.made and self.made[-1].values and self.made[-1].values[0].shape == tensor.shape:
            self.sites.setdefault(site, set()).add(len(self.made) - 1)

    def _play(self, draw: Draw) -> bool:
        """Replace what was drawn by what the earlier pass drew, and keep it; say whether it was replaced."""
        number, order = len(self.made), self._order
        earlier = self._earlier[number] if number < len(self._earlier) else None
        place = self._places.get(number)
        if earlier is not None and not earlier.is_like(draw, None if place is None else order):
            earlier = None
        if earlier is not None:
            for value, before in zip(draw.values, earlier.values, strict=True):
                if place is not None and order is not None and place.fits(before.shape, len(order)):
                    value.copy_(place.permute(before, order.to(before.device)))
                else:
                    value.copy_(before)
        self.made.append(Draw(draw.operator, [v.clone() for v in draw.values], [v.clone() for v in draw.inputs]))
        return earlier is not None


def _dense(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout is torch.strided]


def call_open(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a function so that its random numbers are drawn by operators, not inside a kernel of its own.

    That is attention with dropout on a GPU, which then takes the memory of all attention weights.
    """
    attends = function is torch.nn.functional.scaled_dot_product_attention
    if attends and kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0):
        with sdpa_kernel(SDPBackend.MATH):
            return function(*args, **kwargs)
    return function(*args, **kwargs)


def arrange(
    draws: Sequence[Draw],
    n_samples: int,
    run: Callable[[Mapping[int, SampleAxis]], T],
    count_unexplained: Callable[[T], int],
    most_trials: int,
    fixed: Container[int] = (),
) -> tuple[dict[int, SampleAxis], T, int]:
    """Find out where the samples are in the draws of a pass, by trying.

    The options are tried draw by draw, because what a model computes early depends on its early draws only; then those
    of two draws at a time.

    Args:
        draws: the draws.
        n_samples: number of samples.
        run: makes the pass on the permuted batch, given places.
        count_unexplained: counts the tensors that are neither as they were nor permuted.
        most_trials: how often the pass may be made beside the first time.
        fixed: numbers of draws that hold no samples.

    Returns:
        The places by number of the draw, the pass with them, and how many of its tensors are unexplained.
    """
    options = {i: found for i, draw in enumerate(draws) if i not in fixed and len(found := draw.options(n_samples)) > 1}
    chosen = {i: found[0] for i, found in options.items()}
    best = run(_placed(chosen))
    unexplained = count_unexplained(best)
    others = [(i, option) for i, found in options.items() for option in found[1:]]
    pairs = itertools.combinations(others, 2)  # two draws may meet in one tensor
    for change in itertools.islice(itertools.chain(((one,) for one in others), pairs), most_trials):
        if not unexplained:
            break
        other = {**chosen, **dict(change)}
        tried = run(_placed(other))
        if (count := count_unexplained(tried)) < unexplained:
            chosen, best, unexplained = other, tried, count
    return _placed(chosen), best, unexplained


def _placed(chosen: Mapping[int, SampleAxis | None]) -> dict[int, SampleAxis]:
    return {i: place for i, place in chosen.items() if place is not None}

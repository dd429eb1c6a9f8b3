"""What a layer rule is, and the registry that finds the rule of a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.placing.batch_axis import SampleAxis
from lightning_gradtrace.capture.routes.rows import Rows
from lightning_gradtrace.capture.shares import Share

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """One use, cut into samples: what a rule gets.

    Attributes:
        arguments: the arguments by name, as the use received them, detached.
        source: name of the argument that holds the samples, empty if the rule reads no such argument.
        input: that argument with the samples along axis 0 and every other axis in its old order.
        cotangent: gradient of the loss with respect to the (first) output, laid out in the same way.
        axis: place of the samples in the output.
        n_samples: number of samples.
        wanted: names of the arguments whose shares are wanted.
    """

    arguments: Arguments
    source: str
    input: Tensor
    cotangent: Tensor
    axis: SampleAxis | Rows
    n_samples: int
    wanted: frozenset[str]

    def cut(self, tensor: Tensor) -> Tensor:
        """Return a tensor laid out like the output with the samples along axis 0, as ``cotangent`` is."""
        return self.axis.samples_first(tensor, self.n_samples)

    def position(self, axis: int) -> int:
        """Return where an axis of the output is in ``cotangent``."""
        if self.axis.factor != "whole" or axis < self.axis.axis:
            return axis + 1
        return 0 if axis == self.axis.axis else axis


# None: the closed form doesn't hold for this layout, the general rule must serve.
Shares = dict[str, Share] | None
ShareFunction = Callable[[Call], Shares]
Axes = Callable[[Arguments, str], Mapping[int, int]]


@dataclass(frozen=True)
class Rule:
    """Closed form of the per-sample gradients of one torch function.

    Attributes:
        function: the function as a function mode sees it, e.g. ``torch.layer_norm``.
        arguments: names of its positional arguments.
        inputs: the arguments that may hold the samples; the first that is no parameter does. Empty if the samples
            are to be looked for in the output.
        parameters: the arguments whose shares the rule can give.
        reads: the arguments whose values the rule reads: these must not be changed in place after the use.
        axes: ``(arguments, input) -> {axis of the input: axis of the output}``, where samples may be. Without inputs
            the axes of the output stand on both sides.
        shares: gives the shares of a `Call`, by argument.
    """

    function: Callable[..., Any]
    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    parameters: frozenset[str]
    reads: frozenset[str]
    axes: Axes
    shares: ShareFunction

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the arguments of a call by name, None if they are not what the rule knows."""
        if len(args) > len(self.arguments) or not kwargs.keys() <= set(self.arguments):
            return None
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}


_RULES: dict[Callable[..., Any], Rule] = {}


def leading_axes(n_features: int | Callable[[Arguments], int]) -> Axes:
    """Return ``axes`` of a function that keeps all axes of its input but a number of trailing feature axes."""

    def axes(arguments: Arguments, name: str) -> Mapping[int, int]:
        count = n_features(arguments) if callable(n_features) else n_features
        return {axis: axis for axis in range(arguments[name].dim() - count)}

    return axes


def register(
    *functions: Callable[..., Any],
    arguments: str,
    input: str,
    parameters: str,
    reads: str | None = None,
    n_features: int | Callable[[Arguments], int] = 0,
    axes: Axes | None = None,
) -> Callable[[ShareFunction], ShareFunction]:
    """Register the decorated function as the rule of a torch function.

    Args:
        functions: the torch function, or all functions with the same arguments and meaning.
        arguments: names of its arguments, positional ones first, separated by blanks.
        input: name of the argument that holds the samples; several if any of them may.
        parameters: names of the arguments whose shares the rule gives, separated by blanks.
        reads: names of the arguments whose values the rule reads; all of them if None.
        n_features: trailing feature axes of the input: a number, or a function of the bound arguments.
        axes: instead of ``n_features``, where the output is not laid out like the input; see `Rule`.

    Returns:
        The decorator; it returns the rule's function unchanged.
    """

    def decorate(shares: ShareFunction) -> ShareFunction:
        names = tuple(arguments.split())
        read = frozenset(names if reads is None else reads.split())
        layout = axes or leading_axes(n_features)
        for function in functions:
            _RULES[function] = Rule(
                function, names, tuple(input.split()), frozenset(parameters.split()), read, layout, shares
            )
        return shares

    return decorate


def rule_for(function: Callable[..., Any]) -> Rule | None:
    """Return the rule of a torch function, None if it has none (the general rule then applies)."""
    return _RULES.get(function)


def registered() -> dict[Callable[..., Any], Rule]:
    """Return all rules by function."""
    return dict(_RULES)

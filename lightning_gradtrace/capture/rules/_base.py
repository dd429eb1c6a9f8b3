"""What a layer rule is, and the registry that finds the rule of a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.shares import Share

Arguments = Mapping[str, Any]
ShareFunction = Callable[[Arguments, Tensor, Tensor, frozenset[str]], dict[str, Share]]


@dataclass(frozen=True)
class Rule:
    """Closed form of the per-sample gradients of one torch function.

    Attributes:
        function: the function as a function mode sees it, e.g. ``torch.layer_norm``.
        arguments: names of its positional arguments.
        input: the argument that holds the samples.
        parameters: the arguments whose shares the rule can give.
        n_features: number of trailing axes of the input that hold features, from the bound arguments.
        shares: ``(arguments, input, cotangent, wanted) -> {argument: share}`` with the samples of input and
            cotangent along axis 0.
    """

    function: Callable[..., Any]
    arguments: tuple[str, ...]
    input: str
    parameters: frozenset[str]
    n_features: Callable[[Arguments], int]
    shares: ShareFunction

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}


_RULES: dict[Callable[..., Any], Rule] = {}


def register(
    function: Callable[..., Any],
    *,
    arguments: str,
    input: str,
    parameters: str,
    n_features: int | Callable[[Arguments], int] = 0,
) -> Callable[[ShareFunction], ShareFunction]:
    """Register the decorated function as the rule of a torch function.

    Args:
        function: the torch function.
        arguments: names of its positional arguments, separated by blanks.
        input: name of the argument that holds the samples.
        parameters: names of the arguments whose shares the rule gives, separated by blanks.
        n_features: trailing feature axes of the input: a number, or a function of the bound arguments.

    Returns:
        The decorator; it returns the rule's function unchanged.
    """
    count = n_features if callable(n_features) else lambda _: n_features

    def decorate(shares: ShareFunction) -> ShareFunction:
        names = tuple(arguments.split())
        _RULES[function] = Rule(function, names, input, frozenset(parameters.split()), count, shares)
        return shares

    return decorate


def rule_for(function: Callable[..., Any]) -> Rule | None:
    """Return the rule of a torch function, None if it has none (the general rule then applies)."""
    return _RULES.get(function)


def registered() -> dict[Callable[..., Any], Rule]:
    """Return all rules by function."""
    return dict(_RULES)

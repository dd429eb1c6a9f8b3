"""`torch.einsum` of one parameter and one other tensor, for any equation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_gradtrace.capture.rules._base import Arguments, Call, Shares, register
from lightning_gradtrace.capture.rules._contract import Equation, contract, shared_axes


def parse(equation: Any) -> Equation | None:
    """Return the letters of both operands and of the result, renamed to a, b, c, ... in the order of their appearance.

    None for what this rule leaves to the general one: more or fewer operands, an ellipsis, lists of numbers.
    """
    if not isinstance(equation, str) or "." in equation:
        return None
    operands, arrow, result = equation.replace(" ", "").partition("->")
    terms = operands.split(",")
    if len(terms) != 2:
        return None
    joined = "".join(terms)
    if not arrow:  # torch's convention: the letters that stand once, in alphabetical order, capitals first
        result = "".join(sorted(letter for letter in set(joined) if joined.count(letter) == 1))
    names = {letter: chr(ord("a") + i) for i, letter in enumerate(dict.fromkeys(joined))}
    if len(names) > 26:
        return None
    one, two, product = ("".join(names[letter] for letter in term) for term in (*terms, result))
    return one, two, product


def _axes(arguments: Arguments, name: str) -> Mapping[int, int]:
    letters = parse(arguments.get("equation"))
    return shared_axes(letters[0 if name == "first" else 1], letters[2]) if letters else {}


@register(
    torch.einsum,
    arguments="equation first second",
    input="first second",
    parameters="first second",
    axes=_axes,
)
def einsum(call: Call) -> Shares:
    """The einsum of the sample's input and cotangent over the letters that the parameter hasn't."""
    letters = parse(call.arguments["equation"])
    if letters is None or not {"first", "second"} <= call.arguments.keys():
        return None
    one, two, product = letters
    name, equation = ("second", (two, one, product)) if call.source == "first" else ("first", (one, two, product))
    share = contract(call, call.arguments[name], equation)
    return None if share is None else {name: share}

"""Uses that multiply a parameter with one other tensor and sum over shared axes: matmul, einsum and their like.

Written with one letter per axis, as in `torch.einsum`, all of them have the same share: the einsum of the sample's
input and cotangent over the letters that the parameter hasn't (docs/concepts.md, 2).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_gradtrace.capture.rules._base import Call
from lightning_gradtrace.capture.shares import DenseShare, OuterShare, Share
from lightning_gradtrace.capture.shares.contraction import Contraction, OuterView

Equation = tuple[str, str, str]


def shared_axes(source: str, result: str) -> Mapping[int, int]:
    """Return where samples may be, axis of the input to axis of the output: the letters that both have."""
    return {axis: result.index(letter) for axis, letter in enumerate(source) if letter in result}


def contract(call: Call, parameter: Tensor, letters: Equation, scale: float = 1.0) -> Share | None:
    """Return the share of a parameter that is multiplied with the call's input.

    Args:
        call: the use.
        parameter: the parameter, or what was derived from it.
        letters: letters of the parameter's, the input's and the output's axes, in lower case, as the use had them.
        scale: a number that the use multiplies the product with.

    Returns:
        The share: an outer product where the parameter's axes divide into those of the input and those of the
        output. None if the closed form doesn't apply: an axis of the parameter holds the samples, is broadcast, or
        meets no other axis; a letter stands twice in one operand.
    """
    weight, source, result = letters
    if any(len(set(term)) < len(term) for term in letters):
        return None
    if call.n_samples > 1 or call.axis.factor == "whole":
        sample = result[call.axis.axis]
        if sample in weight:
            return None
        if call.axis.factor == "whole":
            source, result = source.replace(sample, ""), result.replace(sample, "")
    sizes = dict(zip(result, call.cotangent.shape[1:], strict=True))
    x = call.input
    for letter in source:  # an input's axis of size 1 that others stretch is no axis of the product
        axis = source.index(letter) + 1
        wide = parameter.shape[weight.index(letter)] if letter in weight else sizes.get(letter, 1)
        if x.shape[axis] == 1 and wide > 1:
            x, source = x.squeeze(axis), source.replace(letter, "")
    sizes.update(zip(source, x.shape[1:], strict=True))
    if any(sizes.get(letter) != size for letter, size in zip(weight, parameter.shape, strict=True)):
        return None
    summed = [source.index(letter) + 1 for letter in source if letter not in weight + result]
    if summed:
        x, source = x.sum(summed), "".join(letter for letter in source if letter in weight + result)
    return _share(x, source, call.cotangent, result, weight, scale)


def _share(x: Tensor, source: str, cotangent: Tensor, result: str, weight: str, scale: float) -> Share:
    """Return the share for letters that are clean: each axis of the parameter is one of the input or the output."""
    columns = "".join(letter for letter in weight if letter in source and letter not in result)
    rows = "".join(letter for letter in weight if letter in result and letter not in source)
    positions = "".join(letter for letter in result if letter not in weight)
    outer = rows and columns and len(rows) + len(columns) == len(weight) and set(positions) <= set(source)
    if not outer:
        product = Contraction((cotangent, x), (result, source), weight, scale)
        # Without an axis of its own on either side the product is no larger than the other side.
        return product if rows and columns else DenseShare(product.dense())
    left, right = _matrix(cotangent, result, positions, rows), _matrix(x, source, positions, columns)
    if scale != 1:
        left = left * scale
    if weight == columns + rows and len(weight) == 2:
        return OuterShare(right, left)
    if weight == columns + rows:
        left, right, rows, columns = right, left, columns, rows
    matrix = OuterShare(left, right)
    if weight == rows + columns and len(weight) == 2:
        return matrix
    sizes = dict(zip(result + source, (*cotangent.shape[1:], *x.shape[1:]), strict=True))
    axes = rows + columns
    return OuterView(matrix, tuple(sizes[a] for a in axes), tuple(axes.index(a) for a in weight))


def _matrix(tensor: Tensor, letters: str, positions: str, features: str) -> Tensor:
    """Return a factor of an outer product, shape (sample, position, feature)."""
    order = [letters.index(letter) + 1 for letter in positions + features]
    tensor = tensor.permute(0, *order)
    n_positions = len(positions)
    flat = tensor.flatten(n_positions + 1).flatten(1, n_positions) if positions else tensor.flatten(1).unsqueeze(1)
    return flat

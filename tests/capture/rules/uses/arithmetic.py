"""Sums, products, quotients, choices and PReLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.capture.rules.uses._base import N, layer, on, use

D, P = {"w": (4,)}, {"w": (7, 4)}
X = (N, 7, 4)


def _changed_afterwards(m: nn.Module, x: Tensor) -> Tensor:
    x = x * 1.0
    y = x + m.w
    x.zero_()
    return y


ARITHMETIC = [
    use("add: feature", D, lambda m, x: x + m.w, X),
    use("add: position table", P, lambda m, x: m.w + x, X, share="DenseShare"),
    use("add: position table, samples second", {"w": (7, 1, 4)}, lambda m, x: x + m.w, (7, N, 4), axis=1),
    use("add: number", {"w": ()}, lambda m, x: torch.add(x, m.w, alpha=2), X),
    use("add: alpha of the parameter, method", D, lambda m, x: m.w.add(x, alpha=3), X),
    use("add: parameter stretches the input", P, lambda m, x: x.unsqueeze(1) + m.w, (N, 4)),
    use("add: parameter has more axes", {"w": (7, 1, 4)}, lambda m, x: x + m.w, (N, 4)),
    use("add: merged rows", D, lambda m, x: x.flatten(0, 1) + m.w, X),
    use("add_: in place", D, lambda m, x: (x * 2).add_(m.w, alpha=2), X),
    use("add: the input is changed afterwards", D, lambda m, x: _changed_afterwards(m, x), X),
    use("sub: parameter second", D, lambda m, x: x - m.w, X),
    use("sub: parameter first", P, lambda m, x: torch.sub(m.w, x, alpha=2), X),
    use("sub: parameter second, alpha", P, lambda m, x: x.sub(m.w, alpha=2), X),
    use("sub_: in place", D, lambda m, x: (x * 2).sub_(m.w), X),
    use("subtract: function", D, lambda m, x: torch.subtract(x, m.w), X),
    use("subtract_: in place", D, lambda m, x: (x * 2).subtract_(m.w), X),
    use("rsub: parameter second", D, lambda m, x: torch.rsub(x, m.w, alpha=2), X),
    use("rsub: parameter first", D, lambda m, x: torch.rsub(m.w, x, alpha=2), X),
    use("mul: feature", D, lambda m, x: m.w * x, X),
    use("mul: position", {"w": (7, 1)}, lambda m, x: x.mul(m.w), X),
    use("mul: samples second", {"w": (7, 1, 1)}, lambda m, x: x * m.w, (7, N, 4), axis=1),
    use("mul: whole numbers", D, lambda m, x: x * m.w, X, classes=5),
    use("mul: transposed parameter", {"w": (4, 7)}, lambda m, x: x * m.w.T, X),
    use("mul: parameter stretches the input", P, lambda m, x: x.unsqueeze(1) * m.w, (N, 4)),
    use("multiply: function", D, lambda m, x: torch.multiply(x, m.w), X),
    use("mul_: in place", D, lambda m, x: (x * 2).mul_(m.w), X),
    use("multiply_: in place", D, lambda m, x: (x * 2).multiply_(m.w), X),
    use("div_: in place", D, lambda m, x: (x * 2).div_(m.w), X),
    use("divide_: in place", D, lambda m, x: (x * 2).divide_(m.w), X),
    use("true_divide_: in place", D, lambda m, x: (x * 2).true_divide_(m.w), X),
    use(
        "div: rounded, added to a plain one",
        D,
        lambda m, x: torch.div(x, m.w, rounding_mode="floor") + x * m.w,
        X,
        closed=False,
    ),
    use("div: parameter below", D, lambda m, x: x / m.w, X),
    use("div: parameter above", P, lambda m, x: m.w / (2 + x.cos()), X),
    use("divide: method", D, lambda m, x: x.divide(m.w), X),
    use("true_divide: function", D, lambda m, x: torch.true_divide(x, m.w), X),
    use("where: chosen by the input", D, lambda m, x: torch.where(x > 0, x, m.w), X),
    use(
        "where: parameter first, fixed condition", D, lambda m, x: torch.where(torch.arange(7)[:, None] > 3, m.w, x), X
    ),
    use("where: method", D, lambda m, x: x.where(x > 0, m.w), X),
    use("where: two parameters", {"w": (4,), "v": (7, 1)}, lambda m, x: torch.where(x > 0, m.v, m.w), X),
]

ACTIVATION = [
    layer("prelu: one slope", nn.PReLU, X),
    layer("prelu: channels", lambda: nn.PReLU(4), (N, 4, 5)),
    layer("prelu: samples last", on(lambda: nn.PReLU(4), lambda m, x: m(x.movedim(0, 2))), (N, 5, 4)),
    layer("prelu: channels, rows", lambda: nn.PReLU(4), (N, 4)),
]

"""Linear and bilinear layers, products of matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.rules.uses._base import N, layer, on, use

W, V = {"w": (4, 5)}, {"w": (5,)}

LINEAR = [
    layer("linear: rows only", lambda: nn.Linear(4, 5), (N, 4)),
    layer("linear: four axes", lambda: nn.Linear(4, 5), (N, 2, 5, 4)),
    layer("linear: samples third", on(lambda: nn.Linear(4, 5), lambda m, x: m(x.movedim(0, 2))), (N, 2, 5, 4)),
    layer("linear: no bias", lambda: nn.Linear(4, 5, bias=False), (N, 7, 4), share="OuterShare"),
    layer(
        "linear: rows of samples and positions", on(lambda: nn.Linear(4, 5), lambda m, x: m(x.flatten(0, 1))), (N, 7, 4)
    ),
    layer(
        "linear: rows of positions and samples",
        on(lambda: nn.Linear(4, 5), lambda m, x: m(x.flatten(0, 1))),
        (7, N, 4),
        axis=1,
    ),
    use("linear: one output", V, lambda m, x: F.linear(x, m.w), (N, 7, 5), closed=False),
]

MATMUL = [
    use("matmul: on the right", W, lambda m, x: x @ m.w, (N, 7, 4), share="OuterShare"),
    use("matmul: on the right, rows", W, lambda m, x: torch.matmul(x, m.w), (N, 4)),
    use("matmul: on the right, samples second", W, lambda m, x: x @ m.w, (7, N, 4), axis=1),
    use("matmul: on the left", W, lambda m, x: m.w @ x, (N, 5, 7), share="OuterShare"),
    use("matmul: on the left, samples last", W, lambda m, x: m.w.matmul(x.T), (N, 5)),
    use("matmul: on the left, merged columns", W, lambda m, x: m.w @ x.movedim(2, 0).flatten(1), (N, 7, 5)),
    use("matmul: a vector on the right", V, lambda m, x: x @ m.w, (N, 7, 5), share="DenseShare"),
    use("matmul: a vector on the left", V, lambda m, x: m.w @ x, (N, 5, 7)),
    use("matmul: a matrix per head", {"w": (2, 4, 5)}, lambda m, x: x @ m.w, (N, 2, 7, 4), share="Contraction"),
    use("matmul: heads stretch the input", {"w": (2, 4, 5)}, lambda m, x: x.unsqueeze(1) @ m.w, (N, 7, 4)),
    use("matmul: a head stretched by the input", {"w": (1, 4, 5)}, lambda m, x: x @ m.w, (N, 2, 7, 4), closed=False),
    use("matmul: transposed parameter", {"w": (5, 4)}, lambda m, x: x @ m.w.T, (N, 7, 4), share="OuterShare"),
    use(
        "matmul: chunked parameter",
        {"w": (5, 8)},
        lambda m, x: x @ m.w.chunk(2, 1)[0] + x @ m.w.chunk(2, 1)[1],
        (N, 7, 5),
    ),
    use("mm: rows of samples and positions", W, lambda m, x: torch.mm(x.flatten(0, 1), m.w), (N, 7, 4)),
    use("mm: method", W, lambda m, x: x.mm(m.w), (N, 4)),
    use("mm: method of the parameter", W, lambda m, x: m.w.mm(x.T), (N, 5)),
    use("bmm: heads first", {"w": (2, 4, 5)}, lambda m, x: torch.bmm(x, m.w), (2, N, 4), axis=1, share="Contraction"),
    use("bmm: method", {"w": (2, 4, 5)}, lambda m, x: m.w.bmm(x.movedim(0, 2)), (N, 2, 5)),
    use("mv: a row per sample", V, lambda m, x: torch.mv(x, m.w), (N, 5)),
    use("mv: method, merged rows", V, lambda m, x: x.flatten(0, 1).mv(m.w), (N, 7, 5)),
    use("linalg_matmul: on the right", W, lambda m, x: torch.linalg.matmul(x, m.w), (N, 7, 4)),
    use(
        "addmm: Conv1D",
        {"w": (4, 5), "b": (5,)},
        lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w),
        (N, 7, 4),
        share="OuterShare",
    ),
    use("addmm: factors", {"w": (4, 5), "b": (1, 5)}, lambda m, x: m.b.addmm(x, m.w, beta=0.5, alpha=3), (N, 4)),
    use("addmm: on the left", {"w": (4, 5), "b": (4, 1)}, lambda m, x: torch.addmm(m.b, m.w, x.T), (N, 5)),
    use("addmm: fixed matrix", {"b": (5,)}, lambda m, x: torch.addmm(m.b, x, torch.ones(4, 5, dtype=x.dtype)), (N, 4)),
    use(
        "baddbmm: heads first",
        {"w": (2, 4, 5), "b": (1, 5)},
        lambda m, x: torch.baddbmm(m.b, x, m.w, alpha=2),
        (2, N, 4),
        axis=1,
    ),
    use("baddbmm: method", {"b": (7, 1)}, lambda m, x: m.b.baddbmm(x, x.mT, beta=2), (N, 7, 4)),
    use("addmv: rows", {"w": (5,), "b": (1,)}, lambda m, x: torch.addmv(m.b, x, m.w, beta=2, alpha=3), (N, 5)),
    use("addmv: method", {"w": (5,), "b": (1,)}, lambda m, x: m.b.addmv(x, m.w), (N, 5)),
]

BILINEAR = [
    layer(
        "bilinear: rows",
        on(lambda: nn.Bilinear(4, 2, 5), lambda m, x: m(x, x[..., :2].cos())),
        (N, 4),
        share="OuterView",
    ),
    layer(
        "bilinear: many positions",
        on(lambda: nn.Bilinear(4, 2, 2), lambda m, x: m(x, x[..., 1:3])),
        (7, N, 4),
        axis=1,
        share="Contraction",
    ),
    layer("bilinear: no bias", on(lambda: nn.Bilinear(4, 4, 5, bias=False), lambda m, x: m(x, x.cos())), (N, 2, 4)),
]

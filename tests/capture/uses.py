"""Uses of every function with a rule: what calls it, on which layouts, and whether the closed form serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N = 3


class Function(nn.Module):
    """A function of some bare parameters and the input."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], run: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(tuple(shape))))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@dataclass
class UseCase:
    """A module around one use.

    Attributes:
        name: its name.
        build: makes the module.
        input: shape of its input.
        axis: axis of the samples in the input.
        classes: number of tokens, for whole-number inputs.
        closed: whether the closed form serves; else the general rule must.
        share: class of the share of the first parameter, where it matters.
    """

    name: str
    build: Callable[[], nn.Module]
    input: Sequence[int]
    axis: int = 0
    classes: int | None = None
    closed: bool = True
    share: str | None = None

    def draw(self) -> Tensor:
        """Draw an input."""
        return torch.randint(self.classes, tuple(self.input)) if self.classes else torch.randn(*self.input)


def use(
    name: str, shapes: Mapping[str, Sequence[int]], run: Callable[..., Tensor], input: Sequence[int], **options: object
) -> UseCase:
    """Make the use case of a function of bare parameters."""
    return UseCase(name, lambda: Function(shapes, run), input, **options)


def layer(name: str, build: Callable[[], nn.Module], input: Sequence[int], **options: object) -> UseCase:
    """Make the use case of a layer."""
    return UseCase(name, build, input, **options)


def on(inner: Callable[[], nn.Module], run: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Wrap a layer in a function of it."""

    def build() -> nn.Module:
        module = Function({}, lambda self, x: run(self.layer, x))
        module.layer = inner()
        return module

    return build


W, V = {"w": (4, 5)}, {"w": (5,)}

LINEAR = [
    layer("linear: rows only", lambda: nn.Linear(4, 5), (N, 4)),
    layer("linear: four axes", lambda: nn.Linear(4, 5), (N, 2, 5, 4)),
    layer("linear: samples third", on(lambda: nn.Linear(4, 5), lambda m, x: m(x.movedim(0, 2))), (N, 2, 5, 4)),
    layer("linear: no bias", lambda: nn.Linear(4, 5, bias=False), (N, 7, 4), share="OuterShare"),
    layer("linear: rows of samples and positions", on(lambda: nn.Linear(4, 5), lambda m, x: m(x.flatten(0, 1))), (N, 7, 4)),
    layer("linear: rows of positions and samples", on(lambda: nn.Linear(4, 5), lambda m, x: m(x.flatten(0, 1))), (7, N, 4), axis=1),
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
    use("matmul: chunked parameter", {"w": (5, 8)}, lambda m, x: x @ m.w.chunk(2, 1)[0] + x @ m.w.chunk(2, 1)[1], (N, 7, 5)),
    use("mm: rows of samples and positions", W, lambda m, x: torch.mm(x.flatten(0, 1), m.w), (N, 7, 4)),
    use("mm: method", W, lambda m, x: x.mm(m.w), (N, 4)),
    use("mm: method of the parameter", W, lambda m, x: m.w.mm(x.T), (N, 5)),
    use("bmm: heads first", {"w": (2, 4, 5)}, lambda m, x: torch.bmm(x, m.w), (2, N, 4), axis=1, share="Contraction"),
    use("bmm: method", {"w": (2, 4, 5)}, lambda m, x: m.w.bmm(x.movedim(0, 2)), (N, 2, 5)),
    use("mv: a row per sample", V, lambda m, x: torch.mv(x, m.w), (N, 5)),
    use("mv: method, merged rows", V, lambda m, x: x.flatten(0, 1).mv(m.w), (N, 7, 5)),
    use("linalg_matmul: on the right", W, lambda m, x: torch.linalg.matmul(x, m.w), (N, 7, 4)),
    use("addmm: Conv1D", {"w": (4, 5), "b": (5,)}, lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w), (N, 7, 4), share="OuterShare"),
    use("addmm: factors", {"w": (4, 5), "b": (1, 5)}, lambda m, x: m.b.addmm(x, m.w, beta=0.5, alpha=3), (N, 4)),
    use("addmm: on the left", {"w": (4, 5), "b": (4, 1)}, lambda m, x: torch.addmm(m.b, m.w, x.T), (N, 5)),
    use("addmm: fixed matrix", {"b": (5,)}, lambda m, x: torch.addmm(m.b, x, torch.ones(4, 5, dtype=x.dtype)), (N, 4)),
    use("baddbmm: heads first", {"w": (2, 4, 5), "b": (1, 5)}, lambda m, x: torch.baddbmm(m.b, x, m.w, alpha=2), (2, N, 4), axis=1),
    use("baddbmm: method", {"b": (7, 1)}, lambda m, x: m.b.baddbmm(x, x.mT, beta=2), (N, 7, 4)),
    use("addmv: rows", {"w": (5,), "b": (1,)}, lambda m, x: torch.addmv(m.b, x, m.w, beta=2, alpha=3), (N, 5)),
    use("addmv: method", {"w": (5,), "b": (1,)}, lambda m, x: m.b.addmv(x, m.w), (N, 5)),
]

EINSUM = [
    use("einsum: heads", {"w": (2, 4, 5)}, lambda m, x: torch.einsum("btd,hde->bthe", x, m.w), (N, 7, 4), share="OuterView"),
    use("einsum: heads back", {"w": (2, 5, 4)}, lambda m, x: torch.einsum("bthe,hed->btd", x, m.w), (N, 7, 2, 5), share="OuterView"),
    use("einsum: parameter first", {"w": (5, 4)}, lambda m, x: torch.einsum("oi,bti->bto", m.w, x), (N, 7, 4), share="OuterShare"),
    use("einsum: input axis first", {"w": (4, 5)}, lambda m, x: torch.einsum("io,tbi->tbo", m.w, x), (7, N, 4), axis=1, share="OuterShare"),
    use("einsum: three rows axes", {"w": (2, 4, 2, 5)}, lambda m, x: torch.einsum("btd,hdke->khbte", x, m.w), (N, 7, 4), share="OuterView"),
    use("einsum: a matrix per head", {"w": (2, 4, 5)}, lambda m, x: torch.einsum("bthd,hde->bthe", x, m.w), (N, 7, 2, 4), share="Contraction"),
    use("einsum: a scale per head", {"w": (2, 4)}, lambda m, x: torch.einsum("bthd,hd->bthd", x, m.w), (N, 7, 2, 4)),
    use("einsum: summed positions", {"w": (4, 5)}, lambda m, x: torch.einsum("btd,de->be", x, m.w), (N, 7, 4)),
    use("einsum: outer product", {"w": (5,)}, lambda m, x: torch.einsum("bt,e->bte", x, m.w), (N, 7)),
    use("einsum: no arrow, blanks", {"w": (4, 5)}, lambda m, x: torch.einsum("B d, d e", x, m.w), (N, 4)),
    use("einsum: contracts positions", {"w": (7, 5)}, lambda m, x: torch.einsum("btd,tu->bud", x, m.w), (N, 7, 4), share="OuterShare"),
    use("einsum: ellipsis", {"w": (4, 5)}, lambda m, x: torch.einsum("...d,de->...e", x, m.w), (N, 7, 4), closed=False),
    use("einsum: diagonal", {"w": (4, 4)}, lambda m, x: torch.einsum("btd,dd->btd", x, m.w), (N, 7, 4), closed=False),
    use("einsum: parameter summed alone", {"w": (4, 5)}, lambda m, x: torch.einsum("btd,de->bt", x, m.w), (N, 7, 4), closed=False),
    use("einsum: stretched parameter", {"w": (1, 5)}, lambda m, x: torch.einsum("btd,de->bte", x, m.w), (N, 7, 4), closed=False),
    use("einsum: stretched input", {"w": (4, 5)}, lambda m, x: torch.einsum("btd,de->bte", x, m.w), (N, 7, 1)),
    use("einsum: three operands", {"w": (4, 5)}, lambda m, x: torch.einsum("btd,btd,de->bte", x, x, m.w), (N, 7, 4), closed=False),
    use("einsum: list of operands", {"w": (4, 5)}, lambda m, x: torch.einsum("btd,de->bte", [x, m.w]), (N, 7, 4), closed=False),
    use("einsum: transposed parameter", {"w": (2, 5, 4)}, lambda m, x: torch.einsum("btd,hde->bthe", x, m.w.mT), (N, 7, 4)),
]

BILINEAR = [
    layer("bilinear: rows", on(lambda: nn.Bilinear(4, 2, 5), lambda m, x: m(x, x[..., :2].cos())), (N, 4), share="OuterView"),
    layer("bilinear: many positions", on(lambda: nn.Bilinear(4, 2, 2), lambda m, x: m(x, x[..., 1:3])), (7, N, 4), axis=1, share="Contraction"),
    layer("bilinear: no bias", on(lambda: nn.Bilinear(4, 4, 5, bias=False), lambda m, x: m(x, x.cos())), (N, 2, 4)),
]


def _bags(m: nn.Module, x: Tensor) -> Tensor:
    """Bags of unlike sizes: the first index of each row says how many it has."""
    sizes = [int(row[0]) % 5 for row in x]
    indices = torch.cat([row[1 : 1 + size] for row, size in zip(x, sizes, strict=True)])
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return m(indices, offsets if m.include_last_offset else offsets[:-1])


def _weighted(m: nn.Module, x: Tensor) -> Tensor:
    return m(x, per_sample_weights=(x + 1.5).to(m.weight.dtype))


EMBEDDING = [
    layer("embedding: rows only", lambda: nn.Embedding(9, 4), (N,), classes=9),
    layer("embedding: repeated and padded", lambda: nn.Embedding(4, 5, padding_idx=-1), (N, 8), classes=4, share="RowShare"),
    layer("embedding: renormalised", lambda: nn.Embedding(4, 5, max_norm=1.0), (N, 8), classes=4),
    *[
        layer(f"embedding_bag: {mode}", lambda mode=mode: nn.EmbeddingBag(9, 4, mode=mode), (N, 7), classes=9, share="RowShare")
        for mode in ("sum", "mean", "max")
    ],
    *[
        layer(
            f"embedding_bag: {mode}, unlike sizes, {'last offset' if last else 'first offsets'}",
            on(lambda mode=mode, last=last: nn.EmbeddingBag(9, 4, mode=mode, padding_idx=2, include_last_offset=last), _bags),
            (N, 7),
            classes=9,
        )
        for mode in ("sum", "mean", "max")
        for last in (False, True)
    ],
    layer("embedding_bag: weighted", on(lambda: nn.EmbeddingBag(9, 4, mode="sum"), _weighted), (N, 7), classes=9),
    layer("embedding_bag: renormalised", lambda: nn.EmbeddingBag(9, 4, max_norm=1.0), (N, 7), classes=9),
    layer(
        "embedding_bag: two bags of a sample",
        on(lambda: nn.EmbeddingBag(9, 4), lambda m, x: m(x.flatten(0, 1)).unflatten(0, (-1, 2))),
        (N, 2, 7),
        classes=9,
    ),
]


def _conv(name: str, n_axes: int, input: Sequence[int], share: str | None = None, **options: object) -> UseCase:
    """A convolution of ``n_axes`` axes, by the options of its layer; "transpose" in its name makes it a transposed one."""
    family = "ConvTranspose" if "transpose" in name else "Conv"
    return layer(name, lambda: getattr(nn, f"{family}{n_axes}d")(**options), input, share=share)


CONV = [
    _conv("conv1d: plain", 1, (N, 4, 7), in_channels=4, out_channels=5, kernel_size=2),
    _conv("conv1d: few places", 1, (N, 4, 4), "OuterView", in_channels=4, out_channels=5, kernel_size=3),
    _conv("conv1d: same, even kernel", 1, (N, 4, 7), in_channels=4, out_channels=5, kernel_size=4, padding="same"),
    _conv("conv1d: causal stride and dilation", 1, (N, 4, 11), in_channels=4, out_channels=2, kernel_size=3, stride=2, dilation=2, padding=4),
    _conv("conv2d: many places", 2, (N, 2, 8, 7), "ConvolutionShare", in_channels=2, out_channels=4, kernel_size=3),
    _conv("conv2d: patches", 2, (N, 2, 8, 8), "OuterView", in_channels=2, out_channels=16, kernel_size=4, stride=4),
    _conv("conv2d: odd left over", 2, (N, 2, 8, 9), in_channels=2, out_channels=4, kernel_size=(3, 2), stride=(2, 3), padding=(1, 0)),
    _conv("conv2d: same, dilated", 2, (N, 2, 7, 5), in_channels=2, out_channels=4, kernel_size=(2, 3), dilation=(3, 1), padding="same"),
    _conv("conv2d: valid", 2, (N, 2, 7, 5), in_channels=2, out_channels=4, kernel_size=2, padding="valid", bias=False),
    _conv("conv2d: groups", 2, (N, 4, 5, 5), in_channels=4, out_channels=8, kernel_size=3, groups=2, padding=1),
    _conv("conv2d: depthwise", 2, (N, 4, 5, 5), in_channels=4, out_channels=8, kernel_size=3, groups=4),
    _conv("conv2d: circular", 2, (N, 2, 5, 5), in_channels=2, out_channels=4, kernel_size=3, padding=1, padding_mode="circular"),
    _conv("conv2d: reflect, same", 2, (N, 2, 5, 5), in_channels=2, out_channels=4, kernel_size=2, padding="same", padding_mode="reflect"),
    layer(
        "conv2d: several images of a sample",
        on(lambda: nn.Conv2d(2, 4, 3, groups=2), lambda m, x: m(x.flatten(0, 1))),
        (N, 2, 2, 5, 5),
    ),
    layer(
        "conv2d: several images, samples second",
        on(lambda: nn.Conv2d(2, 16, 4), lambda m, x: m(x.flatten(0, 1))),
        (2, N, 2, 4, 4),
        axis=1,
        share="OuterView",
    ),
    _conv("conv3d: plain", 3, (N, 2, 4, 5, 4), in_channels=2, out_channels=4, kernel_size=(2, 3, 1), stride=(1, 2, 1)),
    _conv("conv3d: groups, same", 3, (N, 2, 2, 3, 4), in_channels=2, out_channels=4, kernel_size=2, groups=2, padding="same"),
    _conv("conv_transpose1d: plain", 1, (N, 4, 7), in_channels=4, out_channels=5, kernel_size=3),
    _conv("conv_transpose1d: long output", 1, (N, 4, 5), in_channels=4, out_channels=5, kernel_size=3, stride=2, dilation=4, output_padding=3),
    _conv("conv_transpose2d: stride, padding", 2, (N, 4, 5, 4), in_channels=4, out_channels=2, kernel_size=(3, 4), stride=2, padding=1, output_padding=1),
    _conv("conv_transpose2d: groups, dilation", 2, (N, 4, 5, 4), in_channels=4, out_channels=8, kernel_size=3, groups=2, dilation=2),
    _conv("conv_transpose2d: few places", 2, (N, 16, 1, 2), "OuterView", in_channels=16, out_channels=8, kernel_size=3),
    _conv("conv_transpose3d: plain", 3, (N, 2, 2, 4, 2), in_channels=2, out_channels=4, kernel_size=2, stride=2, bias=False),
]

NORM = [
    layer("layer_norm: two feature axes", lambda: nn.LayerNorm((4, 5)), (N, 2, 4, 5)),
    layer("layer_norm: no bias", lambda: nn.LayerNorm(4, bias=False), (7, N, 4), axis=1),
    layer("layer_norm: merged rows", on(lambda: nn.LayerNorm(4), lambda m, x: m(x.flatten(0, 1))), (7, N, 4), axis=1),
    layer("rms_norm: last axis", lambda: nn.RMSNorm(4), (N, 7, 4)),
    layer("rms_norm: two axes, own eps", lambda: nn.RMSNorm((4, 5), eps=0.1), (7, N, 4, 5), axis=1),
    layer("group_norm: positions", lambda: nn.GroupNorm(2, 4), (N, 4, 5)),
    layer("group_norm: no positions", lambda: nn.GroupNorm(2, 4), (N, 4)),
    layer("group_norm: merged", on(lambda: nn.GroupNorm(2, 4), lambda m, x: m(x.flatten(0, 1))), (N, 2, 4, 5)),
    layer("instance_norm: statistics of the sample", lambda: nn.InstanceNorm2d(4, affine=True), (N, 4, 5, 2)),
    layer(
        "instance_norm: running statistics",
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(),
        (N, 4, 5),
    ),
    layer("batch_norm: evaluation", lambda: _shifted(nn.BatchNorm2d(4)).eval(), (N, 4, 5, 2)),
    layer("batch_norm: evaluation, rows", lambda: _shifted(nn.BatchNorm1d(4)).eval(), (N, 4)),
]


def _shifted(norm: nn.Module) -> nn.Module:
    """Give a norm running statistics that are not those of a fresh one."""
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return norm


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
    use("div: parameter below", D, lambda m, x: x / m.w, X),
    use("div: parameter above", P, lambda m, x: m.w / (2 + x.cos()), X),
    use("divide: method", D, lambda m, x: x.divide(m.w), X),
    use("true_divide: function", D, lambda m, x: torch.true_divide(x, m.w), X),
    use("where: chosen by the input", D, lambda m, x: torch.where(x > 0, x, m.w), X),
    use("where: parameter first, fixed condition", D, lambda m, x: torch.where(torch.arange(7)[:, None] > 3, m.w, x), X),
    use("where: method", D, lambda m, x: x.where(x > 0, m.w), X),
    use("where: two parameters", {"w": (4,), "v": (7, 1)}, lambda m, x: torch.where(x > 0, m.v, m.w), X),
]

ACTIVATION = [
    layer("prelu: one slope", nn.PReLU, X),
    layer("prelu: channels", lambda: nn.PReLU(4), (N, 4, 5)),
    layer("prelu: samples last", on(lambda: nn.PReLU(4), lambda m, x: m(x.movedim(0, 2))), (N, 5, 4)),
    layer("prelu: channels, rows", lambda: nn.PReLU(4), (N, 4)),
]

FAMILIES = (LINEAR, MATMUL, EINSUM, BILINEAR, EMBEDDING, CONV, NORM, ARITHMETIC, ACTIVATION)
USES = [case for family in FAMILIES for case in family]

"""Convolutions and transposed convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tests.capture.rules.uses._base import N, UseCase, layer, on


def _conv(name: str, n_axes: int, input: Sequence[int], share: str | None = None, **options: object) -> UseCase:
    """A convolution of ``n_axes`` axes, by the options of its layer; "transpose" in the name transposes it."""
    family = "ConvTranspose" if "transpose" in name else "Conv"
    return layer(name, lambda: getattr(nn, f"{family}{n_axes}d")(**options), input, share=share)


CONV = [
    _conv("conv1d: plain", 1, (N, 4, 7), in_channels=4, out_channels=5, kernel_size=2),
    _conv("conv1d: few places", 1, (N, 4, 4), "OuterView", in_channels=4, out_channels=5, kernel_size=3),
    _conv("conv1d: same, even kernel", 1, (N, 4, 7), in_channels=4, out_channels=5, kernel_size=4, padding="same"),
    _conv(
        "conv1d: causal stride and dilation",
        1,
        (N, 4, 11),
        in_channels=4,
        out_channels=2,
        kernel_size=3,
        stride=2,
        dilation=2,
        padding=4,
    ),
    _conv("conv2d: many places", 2, (N, 2, 8, 7), "DenseShare", in_channels=2, out_channels=4, kernel_size=3),
    _conv("conv2d: patches", 2, (N, 2, 8, 8), "OuterView", in_channels=2, out_channels=16, kernel_size=4, stride=4),
    _conv(
        "conv2d: odd left over",
        2,
        (N, 2, 8, 9),
        in_channels=2,
        out_channels=4,
        kernel_size=(3, 2),
        stride=(2, 3),
        padding=(1, 0),
    ),
    _conv(
        "conv2d: same, dilated",
        2,
        (N, 2, 7, 5),
        in_channels=2,
        out_channels=4,
        kernel_size=(2, 3),
        dilation=(3, 1),
        padding="same",
    ),
    _conv("conv2d: valid", 2, (N, 2, 7, 5), in_channels=2, out_channels=4, kernel_size=2, padding="valid", bias=False),
    _conv("conv2d: wide", 2, (N, 16, 7, 7), "ConvolutionShare", in_channels=16, out_channels=16, kernel_size=3),
    _conv(
        "conv2d: wide groups",
        2,
        (N, 16, 5, 5),
        "ConvolutionShare",
        in_channels=16,
        out_channels=32,
        kernel_size=3,
        groups=2,
    ),
    layer(
        "conv2d: wide groups, several images",
        on(lambda: nn.Conv2d(16, 32, 3, groups=2), lambda m, x: m(x.flatten(0, 1))),
        (2, N, 16, 5, 5),
        axis=1,
        share="ConvolutionShare",
    ),
    _conv(
        "conv_transpose2d: wide", 2, (N, 16, 5, 4), "ConvolutionShare", in_channels=16, out_channels=16, kernel_size=3
    ),
    _conv("conv2d: groups", 2, (N, 4, 5, 5), in_channels=4, out_channels=8, kernel_size=3, groups=2, padding=1),
    _conv("conv2d: depthwise", 2, (N, 4, 5, 5), in_channels=4, out_channels=8, kernel_size=3, groups=4),
    _conv(
        "conv2d: circular",
        2,
        (N, 2, 5, 5),
        in_channels=2,
        out_channels=4,
        kernel_size=3,
        padding=1,
        padding_mode="circular",
    ),
    _conv(
        "conv2d: reflect, same",
        2,
        (N, 2, 5, 5),
        in_channels=2,
        out_channels=4,
        kernel_size=2,
        padding="same",
        padding_mode="reflect",
    ),
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
    _conv(
        "conv3d: groups, same",
        3,
        (N, 2, 2, 3, 4),
        in_channels=2,
        out_channels=4,
        kernel_size=2,
        groups=2,
        padding="same",
    ),
    _conv("conv_transpose1d: plain", 1, (N, 4, 7), in_channels=4, out_channels=5, kernel_size=3),
    _conv(
        "conv_transpose1d: long output",
        1,
        (N, 4, 5),
        in_channels=4,
        out_channels=5,
        kernel_size=3,
        stride=2,
        dilation=4,
        output_padding=3,
    ),
    _conv(
        "conv_transpose2d: stride, padding",
        2,
        (N, 4, 5, 4),
        in_channels=4,
        out_channels=2,
        kernel_size=(3, 4),
        stride=2,
        padding=1,
        output_padding=1,
    ),
    _conv(
        "conv_transpose2d: groups, dilation",
        2,
        (N, 4, 5, 4),
        in_channels=4,
        out_channels=8,
        kernel_size=3,
        groups=2,
        dilation=2,
    ),
    _conv("conv_transpose2d: few places", 2, (N, 16, 1, 2), "OuterView", in_channels=16, out_channels=8, kernel_size=3),
    _conv(
        "conv_transpose3d: plain",
        3,
        (N, 2, 2, 4, 2),
        in_channels=2,
        out_channels=4,
        kernel_size=2,
        stride=2,
        bias=False,
    ),
]

"""Shares of a convolution's weight, held as the cotangent and the input that the backward pass left.

Unfolding an image makes it as many times larger as the kernel has entries, and per-sample gradients of wide layers are
many more numbers than their activations. So what is kept depends on the sizes (`ConvolutionShare.compact`), and what
is larger is made for a few samples at a time when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_gradtrace.capture.shares._base import DenseShare, OuterShare, Share, accumulation_dtype
from lightning_gradtrace.capture.shares.contraction import OuterView

# Numbers of the unfolded input that are written out at a time.
WORKSPACE = 1 << 22


def windows(
    input: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], places: Sequence[int]
) -> Tensor:
    """Return a view of the windows that a convolution looks at.

    Args:
        input: padded, shape (sample, channel, *spatial), at least as large as the windows reach.
        kernel: size of the kernel.
        stride: step from window to window.
        dilation: step inside a window.
        places: number of windows along every axis.

    Returns:
        Shape (sample, channel, *places, *kernel); nothing is copied.
    """
    steps = input.stride()[2:]
    size = (*input.shape[:2], *places, *kernel)
    moves = [s * step for s, step in zip(stride, steps, strict=True)]
    moves += [d * step for d, step in zip(dilation, steps, strict=True)]
    return input.as_strided(size, (*input.stride()[:2], *moves), input.storage_offset())


def pad(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    dilation: Sequence[int],
    places: Sequence[int],
) -> Tensor:
    """Pad with zeros, ``before`` ahead of each spatial axis and behind it what the last window needs; drop the rest."""
    ends = []
    for axis, k in enumerate(kernel):
        reach = (places[axis] - 1) * stride[axis] + dilation[axis] * (k - 1) + 1
        ends += [(before[axis], reach - before[axis] - input.shape[2 + axis])]
    if not any(any(end) for end in ends):
        return input
    return F.pad(input, [size for end in reversed(ends) for size in end])


@dataclass
class ConvolutionShare(Share):
    """``g[i][o, c, k] = sum_p left[i, o, p] right[i, c, stride p + dilation k]`` over channels c of o's group.

    Attributes:
        left: cotangent, shape (sample, image, out, *places); one image per sample unless the batch merged axes.
        right: padded input, shape (sample, image, in, *spatial).
        kernel: size of the kernel.
        stride: step from window to window.
        dilation: step inside a window.
        groups: number of groups of channels.
    """

    left: Tensor
    right: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __post_init__(self) -> None:
        self.shape = torch.Size((self.left.shape[2], self.right.shape[2] // self.groups, *self.kernel))

    @property
    @override
    def n_samples(self) -> int:
        return self.left.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which products are formed."""
        return accumulation_dtype(torch.promote_types(self.left.dtype, self.right.dtype))

    def factors(self, samples: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Unfold the input: the share is an outer product for every group.

        Args:
            samples: the samples to unfold.

        Returns:
            Cotangents, shape (sample * group, out of a group, position), and what the windows see, shape
            (sample * group, in of a group * kernel, position); a position is a place in an image.
        """
        left, right = self.left[samples], self.right[samples]
        n, images, out, *places = left.shape
        cotangents = left.reshape(n, images, self.groups, out // self.groups, -1).permute(0, 2, 3, 1, 4)
        seen = windows(right.flatten(0, 1), self.kernel, self.stride, self.dilation, places)
        seen = seen.unflatten(0, (n, images)).unflatten(2, (self.groups, -1))
        # Now (sample, image, group, in, *places, *kernel). Places stay last, so that rows are copied, not numbers.
        n_axes = len(places)
        at = list(range(4, 4 + n_axes)), list(range(4 + n_axes, 4 + 2 * n_axes))
        seen = seen.permute(0, 2, 3, *at[1], 1, *at[0])
        n_groups, n_positions = n * self.groups, images * math.prod(places)
        return cotangents.reshape(n_groups, -1, n_positions), seen.reshape(n_groups, -1, n_positions)

    @override
    def dense(self, samples: slice = slice(None)) -> Tensor:
        left, right = self.factors(samples)
        product = torch.bmm(left.to(self.dtype), right.to(self.dtype).transpose(1, 2))
        return product.view(-1, *self.shape)

    def compact(self) -> Share:
        """Return the share in the form that is cheapest to keep and to read.

        Written out where that is less to keep than the factors; unfolded where that is less than writing out, because
        a selection can prune an outer product; else as it is.
        """
        _, images, out, *places = self.left.shape
        own, n_positions = self.shape.numel(), images * math.prod(places)
        if own <= self.left[0].numel() + self.right[0].numel():
            seen = self.right[0].numel() * math.prod(self.kernel)
            values = torch.cat([self.dense(part) for part in _parts(self.n_samples, max(1, WORKSPACE // seen))])
            return DenseShare(values)
        if self.groups == 1 and n_positions * (out + own // out) <= own:
            left, right = self.factors()
            matrix = OuterShare(left.transpose(1, 2), right.transpose(1, 2))
            return OuterView(matrix, tuple(self.shape), tuple(range(len(self.shape))))
        return self

    @override
    def total(self) -> Tensor:
        n_axes = len(self.kernel)
        weight = self.left.new_empty(1, dtype=self.dtype).expand(self.shape)  # only its shape is read
        left, right = (factor.flatten(0, 1).to(self.dtype) for factor in (self.left, self.right))
        none, mask = [0] * n_axes, (False, True, False)
        gradients = torch.ops.aten.convolution_backward(
            left, right, weight, None, self.stride, none, self.dilation, False, none, self.groups, mask
        )
        return gradients[1]


def _parts(n: int, most: int) -> list[slice]:
    return [slice(start, start + most) for start in range(0, n, most)]

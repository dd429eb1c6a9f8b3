"""Whose the entries of a tensor are after a function that treats rows apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_gradtrace.capture.forward.functions import names_of
from lightning_gradtrace.capture.routes.picking import Call
from lightning_gradtrace.capture.routes.rows import Fate, constant

MOVES = names_of(
    "view reshape flatten unflatten transpose permute movedim swapaxes squeeze unsqueeze expand T mT t repeat view_as "
    "tile swapdims moveaxis expand_as reshape_as broadcast_to"
)
"""Functions that give entries other places and leave them as they are."""
KEEPS = names_of(
    "clone contiguous detach to float double half bfloat16 type dropout layer_norm rms_norm type_as normalize "
    "requires_grad_ alpha_dropout feature_dropout batch_norm instance_norm group_norm"
)
ALONG = names_of("softmax log_softmax cumsum")
_REDUCES = names_of("sum mean amax amin max min norm logsumexp prod")
_ROWS = names_of(
    "linear matmul __matmul__ mm bmm grouped_mm _grouped_mm gru_cell lstm_cell rnn_tanh_cell rnn_relu_cell glu "
    "scaled_dot_product_attention"
)
_IMAGES = names_of(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d "
    "upsample_nearest2d upsample_bilinear2d upsample_linear1d pixel_shuffle pixel_unshuffle"
)
_RECURRENT = names_of("lstm gru rnn_tanh rnn_relu")


def reduces(call: Call) -> bool:
    """Say whether a call sums up, or takes the largest, along axes or over all entries of one tensor."""
    return call.name in _REDUCES and not isinstance(call.argument(1, "other"), Tensor)


def through(call: Call, owners: Tensor) -> Sequence[Tensor | Fate]:
    """Return the owners after a function that treats rows apart; lost after any other."""
    name, args, outputs = call.name, call.args, call.outputs
    last = owners.dim() - 1
    if name in KEEPS and outputs[0].shape == owners.shape:
        return [owners]
    if name in ALONG | _REDUCES:
        dim = call.argument(1, "dim")
        dims = [dim] if isinstance(dim, int) else list(dim) if isinstance(dim, (tuple, list)) else []
        if not outputs[0].dim() and owners.dim():
            return [Fate.NOBODY]  # of several samples, see `_follow`
        if dims and all(isinstance(d, int) and constant(owners, d % owners.dim()) for d in dims):
            kept = owners if name in ALONG else owners.amin(dims, keepdim=bool(call.argument(2, "keepdim")))
            return [kept] * len(outputs)
    if name in _ROWS and last > 0 and constant(owners, last) and outputs[0].shape[:-1] == owners.shape[:-1]:
        return [owners[..., :1].expand(output.shape) for output in outputs]
    if name == "embedding" and outputs[0].shape[:-1] == owners.shape:
        return [owners.unsqueeze(-1).expand(outputs[0].shape)]
    if name in _IMAGES and all(constant(owners, axis) for axis in range(1, owners.dim())):
        flat = owners.flatten(1)[:, :1].reshape(-1, *[1] * (outputs[0].dim() - 1))
        return [flat.expand(outputs[0].shape)]
    sizes = args[1] if len(args) > 1 else None
    if name in _RECURRENT and isinstance(sizes, Tensor) and sizes.dim() == 1 and constant(owners, last):
        hidden = owners[: int(sizes[0]), 0][None, :, None]
        return [(owners[:, :1] if i == 0 else hidden).expand(t.shape) for i, t in enumerate(outputs)]
    if name in _RECURRENT and owners.dim() == 3 and len(args) > 8:
        time = 1 if args[8] else 0
        if constant(owners, last) and constant(owners, time):
            rows = owners.select(time, 0)[None, :, :1]
            return [(owners[..., :1] if i == 0 else rows).expand(t.shape) for i, t in enumerate(outputs)]
    if name == "_pad_packed_sequence":
        padded = torch._VF._pad_packed_sequence(owners, args[1], args[2], -1, args[4])[0]
        first = padded[:, :1] if args[2] else padded[:1]  # what is padded belongs to its sequence all the same
        return [torch.where(padded == -1, first.expand_as(padded), padded), Fate.ORDINARY]
    return [Fate.LOST] * len(outputs)


def looked_up(call: Call, of: Mapping[int, Tensor | Fate]) -> Tensor | Fate:
    """Return the owners of rows of a table that is none of the batch; lost after any other function."""
    index = call.argument(1, "indices")
    owners = of.get(id(index))
    if call.name not in ("__getitem__", "embedding") or not isinstance(owners, Tensor) or index.dtype == torch.bool:
        return Fate.LOST
    (output,) = call.outputs
    ahead = output.shape[: owners.dim()] == owners.shape and all(t is index for t in call.batched)
    return owners[(..., *[None] * (output.dim() - owners.dim()))].expand(output.shape) if ahead else Fate.LOST


def weighing(batched: list[Tensor]) -> list[Tensor]:
    """Return the arguments that tell whose the entries are: masks and other numbers that no gradient passes don't."""
    return [t for t in batched if t.is_floating_point() or t.is_complex()] or batched

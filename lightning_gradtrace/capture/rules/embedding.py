"""Embedding look-ups: a sample moves only the rows that it reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_gradtrace.capture.rules._base import Arguments, Call, Shares, register
from lightning_gradtrace.capture.shares import DenseShare, RowShare, Share

_SUM, _MEAN, _MAX = 0, 1, 2  # modes of an embedding bag


@register(
    torch.embedding,
    arguments="weight indices padding_idx scale_grad_by_freq sparse",
    input="indices",
    parameters="weight",
)
def embedding(call: Call) -> Shares:
    """``g[i][r] = sum over t with index[i, t] = r of d[i, t]``; the padding row gets nothing.

    With ``scale_grad_by_freq`` every look-up is divided by how often the whole batch reads its row, as torch does.
    """
    weight, padding = call.arguments["weight"], call.arguments.get("padding_idx", -1)
    rows = call.input.reshape(call.n_samples, -1).long()
    values = call.cotangent.reshape(call.n_samples, -1, weight.shape[1])
    if call.arguments.get("scale_grad_by_freq", False):
        counts = torch.bincount(rows.flatten(), minlength=weight.shape[0])
        values = values / counts[rows].unsqueeze(-1)
    if padding >= 0:
        values = values.masked_fill((rows == padding).unsqueeze(-1), 0)
    return {"weight": RowShare(rows, values, weight.shape[0])}


@register(torch.Tensor.__getitem__, arguments="weight indices", input="indices", parameters="weight", reads="indices")
def look_up(call: Call) -> Shares:
    """``weight[indices]``, the look-up in a table that is a bare parameter; not for masks."""
    weight = call.arguments["weight"]
    if weight.dim() != 2 or call.input.dtype in (torch.bool, torch.uint8):
        return None
    rows = call.input.reshape(call.n_samples, -1).long()
    values = call.cotangent.reshape(call.n_samples, -1, weight.shape[1])
    return {"weight": RowShare(rows.where(rows >= 0, rows + weight.shape[0]), values, weight.shape[0])}


def _bags(arguments: Arguments, name: str) -> Mapping[int, int]:
    return {0: 0}


@register(
    torch.embedding_bag,
    arguments="weight indices offsets scale_grad_by_freq mode sparse per_sample_weights include_last_offset "
    "padding_idx",
    input="",
    parameters="weight per_sample_weights",
    axes=_bags,
)
def embedding_bag(call: Call) -> Shares:
    """Sum, mean or maximum of the rows of a bag; a sample is a bag, or several of them.

    The samples are looked for in the output, because the indices of all bags stand in one row. Weights of the rows
    that come from parameters have the share ``d[bag] . weight[index]``.
    """
    if call.arguments.get("scale_grad_by_freq", False):
        return None  # torch does not divide by the frequencies that it documents (seen in 2.13 on CPU)
    weight, indices = call.arguments["weight"], call.arguments["indices"].long()
    starts, sizes = _bounds(call.arguments, len(indices))
    bags = call.cut(torch.arange(len(starts), device=starts.device)).reshape(call.n_samples, -1)
    d = call.cotangent.reshape(*bags.shape, weight.shape[1])
    place = torch.arange(int(sizes.max()) if len(sizes) else 0, device=starts.device)
    inside = place < sizes[bags].unsqueeze(-1)  # (sample, bag, place): bags are filled up to the longest
    members = (starts[bags].unsqueeze(-1) + place).where(inside, 0)
    rows = indices[members] if len(indices) else members
    padding = call.arguments.get("padding_idx", -1)
    if padding is not None and padding >= 0:
        inside = inside & (rows != padding)
    mode, own = call.arguments.get("mode", _SUM), call.arguments.get("per_sample_weights")
    if mode == _MAX:
        return {"weight": _largest(call.arguments, d, bags, inside.any(-1))}
    shares: dict[str, Share] = {}
    if "per_sample_weights" in call.wanted:
        found = ((d.unsqueeze(2) * weight.detach()[rows]).sum(-1) * inside).flatten(1)
        empty = found.new_zeros(call.n_samples, len(indices))
        shares["per_sample_weights"] = DenseShare(empty.scatter_add_(1, members.flatten(1), found))
    if "weight" not in call.wanted:
        return shares
    factor = inside.to(d.dtype)
    if mode == _MEAN:
        factor = factor / factor.sum(-1, keepdim=True).clamp_(min=1)
    elif own is not None:
        factor = factor * own.detach()[members]
    values = d.unsqueeze(2) * factor.unsqueeze(-1)
    shares["weight"] = RowShare(rows.flatten(1), values.flatten(1, 2), weight.shape[0])
    return shares


def _bounds(arguments: Arguments, n_indices: int) -> tuple[Tensor, Tensor]:
    """Return where every bag starts among the indices, and its size."""
    offsets = arguments["offsets"].long()
    if arguments.get("include_last_offset", False):
        return offsets[:-1], offsets.diff()
    return offsets, torch.cat([offsets, offsets.new_tensor([n_indices])]).diff()


def _largest(arguments: Arguments, d: Tensor, bags: Tensor, filled: Tensor) -> RowShare:
    """Return the share of a maximum: every feature goes to the row that it was taken from."""
    weight, indices, offsets = arguments["weight"], arguments["indices"], arguments["offsets"]
    last, padding = arguments.get("include_last_offset", False), arguments.get("padding_idx")
    found = torch.embedding_bag(weight.detach(), indices, offsets, False, _MAX, False, None, last, padding)
    chosen = found[3][bags]
    chosen = chosen.where(filled.unsqueeze(-1), 0).long()
    values = torch.diag_embed(d * filled.unsqueeze(-1))
    return RowShare(chosen.flatten(1), values.flatten(1, 2), weight.shape[0])

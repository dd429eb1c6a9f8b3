"""Embedding look-ups: a sample moves only the rows that it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradtrace.capture.rules._base import Arguments, register
from lightning_gradtrace.capture.shares import RowShare, Share


@register(
    torch.embedding,
    arguments="weight indices padding_idx scale_grad_by_freq sparse",
    input="indices",
    parameters="weight",
)
def embedding(arguments: Arguments, input: Tensor, cotangent: Tensor, wanted: frozenset[str]) -> dict[str, Share]:
    """``g[i][r] = sum over t with index[i, t] = r of d[i, t]``; the padding row gets nothing.

    With ``scale_grad_by_freq`` every look-up is divided by how often the whole batch reads its row, as torch does.
    """
    weight, padding = arguments["weight"], arguments.get("padding_idx", -1)
    n = input.shape[0]
    rows = input.reshape(n, -1).long()
    values = cotangent.reshape(n, -1, weight.shape[1])
    if arguments.get("scale_grad_by_freq", False):
        counts = torch.bincount(rows.flatten(), minlength=weight.shape[0]).clamp_(min=1)
        values = values / counts[rows].unsqueeze(-1)
    if padding >= 0:
        values = values.masked_fill((rows == padding).unsqueeze(-1), 0)
    return {"weight": RowShare(rows, values, weight.shape[0])}

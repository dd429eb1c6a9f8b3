"""Normalisations whose statistics are those of the sample, or fixed."""

from __future__ import annotations

import torch
from torch import nn

from tests.capture.rules.uses._base import N, layer, on

NORM = [
    layer("layer_norm: two feature axes", lambda: nn.LayerNorm((4, 5)), (N, 2, 4, 5)),
    layer("layer_norm: no bias", lambda: nn.LayerNorm(4, bias=False), (7, N, 4), axis=1),
    layer("layer_norm: merged rows", on(lambda: nn.LayerNorm(4), lambda m, x: m(x.flatten(0, 1))), (7, N, 4), axis=1),
    layer("rms_norm: last axis", lambda: nn.RMSNorm(4), (N, 7, 4)),
    layer("rms_norm: two axes, own eps", lambda: nn.RMSNorm((4, 5), eps=0.1), (7, N, 4, 5), axis=1),
    layer("group_norm: positions", lambda: nn.GroupNorm(2, 4), (N, 4, 5)),
    layer("group_norm: no positions", lambda: nn.GroupNorm(2, 4), (N, 4)),
    layer("group_norm: merged", on(lambda: nn.GroupNorm(2, 4), lambda m, x: m(x.flatten(0, 1))), (N, 2, 4, 5)),
    layer(
        "group_norm: channels last",
        on(
            lambda: nn.Sequential(nn.Conv2d(2, 8, 1), nn.GroupNorm(2, 8)),
            lambda m, x: m[1](m[0](x).to(memory_format=torch.channels_last)),
        ),
        (N, 2, 4, 5),
    ),
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

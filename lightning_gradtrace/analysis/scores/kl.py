"""What a token contributes to the divergence of a group's texts from the data (docs/concepts.md, 5, step 5)."""

from __future__ import annotations

import numpy as np

from lightning_gradtrace.analysis._bootstrap import FloatArray
from lightning_gradtrace.analysis.scores._base import Candidates, Method


def kl(candidates: Candidates) -> FloatArray:
    """Return KL(p || q) minus KL(p' || q'), p' and q' being p and q with token t taken out and normalised again.

    p(t) = c(t) / sum c, q(t) = b(t) / sum b, in nats. With k(t) = p(t) ln(p(t) / q(t)),

        KL(p' || q') = (KL - k(t)) / (1 - p(t)) + ln((1 - q(t)) / (1 - p(t))).

    A token that is all of a group's text leaves nothing to diverge: KL(p' || q') = 0.
    """
    p = candidates.counts / np.maximum(candidates.chunk.total, 1e-300)[:, None]
    relative = candidates.relatives()
    whole = np.where(p > 0, p * np.log(np.where(p > 0, relative, 1.0)), 0.0).sum(axis=1)[candidates.row]
    own = p[candidates.row, candidates.column]
    term = own * np.log(candidates.relative)
    q = candidates.share()[candidates.column]
    alone = own >= 1
    left = np.where(alone, 1.0, 1 - own)
    without = (whole - term) / left + np.log(np.where(alone, 1.0, 1 - q) / left)
    return whole - np.where(alone, 0.0, without)


METHOD = Method(kl, all_tokens=True)

"""Equations of `torch.einsum`."""

from __future__ import annotations

import torch

from tests.capture.rules.uses._base import N, use

EINSUM = [
    use(
        "einsum: heads",
        {"w": (2, 4, 5)},
        lambda m, x: torch.einsum("btd,hde->bthe", x, m.w),
        (N, 7, 4),
        share="OuterView",
    ),
    use(
        "einsum: heads back",
        {"w": (2, 5, 4)},
        lambda m, x: torch.einsum("bthe,hed->btd", x, m.w),
        (N, 7, 2, 5),
        share="OuterView",
    ),
    use(
        "einsum: parameter first",
        {"w": (5, 4)},
        lambda m, x: torch.einsum("oi,bti->bto", m.w, x),
        (N, 7, 4),
        share="OuterShare",
    ),
    use(
        "einsum: input axis first",
        {"w": (4, 5)},
        lambda m, x: torch.einsum("io,tbi->tbo", m.w, x),
        (7, N, 4),
        axis=1,
        share="OuterShare",
    ),
    use(
        "einsum: three rows axes",
        {"w": (2, 4, 2, 5)},
        lambda m, x: torch.einsum("btd,hdke->khbte", x, m.w),
        (N, 7, 4),
        share="OuterView",
    ),
    use(
        "einsum: a matrix per head",
        {"w": (2, 4, 5)},
        lambda m, x: torch.einsum("bthd,hde->bthe", x, m.w),
        (N, 7, 2, 4),
        share="Contraction",
    ),
    use("einsum: a scale per head", {"w": (2, 4)}, lambda m, x: torch.einsum("bthd,hd->bthd", x, m.w), (N, 7, 2, 4)),
    use("einsum: summed positions", {"w": (4, 5)}, lambda m, x: torch.einsum("btd,de->be", x, m.w), (N, 7, 4)),
    use("einsum: outer product", {"w": (5,)}, lambda m, x: torch.einsum("bt,e->bte", x, m.w), (N, 7)),
    use("einsum: no arrow, blanks", {"w": (4, 5)}, lambda m, x: torch.einsum("B d, d e", x, m.w), (N, 4)),
    use(
        "einsum: contracts positions",
        {"w": (7, 5)},
        lambda m, x: torch.einsum("btd,tu->bud", x, m.w),
        (N, 7, 4),
        share="OuterShare",
    ),
    use("einsum: ellipsis", {"w": (4, 5)}, lambda m, x: torch.einsum("...d,de->...e", x, m.w), (N, 7, 4), closed=False),
    use("einsum: diagonal", {"w": (4, 4)}, lambda m, x: torch.einsum("btd,dd->btd", x, m.w), (N, 7, 4), closed=False),
    use(
        "einsum: parameter summed alone",
        {"w": (4, 5)},
        lambda m, x: torch.einsum("btd,de->bt", x, m.w),
        (N, 7, 4),
        closed=False,
    ),
    use(
        "einsum: stretched parameter",
        {"w": (1, 5)},
        lambda m, x: torch.einsum("btd,de->bte", x, m.w),
        (N, 7, 4),
        closed=False,
    ),
    use(
        "einsum: stretched input",
        {"w": (4, 5)},
        lambda m, x: torch.einsum("btd,de->bte", x, m.w),
        (N, 7, 1),
        closed=False,
    ),
    use(
        "einsum: three operands",
        {"w": (4, 5)},
        lambda m, x: torch.einsum("btd,btd,de->bte", x, x, m.w),
        (N, 7, 4),
        closed=False,
    ),
    use(
        "einsum: list of operands",
        {"w": (4, 5)},
        lambda m, x: torch.einsum("btd,de->bte", [x, m.w]),
        (N, 7, 4),
        closed=False,
    ),
    use(
        "einsum: transposed parameter",
        {"w": (2, 5, 4)},
        lambda m, x: torch.einsum("btd,hde->bthe", x, m.w.mT),
        (N, 7, 4),
    ),
]

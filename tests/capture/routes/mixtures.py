"""Models that fold, move, pick and mix their samples, on sizes that agree: what `test_mixtures.py` compares.

``run(m, x, s)`` returns what the samples of ``x``, shape (sample, position, width), become, shape (sample, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Sizes(NamedTuple):
    """Numbers of samples, positions, heads and features; they stay those of the batch when one sample runs alone."""

    n: int
    length: int
    heads: int
    width: int


SIZES = [Sizes(3, 5, 2, 4), Sizes(4, 4, 4, 4), Sizes(2, 4, 4, 8), Sizes(4, 3, 2, 4), Sizes(2, 3, 2, 6)]

Build = Callable[[Sizes], nn.Module | Sequence[int]]
Run = Callable[[nn.Module, Tensor, Sizes], Tensor]


@dataclass
class Model:
    """A model: its parameters or layers by name, and what it does."""

    name: str
    run: Run
    parts: dict[str, Build] = field(default_factory=dict)


def layer(s: Sizes) -> nn.Module:
    return nn.Linear(s.width, s.width)


def attend(q: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(q, q.transpose(1, 2)).softmax(-1), q)


def heads_inside(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    q = m.a(x).unflatten(-1, (s.heads, -1)).transpose(1, 2).flatten(0, 1)
    return m.b(attend(q).unflatten(0, (len(x), s.heads)).transpose(1, 2).flatten(2))


def heads_outside(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    y = m.a(x).unflatten(-1, (s.heads, -1)).permute(2, 0, 1, 3).flatten(0, 1)
    return (y @ m.w).unflatten(0, (s.heads, len(x))).transpose(0, 1)


def in_the_middle(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    y = x.unflatten(2, (2, -1)).transpose(0, 1)  # position, sample, half, feature
    return m.a(y.flatten(0, 2)).unflatten(0, y.shape[:3]).transpose(0, 1)


def windows(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    y = x.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
    return m.a(y, y, y, need_weights=False)[0].unflatten(0, (len(x), 2))


def attention_heads_first(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    q = m.a(x).unflatten(-1, (s.heads, -1)).permute(2, 0, 1, 3)
    return m.b(F.scaled_dot_product_attention(q, q, q)).transpose(0, 1)


def positions_first(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    return m.b(F.rrelu(m.a(x.transpose(0, 1)), training=False)).transpose(0, 1)


def folded_bias(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    q = m.a(x).unflatten(-1, (s.heads, -1)).transpose(1, 2).flatten(0, 1)
    scores = (q @ q.transpose(-1, -2)).unflatten(0, (-1, s.heads)) + m.bias
    return (scores.flatten(0, 1).softmax(-1) @ q).unflatten(0, (len(x), s.heads))


def torch_order(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    y = m.a(x.transpose(0, 1)).reshape(s.length, len(x) * s.heads, -1).transpose(0, 1)
    return m.b(attend(y).transpose(0, 1).reshape(s.length, len(x), -1)).transpose(0, 1)


def control_flow(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    return torch.stack([m.a(m.a(one).tanh()) if one.sum() > 0 else m.a(one) for one in x])


def best_tokens(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    y = m.a(x)
    best = y.norm(dim=-1).topk(1, 1).indices[..., None].expand(-1, -1, s.width)
    return m.b(y.gather(1, best))


def filled(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    out, chosen = x.clone(), x[..., 0] > 0
    out[chosen] = m.a(x[chosen])
    return m.b(out)


def power_iteration(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    return m.spectral.eval()(x)


EXACT = [
    Model("batch axis moved", lambda m, x, s: m.a(x.permute(1, 0, 2)).permute(1, 0, 2), {"a": layer}),
    Model("columns", lambda m, x, s: (m.w @ x[:, 0].T).T, {"w": lambda s: (s.width, s.width)}),
    Model("heads inside the batch", heads_inside, {"a": layer, "b": layer}),
    Model(
        "heads outside the batch",
        heads_outside,
        {"a": layer, "w": lambda s: (s.width // s.heads, s.width // s.heads)},
    ),
    Model("bias of folded heads", folded_bias, {"a": layer, "bias": lambda s: (s.heads, s.length, s.length)}),
    Model("in the middle", in_the_middle, {"a": lambda s: nn.Linear(s.width // 2, s.width)}),
    Model("windows", windows, {"a": lambda s: nn.MultiheadAttention(s.width // 2, 1, batch_first=True)}),
    Model(
        "attention with heads first",
        attention_heads_first,
        {"a": layer, "b": lambda s: nn.Linear(s.width // s.heads, 3)},
    ),
    Model("positions first", positions_first, {"a": layer, "b": layer}),
    Model("heads in the order of torch", torch_order, {"a": layer, "b": layer}),
    Model(
        "patches",
        lambda m, x, s: m.w @ F.unfold(x.transpose(1, 2).unsqueeze(-1), (2, 1)),
        {"w": lambda s: (3, 2 * s.width)},
    ),
    Model("beams", lambda m, x, s: m.a(x[:, 0].repeat_interleave(s.n, 0)).unflatten(0, (-1, s.n)), {"a": layer}),
    Model("tiles", lambda m, x, s: m.a(x[:, 0].repeat(3, 1)).unflatten(0, (3, -1)).transpose(0, 1), {"a": layer}),
    Model("copies ahead", lambda m, x, s: m.a(x[:, 0].expand(s.n, -1, -1)).transpose(0, 1), {"a": layer}),
    Model("views", lambda m, x, s: torch.mul(*m.a(torch.cat([x, x * 2 + 1])).chunk(2)), {"a": layer}),
    Model(
        "triplets",
        lambda m, x, s: m.a(torch.stack([x[:, 0], x[:, 0] ** 2, x[:, 0].sin()], 1).flatten(0, 1)).unflatten(0, (-1, 3)),
        {"a": layer},
    ),
    Model("branches by sample", control_flow, {"a": layer}),
    Model("best tokens", best_tokens, {"a": layer, "b": layer}),
    Model("written by mask", filled, {"a": layer, "b": layer}),
    Model("linear attention", lambda m, x, s: m.a(x @ (x.transpose(1, 2) @ m.b(x))), {"a": layer, "b": layer}),
    Model("mixed positions", lambda m, x, s: m.w @ m.a(x), {"a": layer, "w": lambda s: (s.length, s.length)}),
    Model("mixed by a layer", lambda m, x, s: m.a(x.mT).mT, {"a": lambda s: nn.Linear(s.length, s.length)}),
    Model(
        "positions first",
        lambda m, x, s: (x.mT.mT.transpose(0, 1) * m.w).transpose(0, 1),
        {"w": lambda s: (s.length, 1, s.width)},
    ),
    Model("channels", lambda m, x, s: m.a(x.unsqueeze(1)), {"a": lambda s: nn.Conv2d(1, s.n, 3, padding=1)}),
    Model("ensemble", lambda m, x, s: torch.einsum("btd,kdf->bktf", x, m.w), {"w": lambda s: (s.n, s.width, s.width)}),
    Model("prototypes", lambda m, x, s: torch.cdist(x[:, 0], m.w), {"w": lambda s: (s.n, s.width)}),
    Model(
        "queries pooled",
        lambda m, x, s: m.a((m.a(x) @ m.w.T).softmax(1).mT @ x),
        {"a": layer, "w": lambda s: (s.n, s.width)},
    ),
    Model("quadratic", lambda m, x, s: torch.einsum("bti,ij,btj->b", x, m.w, x), {"w": lambda s: (s.width, s.width)}),
    Model("matrix exponential", lambda m, x, s: x @ torch.matrix_exp(m.w - m.w.T), {"w": lambda s: (s.width, s.width)}),
    Model("spectral norm", power_iteration, {"spectral": lambda s: parametrizations.spectral_norm(layer(s))}),
    Model("detached", lambda m, x, s: m.a(x) * m.a(x).detach() + F.linear(x, m.a.weight.detach()), {"a": layer}),
    Model(
        "functional call",
        lambda m, x, s: torch.func.functional_call(m.a, {k: 2 * p for k, p in m.a.named_parameters()}, (x,)),
        {"a": layer},
    ),
    Model("complex", lambda m, x, s: (x + 0j) @ torch.view_as_complex(m.w), {"w": lambda s: (s.width, s.width, 2)}),
    Model(
        "spectrum", lambda m, x, s: torch.fft.fft(m.a(x), dim=1).abs() * m.w, {"a": layer, "w": lambda s: (s.width,)}
    ),
    Model(
        "sparse rows",
        lambda m, x, s: torch.sparse.mm(x[:, 0].relu().to_sparse(), m.w),
        {"w": lambda s: (s.width, s.width)},
    ),
]


# --- samples that a table sends to the slots of experts and back ----------------------------------------------------


def slots(m: nn.Module, x: Tensor, s: Sizes, capacity: int) -> Tensor:
    """Experts that get their tokens in slots, by products with a table of who goes where (Mesh TensorFlow, GShard)."""
    tokens = m.a(x).flatten(0, 1)
    there, chance = table(m, tokens, capacity)
    inputs = torch.einsum("td,tec->ecd", tokens, there)
    outputs = torch.einsum("ecd,edf->ecf", inputs, m.experts).tanh()
    return torch.einsum("ecf,tec->tf", outputs, there * chance[:, None, None]).unflatten(0, (-1, s.length))


def table(m: nn.Module, tokens: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Return who goes where, shape (token, expert, slot), and the chance of each token's expert."""
    chance = m.router(tokens).softmax(-1)
    chosen = F.one_hot(chance.argmax(-1), chance.shape[-1])
    slot = (chosen.cumsum(0) - 1) * chosen
    there = (chosen * (slot < capacity)).unsqueeze(-1) * F.one_hot(slot.clamp(max=capacity - 1), capacity)
    return there.to(tokens), chance.amax(-1)


def slots_by_products(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    tokens = m.a(x).flatten(0, 1)
    there, chance = table(m, tokens, s.length)
    flat = there.flatten(1)  # token, slot of any expert
    outputs = torch.bmm((flat.T @ tokens).unflatten(0, there.shape[1:]), m.experts).tanh()
    return ((flat * chance[:, None]) @ outputs.flatten(0, 1)).unflatten(0, (-1, s.length))


def empty_slots(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    """Of what slots hold, also those that nobody was sent to, everybody gets the mean."""
    tokens = m.a(x).flatten(0, 1)
    there, _ = table(m, tokens, s.n)
    outputs = (torch.einsum("td,tec->ecd", tokens, there) + m.experts[0, 0]).tanh()
    return x + outputs.mean((0, 1))


def crowded_slots(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    tokens = m.a(x).flatten(0, 1)
    there = table(m, tokens, s.n)[0].sum(-1)  # all of an expert in one slot
    return (there @ (there.T @ tokens @ m.experts[0]).tanh()).unflatten(0, (-1, s.length))


# --- samples that end up elsewhere ----------------------------------------------------------------------------------


def shifted(x: Tensor) -> Tensor:
    return torch.eye(len(x), dtype=x.dtype)[torch.arange(len(x)).roll(1)]


def by_einsum(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    there = shifted(x)
    return torch.einsum("ab,btd->atd", there.T, m.a(torch.einsum("ab,btd->atd", there, x)))


def written_backwards(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(len(x)):
        out[len(x) - 1 - i] = m.b(x[i])
    return m.a(out).flip(0)


def in_order(x: Tensor) -> Tensor:
    return x[:, 0, 0].argsort()


def copied_rows(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    rows = torch.zeros_like(x[:, 0]).index_copy(0, torch.arange(len(x)), x[:, 0][in_order(x)])
    return m.a(rows)[in_order(x).argsort()]


def in_another_stride(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    return m.b(m.a(x).contiguous().as_strided(x.shape, (s.width, s.width, 1)))


def sampled_from_a_grid(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    images = m.a(x).transpose(0, 1)[:, None]
    places = nn.functional.affine_grid(0.9 * torch.eye(2, 3).to(x)[None], [1, 1, len(x), s.width], align_corners=False)
    found = nn.functional.grid_sample(images, places.expand(s.length, -1, -1, -1), align_corners=False)
    return m.b(found[:, 0].transpose(0, 1))


def scattered_rows(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    place = in_order(x).argsort()
    rows = torch.zeros_like(x[:, 0]).scatter(0, place[:, None].expand(-1, s.width), x[:, 0])
    return m.a(rows)[place]


def looked_up(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    return F.embedding(in_order(x).argsort(), m.a(F.embedding(in_order(x), x[:, 0])))


def taken(m: nn.Module, x: Tensor, s: Sizes) -> Tensor:
    entries = torch.arange(x[:, 0].numel()).view(len(x), -1).roll(1, 0)
    return m.a(torch.take(x[:, 0], entries)).roll(-1, 0)


def experts(n: Callable[[Sizes], int]) -> dict[str, Build]:
    return {
        "a": layer,
        "router": lambda s: nn.Linear(s.width, n(s)),
        "experts": lambda s: (n(s), s.width, s.width),
    }


SENT = [
    Model("as many experts as samples", lambda m, x, s: slots(m, x, s, s.n * s.length), experts(lambda s: s.n)),
    Model("as many slots as samples", lambda m, x, s: slots(m, x, s, s.n), experts(lambda s: 7)),
    Model("slots for everybody", lambda m, x, s: slots(m, x, s, s.n * s.length), experts(lambda s: 7)),
    Model("one slot", lambda m, x, s: slots(m, x, s, 1), experts(lambda s: 3)),
    Model("slots by products", slots_by_products, experts(lambda s: 3)),
]
PERMUTED = [
    Model("a matrix that permutes", lambda m, x, s: shifted(x).T @ m.a(shifted(x) @ x[:, 0]), {"a": layer}),
    Model("einsum that permutes", by_einsum, {"a": layer}),
    Model("copied rows", copied_rows, {"a": layer}),
    Model("scattered rows", scattered_rows, {"a": layer}),
]
ELSEWHERE = [
    Model("an empty slot that is heard", empty_slots, experts(lambda s: 7)),
    Model("slots that two share", crowded_slots, experts(lambda s: 3)),
    Model(
        "samples mixed by a parameter", lambda m, x, s: m.w[: len(x), : len(x)] @ x[:, 0], {"w": lambda s: (s.n, s.n)}
    ),
    Model("written backwards", written_backwards, {"a": layer, "b": layer}),
    Model("looked up", looked_up, {"a": layer}),
    Model("taken", taken, {"a": layer}),
    Model("spectrum over samples", lambda m, x, s: m.b(torch.fft.fft(m.a(x), dim=0).abs()), {"a": layer, "b": layer}),
    Model("shifted spectrum", lambda m, x, s: m.b(torch.fft.fftshift(m.a(x), 0)), {"a": layer, "b": layer}),
    Model("in another stride", in_another_stride, {"a": layer, "b": layer}),
    Model("sampled from a grid", sampled_from_a_grid, {"a": layer, "b": layer}),
]

"""Trainings that draw random numbers in their forward pass: the samples' own, or such as all samples share.

``run(m, x, n)`` returns the losses of the samples of ``x``, shape (sample, position, width); ``n`` is the number of
samples for which the model was built, so that sizes agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

LENGTH, WIDTH = 4, 8


@dataclass
class Training:
    """A training: its parameters or layers by name, given the number of samples, and the losses of its samples."""

    name: str
    run: Callable[[nn.Module, Tensor, int], Tensor]
    parts: Callable[[int], dict[str, nn.Module | tuple[int, ...]]]


def net(*sizes: int) -> nn.Sequential:
    """Return layers with a bend between them."""
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def zeroed(layers: nn.Sequential) -> nn.Sequential:
    """Let the last layer begin with zeros."""
    nn.init.zeros_(layers[-1].weight)
    return layers


def squares(y: Tensor) -> Tensor:
    return y.square().flatten(1).sum(1)


def generated(m: nn.Module, x: Tensor, n: int) -> Tensor:
    return squares(m.critic(m.generator(torch.randn(len(x), 3))))


def generated_alike(m: nn.Module, x: Tensor, n: int) -> Tensor:
    """Whatever the codes, a last layer that begins with zeros gives the same; they never meet the samples."""
    return squares(m.critic(m.generator(torch.randn(len(x), 3))) - 1)


def real_and_generated(m: nn.Module, x: Tensor, n: int) -> Tensor:
    fake = m.generator(torch.randn(len(x), 3))
    scores = m.critic(torch.cat([x.mean(1), fake]))
    return squares(scores[: len(x)] - 1) + squares(scores[len(x) :])


def timed(m: nn.Module, x: Tensor, n: int) -> Tensor:
    time = torch.rand(len(x), 1)
    noisy = x * time[..., None] + torch.randn_like(x) * (1 - time[..., None])
    return squares(m.out((m.first(noisy) + m.time(time)[:, None]).tanh()) - x)


def numbered(m: nn.Module, x: Tensor, n: int) -> Tensor:
    step = torch.randint(n, (len(x),))
    return squares(m.out((m.first(x) * (1 + m.table(step))[:, None]).tanh()))


def own_negatives(m: nn.Module, x: Tensor, n: int) -> Tensor:
    h = m.first(x).mean(1)
    return F.softplus((h * m.table(torch.randint(n, (len(x),)))).sum(1))


def masked_patches(m: nn.Module, x: Tensor, n: int) -> Tensor:
    kept = torch.rand(x.shape[:2]).argsort(1)[:, :2, None].expand(-1, -1, x.shape[2])
    tokens = torch.cat([m.mask.expand(len(x), 1, -1), m.first(x.gather(1, kept))], 1)
    return squares(m.out(tokens.tanh()))


def masked_words(m: nn.Module, x: Tensor, n: int) -> Tensor:
    words = torch.where(torch.rand(x.shape[:2]) < 0.3, n, (x[..., 0] * 9).long() % n)
    return squares(m.out(m.table(words).tanh()))


def dropped_condition(m: nn.Module, x: Tensor, n: int) -> Tensor:
    condition = torch.where(torch.rand(len(x), 1) < 0.5, m.empty, m.table((x[:, 0, 0] * 9).long() % n))
    return squares(m.out((m.first(x) + condition[:, None]).tanh()))


def two_views(m: nn.Module, x: Tensor, n: int) -> Tensor:
    y = m.first(torch.cat([x, x + torch.randn_like(x)])).tanh()
    return squares(m.out(y).tanh().unflatten(0, (2, -1)).diff(dim=0)[0])


def repeated(m: nn.Module, x: Tensor, n: int) -> Tensor:
    many = x.repeat_interleave(3, 0)
    return squares(m.out(m.first(many + torch.randn_like(many)).tanh()).unflatten(0, (-1, 3)).mean(1))


def importance_weighted(m: nn.Module, x: Tensor, n: int) -> Tensor:
    mean, scale = m.first(x[:, 0]), m.scale(x[:, 1]).exp()
    latent = mean + scale * torch.randn(5, len(x), WIDTH)
    return m.out(latent).square().sum(-1).logsumexp(0)


def shuffled_decoder(m: nn.Module, x: Tensor, n: int) -> Tensor:
    hidden = m.first(x[:, 0]) + torch.randn(len(x), WIDTH)
    return squares(m.cells(torch.randn(len(x), LENGTH, WIDTH), hidden[None])[0])


def sampled_actions(m: nn.Module, x: Tensor, n: int) -> Tensor:
    chances = Categorical(logits=m.policy(m.first(x[:, 0]).tanh()))
    action = chances.sample()
    value = m.value(m.actions(action) + x[:, 1]).squeeze(1)
    return squares(value[:, None]) - chances.log_prob(action) * value.detach()


def sampled_words(m: nn.Module, x: Tensor, n: int) -> Tensor:
    word, total = torch.zeros(len(x), dtype=torch.long), torch.zeros(len(x))
    for position in range(LENGTH):
        chances = m.policy((m.first(x[:, position]) + m.actions(word)).tanh()).softmax(1)
        word = chances.multinomial(1).squeeze(1)
        total = total + chances.gather(1, word[:, None]).log().squeeze(1)
    return total


def sampled_switches(m: nn.Module, x: Tensor, n: int) -> Tensor:
    return squares(m.value(m.square(m.into(x[:, 0]).sigmoid().bernoulli()).tanh()))


def sampled_torques(m: nn.Module, x: Tensor, n: int) -> Tensor:
    chances = Normal(m.into(x[:, 0]), 0.3)
    action = chances.sample()
    return squares(m.value(m.square(action).tanh())) * 0.1 - chances.log_prob(action).sum(1)


def shared_negatives(m: nn.Module, x: Tensor, n: int) -> Tensor:
    h = m.first(x).mean(1)
    return (h @ m.table(torch.randint(n, (n,))).T).logsumexp(1)


def listed_negatives(m: nn.Module, x: Tensor, n: int) -> Tensor:
    weights = torch.ones(n)
    h = m.first(x).mean(1)
    return F.softplus(F.linear(h, m.table(weights.multinomial(n, True)), m.bias[:n])).sum(1)


def time_grid(m: nn.Module, x: Tensor, n: int) -> Tensor:
    h = m.first(x)
    for time in torch.rand(n, 1).sort(0).values:
        h = h + 0.1 * (h + m.time(time)).tanh()
    return squares(h)


def sampled_weights(m: nn.Module, x: Tensor, n: int) -> Tensor:
    weights = m.mean + m.scale.exp() * torch.randn(n, WIDTH)
    return (x.mean(1) @ weights.T).square().sum(1)


def whole_rows(m: nn.Module, x: Tensor, n: int) -> Tensor:
    scale = (torch.rand(n, 1) < 0.5) + 0.5
    return squares(m.out(F.embedding((x[..., 0] * 9).long() % n, m.rows * scale)))


def sampled_codes(m: nn.Module, x: Tensor, n: int) -> Tensor:
    weights = m.hyper(torch.randn(n, 3))
    return torch.einsum("bd,sd->bs", x.mean(1), weights).tanh().sum(1)


def masked_features(m: nn.Module, x: Tensor, n: int) -> Tensor:
    return squares(m.square(m.into(x) * torch.rand(n)))


def both(m: nn.Module, x: Tensor, n: int) -> Tensor:
    time = torch.rand(len(x), 1)
    h = (m.first(x + torch.randn_like(x)) + m.time(time)[:, None]).mean(1)
    return (h @ m.table(torch.randint(n, (n,))).T).logsumexp(1)


def scored(h: Tensor, words: Tensor) -> Tensor:
    return (h @ words.T).logsumexp(1)


def beside(disturb: Callable[[nn.Module, Tensor, int], Tensor]) -> Callable[[nn.Module, Tensor, int], Tensor]:
    """Return a training with shared negatives, on what something else has disturbed."""

    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        return scored(disturb(m, x, n), m.table(torch.randint(n, (n,))))

    return run


def two_in_one(m: nn.Module, x: Tensor, n: int) -> Tensor:
    y = m.into(x)
    return m.back(y * torch.rand(n) + torch.rand(n)).mean(1)


def dropped_twice(m: nn.Module, x: Tensor, n: int) -> Tensor:
    y = m.first(x).transpose(0, 1)
    return (F.dropout(y, 0.2) + F.dropout(2 * y, 0.2)).tanh().mean(0)


def summed_up(m: nn.Module, x: Tensor, n: int) -> Tensor:
    h = m.first(x).mean(1)
    return h + 0.1 * h.detach().cumsum(0)


def attending(m: nn.Module, x: Tensor, n: int) -> Tensor:
    q, k, v = m.first(x).view(len(x), LENGTH, 1, 2, 4).permute(2, 0, 3, 1, 4).expand(3, -1, -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1).flatten(1)[:, :WIDTH]


def grid_like(make: Callable[[Tensor, int], Tensor]) -> Callable[[nn.Module, Tensor, int], Tensor]:
    """Return a training with a grid of times that takes its type or shape from the batch."""

    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        return scored(m.first(x).mean(1), m.time(make(x, n))[:n])

    return run


def of_numbers(x: Tensor, n: int) -> Tensor:
    return torch.tensor(torch.randint(9, (n,)).tolist(), dtype=x.dtype)[:, None]


def layers(**more: nn.Module | tuple[int, ...]) -> dict[str, nn.Module | tuple[int, ...]]:
    return {"first": nn.Linear(WIDTH, WIDTH), **more}


def out() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def acting(n: int, **more: nn.Module | tuple[int, ...]) -> dict[str, nn.Module | tuple[int, ...]]:
    return layers(policy=nn.Linear(WIDTH, n), actions=nn.Embedding(n, WIDTH), **more)


def switching(n: int) -> dict[str, nn.Module | tuple[int, ...]]:
    return {"into": nn.Linear(WIDTH, n), "square": nn.Linear(n, n), "value": nn.Linear(n, 1)}


ORDINARY = [
    Training("time grid", time_grid, lambda n: layers(time=net(1, 5, WIDTH))),  # one time has no room for samples
    Training("numbers", grid_like(of_numbers), lambda n: layers(time=net(1, 5, WIDTH))),
    Training("masked features", masked_features, lambda n: {"into": nn.Linear(WIDTH, n), "square": nn.Linear(n, n)}),
    Training("generated", generated, lambda n: {"generator": net(3, 5, WIDTH), "critic": net(WIDTH, 4, 1)}),
    Training("alike", generated_alike, lambda n: {"generator": zeroed(net(3, 5, 8)), "critic": net(8, 4, 1)}),
    Training("real and generated", real_and_generated, lambda n: {"generator": net(3, 5, 8), "critic": net(8, 4, 1)}),
    Training("timed", timed, lambda n: layers(time=net(1, 5, WIDTH), out=out())),
    Training("numbered", numbered, lambda n: layers(table=nn.Embedding(n, WIDTH), out=out())),
    Training("negatives", own_negatives, lambda n: layers(table=nn.Embedding(n, WIDTH))),
    Training("masked patches", masked_patches, lambda n: layers(mask=(1, 1, WIDTH), out=out())),
    Training("masked words", masked_words, lambda n: {"table": nn.Embedding(n + 1, WIDTH), "out": out()}),
    Training("conditions", dropped_condition, lambda n: layers(table=nn.Embedding(n, WIDTH), empty=(8,), out=out())),
    Training("two views", two_views, lambda n: layers(out=out())),
    Training("repeated", repeated, lambda n: layers(out=out())),
    Training("weighted", importance_weighted, lambda n: layers(scale=out(), out=out())),
    Training("actions", sampled_actions, lambda n: acting(n, value=nn.Linear(WIDTH, 1))),
    Training("sampled words", sampled_words, lambda n: acting(n)),
    Training("switches", sampled_switches, switching),
    Training("torques", sampled_torques, switching),
    Training("decoder", shuffled_decoder, lambda n: layers(cells=nn.GRU(WIDTH, WIDTH, batch_first=True))),
]
"""What parameters meet before they meet the batch is the samples' own, if there is any."""

SHARED = [
    Training("shared negatives", shared_negatives, lambda n: layers(table=nn.Embedding(n, WIDTH))),
    Training("listed negatives", listed_negatives, lambda n: layers(table=nn.Embedding(n, WIDTH), bias=(n + 1,))),
    Training("sampled weights", sampled_weights, lambda n: {"mean": (WIDTH,), "scale": (WIDTH,)}),
    Training("whole rows", whole_rows, lambda n: {"rows": (n, WIDTH), "out": out()}),
    Training("sampled codes", sampled_codes, lambda n: {"hyper": net(3, 5, WIDTH)}),
    Training("both", both, lambda n: layers(time=net(1, 5, WIDTH), table=nn.Embedding(n, WIDTH))),
    Training(
        "two in one",
        beside(two_in_one),
        lambda n: {"into": nn.Linear(WIDTH, n), "back": nn.Linear(n, WIDTH), "table": nn.Embedding(n, WIDTH)},
    ),
    Training("dropped twice", beside(dropped_twice), lambda n: layers(table=nn.Embedding(n, WIDTH))),
    Training("attending", beside(attending), lambda n: layers(table=nn.Embedding(n, WIDTH))),
    Training("type of x", grid_like(lambda x, n: torch.rand(n, 1).type_as(x)), lambda n: layers(time=net(1, 5, 8))),
    Training("to x", grid_like(lambda x, n: torch.rand(n, 1).to(x)), lambda n: layers(time=net(1, 5, WIDTH))),
]
"""Parameters meet numbers that all samples share before they meet the batch."""

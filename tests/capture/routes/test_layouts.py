"""Where the samples are said to be in what functions return is compared with what changes there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gradtrace.capture.forward.tape import Tape
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis
from lightning_gradtrace.capture.routes.layouts import Note, free_axes, known_place

N = 4
Change = Callable[[Tensor], Tensor]


def in_brackets(x: Tensor, value: Any) -> Tensor:
    y = x.clone()
    y[:, 1:3] = value
    return y


GRU = [torch.linspace(-1, 1, 3 * N * N, dtype=torch.float64).view(3 * N, N)] * 2
CHANGES: dict[str, Change] = {
    "nothing": lambda x: x,
    "views": lambda x: x.transpose(0, 1).reshape(N * N, N).view(N, N, 2, 2).flatten(2),
    "merged outer": lambda x: x.flatten(0, 1),
    "merged inner": lambda x: x.transpose(0, 1).flatten(0, 1),
    "merged in the middle": lambda x: x.transpose(0, 1).flatten(),
    "taken apart": lambda x: x.transpose(0, 1).flatten().unflatten(0, (N, N, N)),
    "named axes": lambda x: x.movedim(0, -1).swapaxes(0, 1).mT.permute(dims=(2, 0, 1)),
    "entry by entry": lambda x: (x * torch.arange(1.0, N + 1)[:, None].double() + x.relu()).clamp(min=0),
    "stretched": lambda x: x[:, None] + torch.zeros(N, N, N, dtype=torch.float64),
    "expanded": lambda x: x[:, :1].expand(-1, N, -1)[None].expand(N, -1, -1, -1),
    "in place": lambda x: x.clone().add_(x).mul_(2).relu_(),
    "sums": lambda x: x.sum(1) + x.mean(-1) + x.amax(2),
    "sums that keep axes": lambda x: x.sum((1, 2), keepdim=True).expand(N, N, N),
    "softmax": lambda x: x * x.softmax(1),
    "a constant matrix": lambda x: x @ torch.ones(N, N, dtype=torch.float64),
    "a constant layer": lambda x: F.linear(x, torch.ones(N, N, dtype=torch.float64)),
    "a constant convolution": lambda x: F.conv1d(x, torch.ones(N, N, 1, dtype=torch.float64)),
    "attention": lambda x: x @ (x @ x.mT).softmax(-1),
    "scaled attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "einsum without an arrow": lambda x: torch.einsum("zij", x) + torch.einsum("...ij", x).movedim(0, -1),
    "distances": lambda x: torch.cdist(x, torch.zeros(N, N, dtype=torch.float64)),
    "cuts": lambda x: x[:, 1:][..., -1] + x.narrow(1, 0, 1)[:, 0, 1:2] + x.select(2, 0).chunk(2, 1)[1][:, :1],
    "unbound": lambda x: x.unbind(1)[0] + x.split(1, 2)[1][..., 0] + next(iter(x.transpose(0, 1))),
    "an index": lambda x: x[:, [2, 0, 1, 1]].index_select(2, torch.tensor([1, 1, 3, 0])),
    "new axes": lambda x: x[:, None, ..., None],
    "sorted features": lambda x: x.sort(-1).values + x.topk(N, 1).values,
    "joined features": lambda x: torch.cat([x, x], 1) * torch.stack([x, x], 2).flatten(1, 2),
    "joined samples": lambda x: torch.cat([x, x]),
    "repeated": lambda x: x.repeat(2, 1, 1),
    "repeated one by one": lambda x: x.repeat_interleave(2, 0),
    "pooled": lambda x: F.max_pool1d(x, 2) + F.pad(F.adaptive_avg_pool1d(x, 1), (0, 1)),
    "layers without weights": lambda x: F.layer_norm(x, (N,)) + F.dropout(x, 0.5) + x.double().detach(),
    "glu": lambda x: F.glu(x * 1e3, 1),
    "mixed with others": lambda x: x + 0 * x.roll(1, 0) + 0 * x.flip(0) + 0 * x[[3, 2, 1, 0]] + 0 * x.sort(0)[0],
    "whole numbers": lambda x: (x * 1e6).long().double(),
    "a recurrent layer": lambda x: torch.gru(x, x.new_zeros(1, N, N), GRU, False, 1, 0.0, False, False, True)[0],
    "its state": lambda x: torch.gru(x.mT, x.new_zeros(1, N, N), GRU, False, 1, 0.0, False, False, True)[1],
    "numbers in brackets": lambda x: in_brackets(x, 0.0),
    "parts of others in brackets": lambda x: in_brackets(x, 0 * x.flip(0)[:, 1:3] + x[:, :2]),
    "a statistic": lambda x: x - 0 * x.mean(0, keepdim=True).expand(N, N, N),
    "noise": lambda x: x + 0 * torch.randn_like(x),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", CHANGES)
def test_who_changes_a_sample_changes_its_place_alone(name: str, axis: int) -> None:
    """All axes are as long as there are samples, so that sizes tell nothing."""
    x = torch.rand(N, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1

    def run(x: Tensor) -> tuple[Tensor, Note | None]:
        torch.manual_seed(0)
        with Tape({}, x, N, axis) as tape:
            y = CHANGES[name](x.transpose(0, axis))
        return y, tape._routes.layouts(y)

    y, note = run(x)
    place = known_place(note)
    assert place is not None
    assert free_axes(note) == frozenset(range(y.dim())) - {place.axis}
    for i in range(N):
        other = x.clone()
        other.select(axis, i).mul_(1.5)
        moved = place.samples_first((run(other)[0] - y).abs(), N).flatten(1).sum(1) > 1e-9
        assert moved.tolist() == [sample == i for sample in range(N)]


DOUBTFUL: dict[str, Change] = {
    "pairs": lambda x: x[:, 0] @ x[:, 0].T,
    "a roll of all entries": lambda x: torch.roll(x, 1) + x,
    "a diagonal": lambda x: torch.einsum("iij->ij", x),
    "turned in brackets": lambda x: in_brackets(x, x.transpose(0, 1)[:, :2]),
    "joined with a constant": lambda x: torch.stack([x, torch.ones(N, N, N, dtype=torch.float64)], 1),
    "noise on a statistic": lambda x: torch.randn_like(x) * x.std(0),
    "pairs of a layer": lambda x: F.linear(x[:, 0], x[:, 1]),
    "groups": lambda x: F.conv1d(x.flatten(0, 1)[None], torch.ones(N * N, 1, 1, dtype=torch.float64), groups=N * N),
    "turned and added": lambda x: x + x.transpose(0, 1),
    "cut out": lambda x: x[1:],
    "one sample": lambda x: x[0],
    "stacked again": lambda x: torch.stack([x[i] for i in (1, 0, 2, 3)]),
    "a mask": lambda x: x[x[:, 0, 0] > 0],
    "two lists": lambda x: x[[0, 1, 2, 3], [3, 2, 1, 0]],
    "split samples": lambda x: x.view(2, 2, N, N),
    "in another order": lambda x: x.roll(1, 0),
    "not followed": lambda x: x.cummax(0).values,
    "written to": lambda x: x.clone().index_copy_(0, torch.arange(N), x.transpose(0, 1)),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_of_other_functions_nothing_is_said(name: str) -> None:
    x = torch.rand(N, N, N, dtype=torch.float64)
    with Tape({}, x, N) as tape:
        y = DOUBTFUL[name](x)
    assert known_place(tape._routes.layouts(y)) is None


def test_views_of_what_was_written_to_are_forgotten() -> None:
    x = torch.rand(N, N, N, dtype=torch.float64)
    with Tape({}, x, N) as tape:
        kept = x * 2
        view = kept[:, 0]
        kept.add_(x.transpose(0, 1))
    assert known_place(tape._routes.layouts(view)) is None
    assert known_place(tape._routes.layouts(kept)) is None


@pytest.mark.parametrize("mixed", [lambda x: x.mean(0), lambda x: x[:, 0].T @ x[:, 0], lambda x: x.std((0, 1))])
def test_no_axis_of_a_mixture_may_hold_samples(mixed: Change) -> None:
    x = torch.rand(N, N, N, dtype=torch.float64)
    with Tape({}, x, N) as tape:
        y = mixed(x)
    assert free_axes(tape._routes.layouts(y)) == frozenset(range(y.dim()))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.sum(input=x, dim=1),
        lambda x: F.linear(input=x, weight=torch.ones(N, N, dtype=torch.float64)),
        lambda x: x.mean().mean(0),
        lambda x: x.mean().sort(0)[0],
        lambda x: torch.fft.rfft(input=x),
    ],
)
def test_calls_that_can_not_be_read_are_left_alone(call: Change) -> None:
    x = torch.rand(N, N, dtype=torch.float64)
    with Tape({}, x, N):
        found = call(x)
    assert torch.equal(found, call(x))


def test_tensors_of_inference_mode_are_left_alone() -> None:
    x = torch.rand(N, N, dtype=torch.float64)
    with Tape({}, x, N), torch.inference_mode():
        found = x * 2
    assert torch.equal(found, x * 2)
    with Tape({}, found, N):
        assert torch.equal(found.clone() * 2, x * 4)


def test_the_way_back_to_the_batch_may_be_long() -> None:
    x = torch.rand(N, N, dtype=torch.float64)
    with Tape({}, x, N) as tape:
        y = x
        for _ in range(5000):
            y = y + 1
    assert known_place(tape._routes.layouts(y)) == SampleAxis(0)

"""The made-up device is as strict as a card, and its numbers are the CPU's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.device import pretend

pytestmark = pytest.mark.pretend


@pytest.fixture(autouse=True)
def _loaded() -> None:
    pretend.load()
    pretend.take_waits()


def there(*shape: int) -> Tensor:
    return torch.randn(*shape).to(pretend.NAME)


def test_tensors_of_both_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match=r"on the same device, but `aten::mm`"):
        there(3, 3) @ torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="on the same device"):
        there(3).add_(torch.ones(3))
    assert (there(3) + torch.tensor(1.0)).device.type == pretend.NAME  # one number of the CPU may come in


def test_a_generator_of_the_cpu_draws_nothing_there() -> None:
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(3, generator=torch.Generator().manual_seed(0), device=pretend.NAME)


def test_views_share_memory_and_memory_grows() -> None:
    a = there(4, 3)
    a[1:3].T.zero_()
    assert a[1:3].abs().sum() == 0 and a[0].abs().sum() > 0
    out = torch.empty(0, device=pretend.NAME)
    torch.mul(a, 2, out=out)
    assert out.shape == (4, 3) and torch.equal(out.cpu(), a.cpu() * 2)
    assert copy.deepcopy(nn.Linear(2, 2).to(pretend.NAME)).weight.device.type == pretend.NAME


def test_gradients_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.Flatten(), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 2))
    x = torch.randn(6, 3, 5)
    model(x).square().mean().backward()
    other = copy.deepcopy(model).to(pretend.NAME)
    other.zero_grad()
    other(x.to(pretend.NAME)).square().mean().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.cpu())


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_layers_have_cells_of_their_own(layer, bias: bool) -> None:
    torch.manual_seed(0)
    model, x = layer(3, 4, num_layers=2, bias=bias, batch_first=True), torch.randn(5, 6, 3)
    other = copy.deepcopy(model).to(pretend.NAME)
    for m, batch in ((model, x), (other, x.to(pretend.NAME))):
        output, last = m(batch)
        cell = last[1] if isinstance(last, tuple) else last
        (output.square().sum() + cell.sum()).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.cpu())


@pytest.mark.parametrize(
    "wait",
    [
        Tensor.item,
        Tensor.cpu,
        Tensor.tolist,
        Tensor.nonzero,
        Tensor.unique,
        lambda a: a[a > 0],
        lambda a: torch.equal(a, a + 1),
        lambda a: torch.ones(1).to(a.device),
        lambda a: bool((a > 0).any()),
    ],
    ids=["item", "cpu", "tolist", "nonzero", "unique", "masked", "equal", "from the CPU", "truth"],
)
def test_what_a_program_waits_for_is_noted(wait) -> None:
    a = there(1)
    pretend.take_waits()
    wait(a)
    assert pretend.take_waits()


def test_work_that_is_only_asked_for_is_no_wait() -> None:
    a = there(5, 5)
    pretend.take_waits()
    ((a @ a).tanh().sum(0).topk(2).values + 1).to("cpu", non_blocking=True)
    a[torch.ones(2, dtype=torch.long, device=a.device)].index_add_(
        0, torch.zeros(1, dtype=torch.long).to(a.device, non_blocking=True), a[:1]
    )
    assert pretend.take_waits() == []

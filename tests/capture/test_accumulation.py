"""Which backward passes a gradient holds, where gradients wait outside of `.grad` for a later pass to reduce them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_gradtrace.capture.accumulation import Accumulation
from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.shares import DenseShare


class Spread:
    """Two parameters whose gradients wait until somebody reduces them, as with FSDP2."""

    def __init__(self) -> None:
        self.parameters = {name: nn.Parameter(torch.ones(2)) for name in ("a", "b")}
        self.waiting: dict[str, Tensor] = {}
        self.accumulation = Accumulation(waiting=lambda: {id(self.parameters[n]): g for n, g in self.waiting.items()})
        self.n_passes = 0

    def backward(self, used: str = "ab", reduced: str = "", seen: bool = True) -> None:
        """Make a pass that adds one to gradients that it leaves, and reduces those that it is told to."""
        if seen:
            self.accumulation.begin_pass(self.parameters)
        for name in used:
            self.waiting[name] = self.waiting.get(name, torch.zeros(2)).add_(1)
        for name in reduced:
            if name in self.waiting:
                p, gradient = self.parameters[name], self.waiting.pop(name)
                p.grad = gradient if p.grad is None else p.grad + gradient
        if seen:
            shares = MicroBatch(1, {name: DenseShare(torch.ones(1, 2)) for name in used})
            self.accumulation.end_pass(self.n_passes, shares, torch.ones(()), self.parameters, [0])
        self.n_passes += 1

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def step(self) -> dict[str, float]:
        """Make an optimizer step; how often each parameter's shares account for it, which is what `.grad` holds."""
        micro_batches, losses = self.accumulation.of(0, self.parameters)
        assert len(losses) == len(micro_batches)
        found = {n: sum(m.shares[n].total()[0].item() for m in micro_batches if n in m.shares) for n in "ab"}
        wanted = {n: 0.0 if p.grad is None else p.grad[0].item() for n, p in self.parameters.items()}
        unknown = self.accumulation.unknown.copy()
        self.accumulation.spend(0, [name for name, p in self.parameters.items() if p.grad is not None])
        assert all(found[name] == wanted[name] for name in set("ab") - unknown)
        return {name: -1.0 if name in unknown else number for name, number in found.items()}


def test_what_waits_belongs_to_the_step_after_it_was_reduced() -> None:
    training = Spread()
    training.backward()
    training.backward()
    assert training.step() == {"a": 0.0, "b": 0.0}
    training.backward(reduced="ab")
    assert training.step() == {"a": 3.0, "b": 3.0}
    training.zero_grad()
    training.backward(reduced="ab")
    assert training.step() == {"a": 1.0, "b": 1.0}


def test_what_waits_is_not_zeroed_with_the_gradients() -> None:
    training = Spread()
    training.backward(reduced="ab")
    training.backward()
    training.zero_grad()
    training.backward(reduced="ab")
    assert training.step() == {"a": 2.0, "b": 2.0}


def test_one_parameter_may_wait_while_another_is_reduced() -> None:
    training = Spread()
    training.backward(reduced="a")
    training.backward(reduced="a")
    assert training.step() == {"a": 2.0, "b": 0.0}
    training.zero_grad()
    training.backward(reduced="ab")
    assert training.step() == {"a": 1.0, "b": 3.0}


def test_a_pass_reduces_what_it_does_not_reach() -> None:
    training = Spread()
    training.backward()
    training.backward(used="a", reduced="ab")
    assert training.step() == {"a": 2.0, "b": 1.0}


@pytest.mark.parametrize("in_place", [False, True])
def test_what_waited_may_be_thrown_away(in_place: bool) -> None:
    training = Spread()
    training.backward()
    if in_place:
        training.waiting["a"].zero_()
    else:
        del training.waiting["a"]
    training.backward(reduced="ab")
    assert training.step() == {"a": 1.0, "b": 2.0}


def test_what_waits_of_a_pass_that_nobody_saw_is_unknown() -> None:
    training = Spread()
    training.backward(used="a", seen=False)
    training.backward()
    training.backward(reduced="ab")
    assert training.step() == {"a": -1.0, "b": 2.0}
    training.zero_grad()
    training.backward(reduced="ab")
    assert training.step() == {"a": 1.0, "b": 1.0}

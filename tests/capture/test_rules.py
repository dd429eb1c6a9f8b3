"""Every rule, on every option of its function, equals the oracle and the general rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gradtrace.capture import attribution
from lightning_gradtrace.capture.engine import MicroBatch, TapeEngine
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.probe import PermutationProbe
from lightning_gradtrace.capture.rules import registered
from tests.capture.uses import USES, N, UseCase


def capture(model: nn.Module, x: Tensor, axis: int = 0, *, rules: bool = True) -> MicroBatch:
    """Return the shares of the sum of squares of the model's output, by the rules or by the general rule alone."""
    engine, parameters = TapeEngine(), dict(model.named_parameters())
    tape = engine.tape(parameters, x, N)
    with tape:
        loss = model(x).square().sum()
    loss.backward()
    if not rules:
        for use in tape.uses:
            use.rule = None
    return engine.collect(tape, N, PermutationProbe(model, parameters, model, x, N, axis))


def make(case: UseCase, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = case.build().to(dtype), case.draw()
    return model, x.to(dtype) if x.is_floating_point() else x


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Names of the functions of all uses, and whether a closed form served."""
    seen = []
    original = attribution._WAYS["closed"]

    def closed_form(use, *args):
        shares = original(use, *args)
        seen.append((use.site.function, shares is not None))
        return shares

    monkeypatch.setitem(attribution._WAYS, "closed", closed_form)
    return seen


@pytest.mark.parametrize("case", USES, ids=lambda case: case.name)
def test_shares_equal_the_oracle(case: UseCase, served: list[tuple[str, bool]]) -> None:
    model, x = make(case)
    micro_batch = capture(model, x, case.axis)
    function = case.name.split(":")[0]
    closed = {name: by_rule for name, by_rule in served if name == function}
    assert closed == {function: case.closed}, "the use reached another function, or another rule, than it is to test"

    def contribution(i: int) -> Tensor:
        return model(x.narrow(case.axis, i, 1)).square().sum()

    expected = per_sample_gradients(contribution, N, dict(model.named_parameters()))
    assert set(micro_batch.shares) == set(expected)
    for parameter, gradients in expected.items():
        share = micro_batch.shares[parameter]
        assert share.shape == gradients.shape[1:]
        assert share.n_samples == N
        torch.testing.assert_close(share.dense(), gradients, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(share.dense(slice(1, 2)), gradients[1:2], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(share.total(), gradients.sum(0), rtol=1e-10, atol=1e-12)
    if case.share:
        first = next(iter(micro_batch.shares.values()))
        assert type(first).__name__ == case.share



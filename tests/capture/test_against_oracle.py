"""Every per-sample gradient equals one-sample-at-a-time autograd; sums equal `.grad`."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from lightning_gradtrace.capture.check import check_sums, sum_errors
from lightning_gradtrace.capture.engine import MicroBatch, TapeEngine
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.probe import probe
from tests.cases import CASES, REDUCTIONS, Case

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def capture(case: Case, model: nn.Module, inputs, targets, reduction: str, engine: TapeEngine | None = None) -> MicroBatch:
    """Run one taped forward and backward pass."""
    engine = engine or TapeEngine()
    parameters = dict(model.named_parameters())
    n_targets = int((targets != -100).sum())
    tape = engine.tape(parameters)
    with tape:
        loss = case.loss(model, inputs, targets, reduction, n_targets)
    loss.backward()
    look = functools.partial(probe, model, parameters, model, inputs, case.n_samples, case.batch_axis)
    return engine.collect(tape, case.n_samples, look)


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    error = torch.linalg.vector_norm((found - expected).flatten(1), dim=1)
    size = torch.linalg.vector_norm(expected.flatten(1), dim=1).amax().clamp(min=1e-12)
    assert float(error.amax() / size) < TOLERANCE[expected.dtype], f"{name}: relative error {error.amax() / size:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_share_is_the_gradient_of_its_sample_alone(case: Case, reduction: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = case.build().to(dtype)
    inputs, targets = case.batch(reduction == "ignored")
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    micro_batch = capture(case, model, inputs, targets, reduction)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    expected = per_sample_gradients(
        case.contribution(model, inputs, targets, reduction), case.n_samples, dict(model.named_parameters())
    )
    assert set(micro_batch.shares) == set(expected)
    for name, share in micro_batch.shares.items():
        assert share.n_samples == case.n_samples
        assert_close(share.dense(), expected[name], name)
        assert_close(share.total()[None], gradients[name][None], name)
    check_sums(sum_errors([micro_batch], gradients), gradients)

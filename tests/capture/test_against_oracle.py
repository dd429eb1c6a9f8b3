"""Every per-sample gradient equals one-sample-at-a-time autograd; sums equal `.grad`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gradtrace.capture.check import check_sums, sum_errors
from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.capture.forward.replay import Surroundings
from lightning_gradtrace.capture.forward.use import Site, Use
from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.placing.placement import UnattributableError
from lightning_gradtrace.capture.probing.probe import PermutationProbe
from tests.cases import CASES, REDUCTIONS, Case, NoProbe

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def capture(
    case: Case, model: nn.Module, inputs, targets, reduction: str, engine: TapeEngine | None = None
) -> MicroBatch:
    """Run one taped forward and backward pass."""
    engine = engine or TapeEngine()
    parameters = dict(model.named_parameters())
    n_targets = int((targets != -100).sum())
    tape = engine.tape(parameters, (inputs, targets), case.n_samples, case.batch_axis)
    with tape:
        loss = case.loss(model, inputs, targets, reduction, n_targets)
    loss.backward()
    look = PermutationProbe(model, parameters, model, inputs, case.n_samples, case.batch_axis)
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


def test_an_input_that_is_changed_in_place_after_its_use_is_refused() -> None:
    model = nn.Linear(3, 2)
    engine = TapeEngine()
    x = torch.randn(4, 3)
    tape = engine.tape(dict(model.named_parameters()), x, 4)
    with tape:
        loss = model(x).sum()
    loss.backward()
    x.zero_()
    with pytest.raises(
        UnattributableError, match=r"the input of use 0 \(`linear` of `weight`, `bias`\) was changed in place"
    ):
        engine.collect(tape, 4, NoProbe())


def test_a_use_in_a_pass_without_backward_is_left_out() -> None:
    """A forward for logging, with gradients enabled, contributes nothing."""
    model = nn.Linear(3, 2)
    engine = TapeEngine()
    x = torch.randn(4, 3)
    tape = engine.tape(dict(model.named_parameters()), x, 4)
    with tape:
        model(x * 100).sum()
        loss = model(x).sum()
        with torch.no_grad():
            model(x)
    loss.backward()
    micro_batch = engine.collect(tape, 4, NoProbe())
    torch.testing.assert_close(micro_batch.shares["weight"].total(), model.weight.grad)


def test_an_output_to_which_nothing_came_has_no_cotangent() -> None:
    """Of the outputs of cuDNN's recurrent layers autograd calls all hooks, some of them with None."""
    use = Use(Site("lstm", ("w",), 0), torch.lstm, None, [], None, Surroundings("cpu", None, None), [None, None])
    use.receive(1, None)
    assert not use.reached
    use.receive(0, torch.ones(2))
    assert list(use.cotangents) == [0]


def test_placements_are_remembered_and_serve_a_last_batch_of_another_size() -> None:
    case = next(case for case in CASES if case.name == "encoder, T = B, batch first")
    model = case.build().double()
    engine = TapeEngine()
    capture(case, model, *case.batch(False), "mean", engine)
    inputs, targets = (t[:2] for t in case.batch(False))
    tape = engine.tape(dict(model.named_parameters()), (inputs, targets), 2)
    with tape:
        loss = case.loss(model, inputs, targets, "sum", 1)
    model.zero_grad()
    loss.backward()
    micro_batch = engine.collect(tape, 2, NoProbe())
    expected = per_sample_gradients(case.contribution(model, inputs, targets, "sum"), 2, dict(model.named_parameters()))
    for name, share in micro_batch.shares.items():
        assert_close(share.dense(), expected[name], name)

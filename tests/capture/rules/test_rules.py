"""Every rule, on every option of its function, equals the oracle and the general rule."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lightning_gradtrace.capture import attribution
from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.capture.forward.use import Use
from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.probing.probe import PermutationProbe
from lightning_gradtrace.capture.rules import registered
from lightning_gradtrace.capture.shares import convolution
from tests.capture.rules.uses import USES, N, UseCase


def capture(model: nn.Module, x: Tensor, axis: int = 0, *, rules: bool = True, n_samples: int = N) -> MicroBatch:
    """Return the shares of the sum of squares of the model's output, by the rules or by the general rule alone."""
    engine, parameters = TapeEngine(), dict(model.named_parameters())
    tape = engine.tape(parameters, x, n_samples)
    with tape:
        loss = model(x).square().sum()
    loss.backward()
    probe = PermutationProbe(model, parameters, model, x, n_samples, axis)
    if rules:
        return engine.collect(tape, n_samples, probe)
    for use in tape.uses:
        use.rule = None
    with mock.patch.object(Use, "is_told_by_input", new=False):
        return engine.collect(tape, n_samples, probe)


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


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
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
        assert not share.dense().requires_grad
        torch.testing.assert_close(share.dense(), gradients, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(share.dense(slice(1, 2)), gradients[1:2], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(share.total(), gradients.sum(0), rtol=1e-10, atol=1e-12)
    if case.share:
        first = next(iter(micro_batch.shares.values()))
        assert type(first).__name__ == case.share


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", USES, ids=lambda case: case.name)
def test_one_sample_has_the_whole_gradient(case: UseCase) -> None:
    model, x = make(case)
    x = x.narrow(case.axis, 0, 1)
    shares = capture(model, x, case.axis, n_samples=1).shares
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(shares[name].dense(), parameter.grad[None], rtol=1e-10, atol=1e-12)


# What the general rules can't run: results or inputs that are overwritten.
NOT_GENERAL = ("add_:", "sub_:", "subtract_:", "add: the input is changed")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "case", [c for c in USES if c.closed and not c.name.startswith(NOT_GENERAL)], ids=lambda case: case.name
)
def test_shares_equal_the_general_rule(case: UseCase) -> None:
    model, x = make(case)
    found, expected = capture(model, x, case.axis).shares, capture(model, x, case.axis, rules=False).shares
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name].dense(), expected[name].dense(), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", [c for c in USES if c.closed], ids=lambda case: case.name)
def test_shares_in_half_precision_are_summed_in_single_precision(case: UseCase) -> None:
    model, x = make(case, torch.bfloat16)
    for name, share in capture(model, x, case.axis).shares.items():
        gradient = model.get_parameter(name).grad.float()
        assert share.dense().dtype == share.total().dtype == torch.float32
        size = gradient.abs().amax()
        assert float((share.total() - gradient).abs().amax()) <= 0.05 * float(size) + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm_takes_the_eps_of_torch_for_small_inputs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.RMSNorm(8, dtype=dtype), (torch.randn(N, 2, 8) * 1e-3).to(dtype)
    share = capture(model, x).shares["weight"]
    torch.testing.assert_close(share.total(), model.weight.grad.float(), rtol=2e-2, atol=1e-2)


def masked_gradients(model: nn.Module, x: Tensor, axis: int, run) -> dict[str, Tensor]:
    """Return the decomposition by output: gradients for the cotangent of one sample's part of the output at a time."""
    rows = []
    for i in range(N):
        y = run()
        cotangent = torch.zeros_like(y)
        cotangent.narrow(axis, i, 1).copy_(2 * y.detach().narrow(axis, i, 1))
        rows.append(torch.autograd.grad(y, list(model.parameters()), cotangent))
    return {
        name: torch.stack(g) for (name, _), g in zip(model.named_parameters(), zip(*rows, strict=True), strict=True)
    }


@pytest.mark.parametrize(
    ("shape", "axis", "build"),
    [
        ((N, 4), 0, lambda: nn.BatchNorm1d(4)),
        ((N, 4, 5), 0, lambda: nn.BatchNorm1d(4, track_running_stats=False)),
        ((N, 4, 5, 2), 0, lambda: nn.BatchNorm2d(4, momentum=None)),
        ((N, 4, 2, 1, 5), 0, lambda: nn.BatchNorm3d(4)),
    ],
    ids=["rows", "without running statistics", "images", "volumes"],
)
def test_batch_norm_in_training_is_split_by_the_samples_of_its_output(shape, axis, build) -> None:
    """Samples are coupled; the share is that of the decomposition, and running statistics are left alone."""
    torch.manual_seed(0)
    model, x = build().double(), torch.randn(*shape, dtype=torch.float64)
    untraced = copy.deepcopy(model)
    untraced(x)
    shares = capture(model, x, axis).shares
    for (name, found), expected in zip(model.named_buffers(), untraced.buffers(), strict=True):
        assert torch.equal(found, expected), name
    for name, expected in masked_gradients(model, x, axis, lambda: model(x)).items():
        torch.testing.assert_close(shares[name].dense(), expected, rtol=1e-10, atol=1e-12)


def test_a_convolution_is_written_out_in_a_bounded_workspace(monkeypatch) -> None:
    seen = []
    original = convolution.ConvolutionShare.factors
    monkeypatch.setattr(convolution, "WORKSPACE", 300)
    monkeypatch.setattr(
        convolution.ConvolutionShare, "factors", lambda self, s: seen.append(original(self, s)) or seen[-1]
    )
    torch.manual_seed(0)
    model = nn.Conv2d(2, 4, 3).double()
    x = torch.randn(N, 2, 4, 6, dtype=torch.float64)
    share = capture(model, x).shares["weight"]
    assert [right.shape for _, right in seen] == [(1, 18, 8)] * N
    torch.testing.assert_close(share.total(), model.weight.grad)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Embedding(5, 3, scale_grad_by_freq=True),
        lambda: nn.Embedding(5, 3, scale_grad_by_freq=True, padding_idx=1),
        lambda: nn.EmbeddingBag(5, 3, mode="sum", scale_grad_by_freq=True),
        lambda: nn.EmbeddingBag(5, 3, mode="mean", scale_grad_by_freq=True),
    ],
    ids=["embedding", "padded", "bag sum", "bag mean"],
)
def test_embeddings_scaled_by_frequency_are_split_by_the_samples_of_their_output(build) -> None:
    """With `scale_grad_by_freq` samples are coupled; the share is that of the decomposition (docs/concepts.md, 2)."""
    torch.manual_seed(0)
    model, x = build().double(), torch.randint(5, (N, 7))
    share = capture(model, x).shares["weight"]
    torch.testing.assert_close(share.total(), model.weight.grad)
    torch.testing.assert_close(share.dense(), masked_gradients(model, x, 0, lambda: model(x))["weight"])


def test_a_complex_parameter_is_left_to_the_general_rule(served: list[tuple[str, bool]]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 5, dtype=torch.complex128)
    x = torch.randn(N, 4, dtype=torch.complex128)
    engine = TapeEngine()
    tape = engine.tape(dict(model.named_parameters()), x, N)
    with tape:
        y = model(x)
        loss = y.abs().sum()
    loss.backward()
    shares = engine.collect(tape, N, PermutationProbe(model, {}, model, x, N, 0)).shares
    assert served == [("linear", False)]
    torch.testing.assert_close(shares["weight"].values.sum(0), model.weight.grad)


def test_every_rule_is_exercised() -> None:
    names = {function.__name__ for function in registered()}
    tested = {case.name.split(":")[0] for case in USES if case.closed}
    assert names == tested, "add the new rule's uses to tests/capture/rules/uses"

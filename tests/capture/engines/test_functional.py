"""The functional engine gives what the oracle and the tape give, whatever the model allows; it says what is wrong."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradtrace import GradTrace, TopK, open_trace
from lightning_gradtrace.capture.check import check_sums, sum_errors
from lightning_gradtrace.capture.engines.functional import FunctionalEngine
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.placing.placement import UnattributableError
from tests.capture.test_against_oracle import assert_close
from tests.cases import CASES, REDUCTIONS, Case, NoProbe

LARGE, SMALL = 1 << 26, 500


def case_loss(case: Case, reduction: str):
    """Return the per-sample losses of a case, as a user would write them for a whole batch."""

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        logits = model(inputs)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
        loss = loss.view(targets.shape)
        loss = loss.sum(1 - case.batch_axis) if loss.dim() > 1 else loss
        return loss if reduction == "sum" else loss / (targets != -100).sum()

    return losses


def collect(engine: FunctionalEngine, batch, n_samples: int, batch_axis: int = 0, factor: float = 1.0):
    parameters = dict(engine.module.named_parameters())
    with engine.tape(parameters, batch, n_samples, batch_axis) as moment:
        engine.module(batch[0])
    return engine.collect(moment, n_samples, NoProbe(), factor)


def by_backward(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    return {n: torch.stack(c) for (n, _), c in zip(model.named_parameters(), zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("workspace", [LARGE, SMALL], ids=["kept", "recomputed"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_share_is_the_gradient_of_its_sample_alone(case: Case, reduction: str, workspace: int) -> None:
    torch.manual_seed(0)
    model = case.build().double()
    inputs, targets = case.batch(reduction == "ignored")
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    parameters = dict(model.named_parameters())
    engine = FunctionalEngine(model, case_loss(case, reduction), workspace=workspace)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*one backward pass per sample of the whole batch")
        micro_batch = collect(engine, (inputs, targets), case.n_samples, case.batch_axis)
    expected = per_sample_gradients(case.contribution(model, inputs, targets, reduction), case.n_samples, parameters)
    assert set(micro_batch.shares) == set(expected)
    for name, share in micro_batch.shares.items():
        assert share.n_samples == case.n_samples
        assert_close(share.dense(), expected[name], name)
        assert_close(share.dense(slice(1, 3)), expected[name][1:3], name) if case.n_samples > 2 else None
        assert_close(share.total()[None], expected[name].sum(0)[None], name)
    assert all(p.grad is None for p in model.parameters())


def mlp(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), *extra, nn.Linear(5, 4)).double()


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") / len(batch[0])


BATCH = (torch.randn(7, 6, generator=torch.Generator().manual_seed(1)).double(), torch.arange(7) % 4)


@pytest.mark.parametrize("workspace", [LARGE, SMALL], ids=["kept", "recomputed"])
def test_dropout_is_drawn_as_in_the_training_step(workspace: int) -> None:
    model = mlp(nn.Dropout(0.5))
    engine = FunctionalEngine(model, mean_loss, workspace=workspace)
    torch.manual_seed(5)
    losses = mean_loss(model, BATCH)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="one backward pass per sample.*random operation"):
        shares = collect(engine, BATCH, 7).shares
    assert torch.equal(torch.get_rng_state(), after)
    for name, expected in by_backward(model, losses).items():
        with torch.no_grad():  # as in a step's hook
            found = shares[name].dense()
        assert_close(found, expected, name)


@pytest.mark.parametrize("workspace", [LARGE, SMALL], ids=["kept", "recomputed"])
def test_batch_norm_is_left_as_it_was_and_couples_samples_exactly(workspace: int) -> None:
    model = mlp(nn.BatchNorm1d(5, dtype=torch.float64))
    engine = FunctionalEngine(model, mean_loss, workspace=workspace // 20)
    with engine.tape(dict(model.named_parameters()), BATCH, 7, 0) as moment:
        losses = mean_loss(model, BATCH)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.warns(UserWarning, match="one backward pass per sample"):
        shares = engine.collect(moment, 7, NoProbe()).shares
    expected = by_backward(model, losses)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)  # shares that are computed later belong to the weights of the step
    for name, share in shares.items():
        if name != "0.bias":  # its gradient is zero, batch norm takes it out again
            assert_close(share.dense(), expected[name], name)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_a_loss_that_couples_samples_is_differentiated_as_a_whole() -> None:
    def centred(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        return (logits - logits.mean(0)).pow(2).sum(1) + logits.sum(1)

    model = mlp()
    engine = FunctionalEngine(model, centred)
    with pytest.warns(UserWarning, match=r"something couples the samples"):
        shares = collect(engine, BATCH, 7).shares
    for name, expected in by_backward(model, centred(model, BATCH)).items():
        assert_close(shares[name].dense(), expected, name)


class Hidden(torch.autograd.Function):
    """A linear layer that no function mode sees inside, and that vmap can't run."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, d):
        x, weight = ctx.saved_tensors
        return d @ weight, d.T @ x


class HiddenModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return Hidden.apply(x, self.weight)


def test_a_custom_function_that_nothing_else_can_see_into_is_served() -> None:
    model = HiddenModel()
    with pytest.warns(UserWarning, match="one backward pass per sample"):
        shares = collect(FunctionalEngine(model, mean_loss), BATCH, 7).shares
    assert_close(shares["weight"].dense(), by_backward(model, mean_loss(model, BATCH))["weight"], "weight")


def test_a_sample_without_loss_costs_speed_for_its_batch_only() -> None:
    def masked(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") / (batch[1] != -100).sum()

    model = mlp()
    engine = FunctionalEngine(model, masked)
    targets = BATCH[1].clone()
    targets[2] = -100
    for y in (targets, BATCH[1]):
        shares = collect(engine, (BATCH[0], y), 7).shares
        expected = by_backward(model, masked(model, (BATCH[0], y)))
        for name, share in shares.items():
            assert_close(share.dense(), expected[name], name)
    assert engine._by_sample


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, b: F.cross_entropy(m(b[0]), b[1]), r"returned shape \(\), expected one loss for each of the 7"),
        (lambda m, b: None, r"returned a `NoneType`, expected one loss for each of the 7 samples"),
        (lambda m, b: mean_loss(m, b).detach(), "returned losses that no tracked parameter led to"),
    ],
)
def test_a_function_that_gives_no_loss_per_sample_is_refused(function, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(FunctionalEngine(mlp(), function), BATCH, 7)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, b: mean_loss(m, b) * 7, "add up to 7 times the gradient: divide by the batch size"),
        (lambda m, b: mean_loss(m, b) / 7, "times the gradient: multiply by the batch size"),
        (lambda m, b: mean_loss(m, b) * 3, "add up to 3 times the gradient: divide by that number"),
        (lambda m, b: m(b[0]).pow(2).sum(1), "is not the loss of `training_step`, split into samples"),
    ],
    ids=["sum for mean", "mean for sum", "factor", "another loss"],
)
def test_losses_that_do_not_add_up_are_refused_with_the_reason(function, message: str) -> None:
    model = mlp()
    engine = FunctionalEngine(model, function)
    micro_batch = collect(engine, BATCH, 7)
    mean_loss(model, BATCH).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    with pytest.raises(UnattributableError, match=message):
        check_sums(
            sum_errors([micro_batch], gradients), gradients, advice=lambda: engine.advice([micro_batch], gradients)
        )


class Net(pl.LightningModule):
    """Two layers, trained with or without dropout."""

    def __init__(self, dropout: float = 0.0, early_draw: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 4))
        self.early_draw = early_draw

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if self.early_draw:
            torch.rand(3)
        return mean_loss(self, batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


DATA = TensorDataset(torch.randn(14, 6, generator=torch.Generator().manual_seed(2)), torch.arange(14) % 4)


def fit(model: Net, *callbacks: pl.Callback, **options) -> Net:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        max_epochs=2,
        callbacks=list(callbacks),
        **{"gradient_clip_val": 0.5, **options},
    )
    trainer.fit(model, DataLoader(DATA, batch_size=4))
    return model


def make(**settings) -> Net:
    pl.seed_everything(1, verbose=False)
    return Net(**settings)


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "64-true"}, {"precision": "bf16-mixed"}], ids=str
)
def test_both_engines_write_the_same_trace_and_change_nothing(options: dict, tmp_path: Path) -> None:
    plain = fit(make(), **options)
    frames = []
    for engine in ("tape", "functional"):
        path = tmp_path / f"{engine}.zarr"
        loss = {"per_sample_loss": mean_loss} if engine == "functional" else {}
        model = fit(make(), GradTrace(path, TopK(20), engine=engine, ledger_every_n_steps=1, **loss), **options)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
        trace = open_trace(path)
        coarse = options.get("precision") == "bf16-mixed"
        assert (trace.steps["residual"] < (2e-2 if coarse else 1e-5)).all()
        assert trace.attrs["complete"]
        frames.append(trace.topk.frame())
    if coarse:
        return  # rounding to half precision happens at other places
    np.testing.assert_array_equal(frames[0]["index"], frames[1]["index"])
    np.testing.assert_allclose(frames[0]["shift"], frames[1]["shift"], rtol=1e-4, atol=1e-7)


def test_dropout_in_a_trainer_is_replayed(tmp_path: Path) -> None:
    plain = fit(make(dropout=0.5))
    callback = GradTrace(
        tmp_path / "a.zarr", TopK(20), engine="functional", per_sample_loss=mean_loss, ledger_every_n_steps=1
    )
    with pytest.warns(UserWarning, match="one backward pass per sample"):
        traced = fit(make(dropout=0.5), callback)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), traced.parameters(), strict=True))
    assert (open_trace(tmp_path / "a.zarr").steps["residual"] < 1e-5).all()


def test_other_draws_than_those_of_the_training_step_are_refused(tmp_path: Path) -> None:
    callback = GradTrace(tmp_path / "a.zarr", TopK(20), engine="functional", per_sample_loss=mean_loss)
    with (
        pytest.warns(UserWarning, match="one backward pass per sample"),
        pytest.raises(UnattributableError, match=r"The model draws random numbers \(`net\.1`\)"),
    ):
        fit(make(dropout=0.5, early_draw=True), callback)


@pytest.mark.parametrize(
    "arguments",
    [{"engine": "functional"}, {"per_sample_loss": mean_loss}, {"engine": "other"}],
    ids=["no loss", "no engine", "unknown"],
)
def test_engine_and_loss_must_go_together(arguments: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine"):
        GradTrace(tmp_path / "a.zarr", **arguments)

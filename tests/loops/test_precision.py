"""Half precision and loss scaling: the scale is undone, and skipped steps are marked."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_gradtrace import GradTrace, TopK, open_trace
from lightning_gradtrace.capture.check import check_sums
from lightning_gradtrace.capture.placement import UnattributableError
from tests.loops.models import WIDTH, Net, check_nothing_left, data, fit, run
from tests.loops.test_manual import Gan, Manual


def scaled(scale: float = 2.0**10) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3))


class Overflowing(Net):
    """The gradients of the second and the fifth batch are infinite."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.global_step in (1, 4) else loss


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_loss_scale_is_undone(accumulate: int, clip: float | None, tmp_path: Path) -> None:
    """Autocast to half precision rounds what layers add up: the bound is that of float16."""
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trace, _ = run(Net, tmp_path / "a.zarr", plugins=scaled, bound=5e-3, **options)
    assert (trace.steps["residual"] < 5e-3).all()
    assert (trace.steps["loss"] < 5).all()
    assert (trace.steps["grad_norm"] < 5).all()
    assert not trace.steps["skipped"].any()
    assert ((trace.steps["clip_factor"] < 1).all()) == (clip is not None)


def test_a_skipped_step_is_marked_and_moved_nothing(tmp_path: Path) -> None:
    trace, _ = run(Overflowing, tmp_path / "a.zarr", plugins=scaled, bound=5e-3)
    assert trace.steps.index.tolist() == list(range(8))
    assert np.flatnonzero(trace.steps["skipped"]).tolist() == [1, 4]
    frame = trace.topk.frame()
    assert (frame[frame["step"].isin([1, 4])]["shift"] == 0).all()
    assert len(trace.occurrences) == 28
    assert trace.steps["residual"].isna().tolist() == trace.steps["skipped"].tolist()


def test_the_sums_are_checked_at_the_first_step_that_is_not_skipped(tmp_path: Path) -> None:
    class First(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if self.global_step == 0 else loss

    pl.seed_everything(3, verbose=False)
    fit(First(), GradTrace(tmp_path / "a.zarr", TopK(3), ledger_every_n_steps=None), plugins=scaled())
    steps = open_trace(tmp_path / "a.zarr").steps
    assert steps["skipped"].tolist() == [True] + [False] * 7
    assert steps["sum_error"].notna().tolist() == [False, True] + [False] * 6


@pytest.mark.parametrize("kind", [Manual, Gan], ids=lambda k: k.__name__)
def test_manual_optimization_with_a_loss_scale(kind: type, tmp_path: Path) -> None:
    # What real and fake samples do to the discriminator cancels, its rounding does not.
    trace, _ = run(kind, tmp_path / "a.zarr", plugins=scaled, bound=5e-2)
    assert (trace.steps["residual"] < 2e-2).all()


def test_a_fused_optimizer_undoes_the_scale_itself(tmp_path: Path) -> None:
    class Fused(Overflowing):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.2, fused=True)

    trace, _ = run(Fused, tmp_path / "a.zarr", plugins=scaled, bound=5e-3)
    assert np.flatnonzero(trace.steps["skipped"]).tolist() == [1, 4]
    kept = trace.steps[~trace.steps["skipped"]]
    assert (kept["residual"] < 5e-3).all()
    assert (kept["grad_norm"] < 5).all()
    np.testing.assert_allclose(kept["clip_factor"], 1, rtol=1e-3)


def test_a_scaler_of_the_users_own_is_measured(tmp_path: Path) -> None:
    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(self.scaler.scale(loss))
            self.scaler.unscale_(optimizer)
            self.scaler.step(optimizer)
            self.scaler.update()

    trace, _ = run(Own, tmp_path / "a.zarr")
    assert (trace.steps["residual"] < 1e-5).all()


def test_weights_in_bfloat16(tmp_path: Path) -> None:
    """The rounding of the weights themselves is what the ledger misses."""
    weights = []
    traced = GradTrace(tmp_path / "a.zarr", TopK(5), ledger_every_n_steps=1, weights_every_n_steps=4)
    for callbacks in ([], [traced]):
        pl.seed_everything(3, verbose=False)
        model = Net()
        check_nothing_left(model, fit(model, *callbacks, precision="bf16-true"))
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*weights)
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.attrs["complete"]
    assert (trace.steps["sum_error"] < 2e-2).all()
    assert trace.weights("last.weight", 8).ravel().tolist() == model.last.weight.flatten().tolist()
    assert len(trace.occurrences) == 2 * len(data())


class Autocast(Net):
    """Casts by itself; the Trainer knows nothing of it."""

    def training_step(self, batch, batch_idx):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().training_step(batch, batch_idx)


class Casting(Net):
    """The first layer multiplies in bfloat16, and what comes after it does not."""

    def forward(self, x):
        first = nn.functional.linear(x.bfloat16(), self.first.weight.bfloat16(), self.first.bias.bfloat16())
        return self.last(first.float().tanh())


class ThereAndBack(Net):
    """The first layer multiplies in single precision, with a weight that has been rounded."""

    def forward(self, x):
        return self.last(nn.functional.linear(x, self.first.weight.half().float(), self.first.bias).tanh())


class Recurrent(Net):
    """A cell that multiplies in bfloat16 and returns single precision, as `torch.gru` does under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRUCell(WIDTH, 7)

    def training_step(self, batch, batch_idx):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.first(batch[0])
        return (self.last(hidden) - batch[1]).square().mean()


CASTS = {
    Autocast: {"first.weight", "first.bias", "last.weight", "last.bias"},
    Casting: {"first.weight", "first.bias"},
    ThereAndBack: {"first.weight"},
    Recurrent: {f"first.{kind}_{of}" for kind in ("weight", "bias") for of in ("ih", "hh")},
}


@pytest.mark.parametrize("kind", CASTS, ids=lambda kind: kind.__name__)
def test_half_precision_that_only_the_model_knows_of(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are judged by the precision in which the gradient of each parameter was computed."""
    found: set[str] = set()

    def noted(errors, gradients, half, *rest):
        found.update(half)
        check_sums(errors, gradients, half, *rest)

    monkeypatch.setattr("lightning_gradtrace.tracer.check_sums", noted)
    trace, _ = run(kind, tmp_path / "a.zarr", bound=2e-2)
    assert found == CASTS[kind]
    assert trace.steps["half_precision"].all() and trace.verify().ok
    assert 1e-5 < trace.steps["residual"].max() < 2e-2


def test_in_a_model_with_both_precisions_a_wrong_sum_in_single_precision_is_refused(tmp_path: Path) -> None:
    class Wrong(Casting):
        def __init__(self) -> None:
            super().__init__()
            self.last.weight.register_hook(lambda gradient: gradient * 1.01)

    pl.seed_everything(3, verbose=False)
    with pytest.raises(UnattributableError, match=r"of `last\.weight` \(relative error 9\.9e-03\) don't add up"):
        fit(Wrong(), GradTrace(tmp_path / "a.zarr", TopK(3)))


def test_half_precision_in_a_loss_per_sample(tmp_path: Path) -> None:
    def losses(module, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (module(batch[0]) - batch[1]).square().mean(1) / len(batch[0])

    class Deterministic(Autocast):
        def forward(self, x):
            return self.last(self.first(x).tanh())

    pl.seed_everything(3, verbose=False)
    options = {"engine": "functional", "per_sample_loss": losses, "ledger_every_n_steps": 1}
    fit(Deterministic(), GradTrace(tmp_path / "a.zarr", TopK(3), **options))
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.steps["half_precision"].all() and trace.verify().ok, str(trace.verify())
    assert trace.steps["sum_error"].max() > 1e-3


@pytest.mark.parametrize(("n", "step"), [(40, lambda w: w + 0.1 * w.tanh()), (300, torch.tanh)], ids=["shared", "long"])
def test_weights_that_are_derived_in_many_steps(n: int, step, tmp_path: Path) -> None:
    """Of which each reads the last one twice, or so many that one must not call the next."""

    class Derived(Net):
        def forward(self, x):
            weight = self.first.weight
            for _ in range(n):
                weight = step(weight)
            return self.last(nn.functional.linear(x, weight, self.first.bias).tanh())

    trace, _ = run(Derived, tmp_path / "a.zarr", bound=1e-4, max_epochs=1)
    assert not trace.steps["half_precision"].any()

"""Manual optimization: several backward passes and optimizers per batch, in any order."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradtrace import GradTrace, TopK, open_trace
from lightning_gradtrace.capture.placing.placement import UnattributableError
from tests.loops.models import WIDTH, Manual, Net, data, fit, run


class ZeroAfter(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(Net.training_step(self, batch, batch_idx))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


class Clipped(Manual):
    """Clipping happens before Lightning announces the step."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(Net.training_step(self, batch, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()


class TwoLosses(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        hidden = self.first(batch[0])
        self.manual_backward(self.last(hidden).square().mean(), retain_graph=True)
        self.manual_backward((self.last(hidden) - batch[1]).abs().mean())
        optimizer.step()
        optimizer.zero_grad()


class Accumulating(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(Net.training_step(self, batch, batch_idx) / 2)
        if batch_idx % 2 or batch_idx == 3:
            optimizer.step()
            optimizer.zero_grad()


class WithClosure(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = Net.training_step(self, batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class StepTwice(Manual):
    """Two forward passes, backward passes and steps of one optimizer in one training step."""

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            Manual.training_step(self, batch, batch_idx)


class Bare(Manual):
    """The optimizer itself, of whose steps Lightning does not know."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(Net.training_step(self, batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize(
    "kind",
    [Manual, ZeroAfter, Clipped, TwoLosses, Accumulating, WithClosure, StepTwice, Bare],
    ids=lambda k: k.__name__,
)
def test_every_step_is_one_row_and_its_shifts_are_the_real_change(kind: type, tmp_path: Path) -> None:
    trace, _ = run(kind, tmp_path / "a.zarr")
    per_epoch = {"StepTwice": 8, "Accumulating": 2}.get(kind.__name__, 4)
    assert trace.steps.index.tolist() == list(range(2 * per_epoch))
    assert (trace.steps["residual"] < 1e-5).all()
    assert len(trace.occurrences) == (56 if kind is StepTwice else 28)


class Gan(pl.LightningModule):
    """A generator, noise drawn in the training step, and a discriminator that sees real and fake samples."""

    def __init__(self, toggle: bool = True, late: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle, self.late = toggle, late
        self.generator = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, WIDTH))
        self.discriminator = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 1))

    def judge(self, x, real):
        return F.binary_cross_entropy_with_logits(self.discriminator(x), torch.full((len(x), 1), float(real)))

    def train_with(self, optimizer, *losses):
        if not self.late:
            optimizer.zero_grad()
        for loss in losses:
            self.manual_backward(loss())
        optimizer.step()
        if self.late:
            optimizer.zero_grad()

    def training_step(self, batch, batch_idx):
        real = batch[0]
        generator, discriminator = self.optimizers()
        noise = torch.randn(len(real), 3)
        if self.toggle:
            self.toggle_optimizer(generator)
        self.made = self.generator(noise)
        self.train_with(generator, lambda: self.judge(self.made, True))
        if self.toggle:
            self.untoggle_optimizer(generator)
            self.toggle_optimizer(discriminator)
        fake = self.generator(noise).detach()
        if self.late:  # what the generator's loss left in the discriminator
            discriminator.zero_grad()
        self.train_with(discriminator, lambda: self.judge(real, True), lambda: self.judge(fake, False))
        if self.toggle:
            self.untoggle_optimizer(discriminator)

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.generator.parameters(), lr=0.3),
            torch.optim.SGD(self.discriminator.parameters(), lr=0.2),
        ]


@pytest.mark.parametrize("toggle", [True, False], ids=["toggled", "not toggled"])
@pytest.mark.parametrize("late", [True, False], ids=["zeroed after", "zeroed before"])
def test_two_optimizers_never_take_each_others_shares(toggle: bool, late: bool, tmp_path: Path) -> None:
    trace, _ = run(lambda: Gan(toggle, late), tmp_path / "a.zarr")
    assert trace.steps.index.tolist() == list(range(16))
    assert trace.steps["optimizer"].tolist() == [0, 1] * 8
    assert len(trace.occurrences) == 2 * 28
    frame = trace.topk.frame()
    moved = frame[frame["shift"] != 0]
    owner = moved["param"].str.startswith("discriminator").astype(int)
    assert (owner == moved["step"] % 2).all()


def test_every_n_steps_counts_the_steps_of_each_optimizer(tmp_path: Path) -> None:
    fit(Gan(), GradTrace(tmp_path / "a.zarr", TopK(3), every_n_steps=3, inputs=None))
    assert open_trace(tmp_path / "a.zarr").steps.index.tolist() == [0, 1, 6, 7, 12, 13]


def test_gradients_that_nobody_zeroed_are_refused(tmp_path: Path) -> None:
    class Never(Manual):
        def training_step(self, batch, batch_idx):
            self.manual_backward(Net.training_step(self, batch, batch_idx))
            self.optimizers().step()

    with pytest.raises(UnattributableError, match=r"the gradients of `first.weight`.* were not zero when the step's"):
        fit(Never(), GradTrace(tmp_path / "a.zarr", TopK(3), params="*"))


@pytest.mark.filterwarnings("ignore:GradTrace has no rule for the optimizer `LBFGS`")
@pytest.mark.parametrize("manual", [False, True])
def test_an_optimizer_that_evaluates_its_closure_several_times_is_refused(manual: bool, tmp_path: Path) -> None:
    class Searching(WithClosure if manual else Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    with pytest.raises(
        ValueError, match="divide the steps of `LBFGS`: it evaluates the loss several times in one step"
    ):
        fit(Searching(), GradTrace(tmp_path / "a.zarr", TopK(3)))


def test_a_backward_pass_that_lightning_does_not_know_of_is_refused(tmp_path: Path) -> None:
    class Raw(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            Net.training_step(self, batch, batch_idx).backward()
            optimizer.step()

    with pytest.raises(ValueError, match=r"Call `self.manual_backward\(loss\)` instead of `loss.backward\(\)`"):
        fit(Raw(), GradTrace(tmp_path / "a.zarr", TopK(3)))


def test_gradients_taken_in_the_forward_pass_count_for_nothing(tmp_path: Path) -> None:
    """A saliency map, say: `torch.autograd.grad` leaves nothing in `.grad`."""

    class Looking(Manual):
        def training_step(self, batch, batch_idx):
            x = batch[0].clone().requires_grad_()
            torch.autograd.grad(self(x).sum(), x)
            Manual.training_step(self, batch, batch_idx)

    trace, _ = run(Looking, tmp_path / "a.zarr")
    assert (trace.steps["residual"] < 1e-5).all()


def test_as_many_samples_as_features_are_told_apart_without_disturbing_the_training(tmp_path: Path) -> None:
    """The probe runs the whole training step again: its optimizers must stand still and the model's tensors stay."""
    trace, _ = run(Gan, tmp_path / "a.zarr", loader=lambda: DataLoader(data(12), batch_size=6, shuffle=True))
    assert (trace.steps["residual"] < 1e-5).all()
    assert (trace.steps["sum_error"] < 1e-5).all()


def test_records_are_made_without_autocast_and_gradients(tmp_path: Path, monkeypatch) -> None:
    """A manual step is made inside the training step, where both are on."""
    seen, reduce = [], TopK.reduce

    def watched(*args: object) -> object:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return reduce(*args)

    monkeypatch.setattr(TopK, "reduce", watched)
    fit(Manual(), GradTrace(tmp_path / "a.zarr", TopK(5)), precision="bf16-mixed")
    assert seen and {*seen} == {(False, False)}

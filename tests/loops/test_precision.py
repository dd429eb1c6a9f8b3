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
from lightning_gradtrace.capture.accumulation import Accumulation
from lightning_gradtrace.capture.check import check_sums, sum_errors
from lightning_gradtrace.capture.engines.functional import FunctionalEngine
from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.placing.placement import UnattributableError
from lightning_gradtrace.capture.precision import HALF
from lightning_gradtrace.capture.shares import DenseShare, add_shares
from tests.cases import NoProbe
from tests.loops.models import WIDTH, Manual, Net, check_nothing_left, data, fit, run
from tests.loops.test_manual import Gan


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


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_hides_nothing_of_what_comes_after_it_in_the_batch(fused: bool, tmp_path: Path) -> None:
    class Two(Manual):
        def training_step(self, batch, batch_idx):
            for number, optimizer in enumerate(self.optimizers()):
                optimizer.zero_grad()
                loss = Net.training_step(self, batch, batch_idx)
                self.manual_backward(loss * float("inf") if number == 0 and batch_idx == 1 else loss)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.2, fused=fused) for part in (self.first, self.last)]

    trace, _ = run(Two, tmp_path / "a.zarr", plugins=scaled, bound=5e-3)
    assert np.flatnonzero(trace.steps["skipped"]).tolist() == [2, 10]
    assert (trace.steps["residual"].dropna() < 5e-3).all()


def test_a_loss_is_freed_of_the_scale_that_it_had(tmp_path: Path) -> None:
    """The step of one optimizer may change the scale before that of another, which uses the same backward pass."""

    class Two(Manual):
        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(Net.training_step(self, batch, batch_idx))
            for optimizer in optimizers:
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.2) for part in (self.first, self.last)]

    trace, _ = run(Two, tmp_path / "a.zarr", plugins=scaled, bound=5e-3)
    losses = trace.steps["loss"].to_numpy()
    np.testing.assert_array_equal(losses[::2], losses[1::2])


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


def test_gradients_kept_from_a_fused_optimizer_are_freed_of_the_scale(tmp_path: Path) -> None:
    """Nesterov's momentum may overwrite gradients, so they are copied before the step, scaled as they are then."""

    class Nesterov(Overflowing):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5, nesterov=True, fused=True)

    pl.seed_everything(3, verbose=False)
    fit(Nesterov(), GradTrace(tmp_path / "a.zarr", TopK(5), ledger_every_n_steps=1), plugins=scaled())
    kept = open_trace(tmp_path / "a.zarr").steps.query("~skipped")
    assert len(kept) == 6 and (kept["residual"] < 5e-3).all()
    np.testing.assert_allclose(kept["clip_factor"], 1, rtol=1e-3)


def test_gradients_that_were_unscaled_to_clip_them_have_their_own_norm(tmp_path: Path) -> None:
    """Lightning leaves the gradients of fused optimizers scaled, so that who clips them by hand unscales them."""

    class Clipped(Manual):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.2, fused=True)

        def change(self) -> None:
            self.trainer.precision_plugin.scaler.unscale_(self.optimizers(use_pl_optimizer=False))
            nn.utils.clip_grad_norm_(self.parameters(), 0.1)

    trace, _ = run(Clipped, tmp_path / "a.zarr", plugins=scaled, bound=5e-3)
    np.testing.assert_allclose(trace.steps["grad_norm"], 0.1, rtol=1e-3)
    assert (trace.steps["residual"] < 5e-3).all() and (trace.steps["clip_factor"] < 1).all()


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

    def noted(errors, gradients, precision, *rest):
        found.update(name for name, dtype in precision.items() if dtype in HALF)
        check_sums(errors, gradients, precision, *rest)

    monkeypatch.setattr("lightning_gradtrace.training.sums.check_sums", noted)
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


class Double(Net):
    """In double precision, and what is in single precision is so by the model's own doing."""

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def training_step(self, batch, batch_idx):
        return (self(batch[0].double()) - batch[1]).square().mean()

    def forward(self, x):
        return self.last(self.in_between(x).tanh())

    def in_between(self, x):
        return self.first(x)


class ModuleCast(Double):
    """A module that casts its weights for good when it is first called."""

    def in_between(self, x):
        return self.first.float()(x.float()).double()


class WeightCast(Double):
    """Weights that are cast in every forward pass."""

    def in_between(self, x):
        single = {name: p.float() for name, p in self.first.named_parameters()}
        return torch.func.functional_call(self.first, single, x.float()).double()


class WeightCastAndBack(Double):
    """A weight that is rounded."""

    def in_between(self, x):
        return nn.functional.linear(x, self.first.weight.float().double(), self.first.bias)


class SingleWeight(Double):
    """A weight in single precision that meets the batch in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first.weight.data = self.first.weight.data.float()

    def in_between(self, x):
        return nn.functional.linear(x, self.first.weight.double(), self.first.bias)


class CastCell(Double):
    """No closed form: the general rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRUCell(WIDTH, 7).double()

    def in_between(self, x):
        single = {name: p.float() for name, p in self.first.named_parameters()}
        return torch.func.functional_call(self.first, single, x.float()).double()


class SingleInput(Double):
    """Nothing but the input is rounded."""

    def in_between(self, x):
        return self.first((x.float() * 3).double())


SINGLE = {
    ModuleCast: {"first.weight", "first.bias"},
    WeightCast: {"first.weight", "first.bias"},
    WeightCastAndBack: {"first.weight"},
    SingleWeight: {"first.weight"},
    CastCell: {f"first.{kind}_{of}" for kind in ("weight", "bias") for of in ("ih", "hh")},
    SingleInput: set(),
    Double: set(),
}
"""Models in double precision, with the parameters whose gradients are computed in single precision."""


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], dict[str, float]]:
    """Which gradients pass single precision, and the largest errors of the sums, as a training finds them."""
    found: set[str] = set()
    largest: dict[str, float] = {}

    def note(errors, gradients, precision, *rest):
        found.update(name for name, dtype in precision.items() if dtype == torch.float32)
        largest.update({name: max(error, largest.get(name, 0.0)) for name, error in errors.items()})
        check_sums(errors, gradients, precision, *rest)

    monkeypatch.setattr("lightning_gradtrace.training.sums.check_sums", note)
    return found, largest


@pytest.mark.parametrize("kind", SINGLE, ids=lambda kind: kind.__name__)
def test_single_precision_inside_of_double_precision(kind: type, tmp_path: Path, noted) -> None:
    found, largest = noted
    trace, _ = run(kind, tmp_path / "a.zarr")
    assert found == SINGLE[kind]
    assert not trace.steps["half_precision"].any()
    for name, error in largest.items():
        assert error < (1e-5 if name in found else 1e-12), name
    if kind in (WeightCast, WeightCastAndBack, CastCell):
        assert max(largest.values()) > 1e-9  # which would be wrong in double precision, that of these parameters


@pytest.mark.filterwarnings("ignore:.*one backward pass per sample of the whole batch")
@pytest.mark.parametrize("kind", SINGLE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("engine", ["tape", "functional"])
def test_every_share_is_the_gradient_of_its_sample_where_precisions_meet(kind: type, engine: str) -> None:
    def losses(module, batch):
        return (module(batch[0]) - batch[1]).square().mean(1) / len(batch[0])

    torch.manual_seed(0)
    model = kind().requires_grad_()
    batch = tuple(t[:6].double() for t in data().tensors)
    model(batch[0])  # after this no module changes any more
    parameters = dict(model.named_parameters())
    made = TapeEngine() if engine == "tape" else FunctionalEngine(model, losses)
    recording = made.tape(parameters, batch, 6, 0)
    with recording:
        loss = losses(model, batch).sum()
    loss.backward()
    micro_batch = made.collect(recording, 6, NoProbe())
    wanted = per_sample_gradients(lambda i: losses(model, [t[i : i + 1] for t in batch]).sum() / 6, 6, parameters)
    gradients = {name: p.grad for name, p in parameters.items()}
    check_sums(sum_errors([micro_batch], gradients), gradients, micro_batch.precision)
    if engine == "tape":
        assert {name for name, dtype in micro_batch.precision.items() if dtype == torch.float32} == SINGLE[kind]
    for name, expected in wanted.items():
        error = torch.linalg.vector_norm(micro_batch.shares[name].dense() - expected)
        assert error <= (1e-6 if SINGLE[kind] else 1e-14) * torch.linalg.vector_norm(expected), name


@pytest.mark.parametrize(
    ("kind", "parameter", "error"),
    [(Double, "first.weight", 1e-6), (WeightCast, "last.weight", 1e-6), (WeightCast, "first.weight", 1e-2)],
)
def test_a_wrong_sum_is_refused_in_the_precision_of_its_parameter(kind, parameter, error, tmp_path: Path) -> None:
    class Wrong(kind):
        def __init__(self) -> None:
            super().__init__()
            self.get_parameter(parameter).register_hook(lambda gradient: gradient * (1 + error))

    pl.seed_everything(3, verbose=False)
    with pytest.raises(UnattributableError, match=rf"gradients of `{parameter}` \(relative error .*\) don't add up"):
        fit(Wrong(), GradTrace(tmp_path / "a.zarr", TopK(3)))


@pytest.mark.parametrize("kind", [Double, WeightCast], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("factor", [1.0, 1 + 1e-6, 1.01, 0.25])
def test_sums_of_a_loss_per_sample_are_as_close_as_its_precision(kind: type, factor: float, tmp_path: Path) -> None:
    def losses(module, batch):
        return factor * (module(batch[0].double()) - batch[1]).square().mean(1) / len(batch[0])

    pl.seed_everything(3, verbose=False)
    traced = GradTrace(tmp_path / "a.zarr", TopK(3), engine="functional", per_sample_loss=losses)
    if abs(factor - 1) > (1e-3 if kind is WeightCast else 1e-9):
        with pytest.raises(UnattributableError, match=rf"Your losses add up to {factor:.6g} times the gradient"):
            fit(kind(), traced)
    else:
        fit(kind(), traced)
        trace = open_trace(tmp_path / "a.zarr")
        assert trace.attrs["complete"] and not trace.steps["half_precision"].any()


def test_a_vanishing_gradient_is_measured_in_the_precision_in_which_it_was_summed() -> None:
    noise = torch.full((2,), torch.finfo(torch.float32).eps, dtype=torch.float64)
    shares = {"w": DenseShare(torch.zeros(1, 2, dtype=torch.float64))}
    single = MicroBatch(1, shares, precision={"w": torch.float32})
    check_sums(sum_errors([single], {"w": noise}, overall=1.0), {"w": noise}, single.precision)
    double = MicroBatch(1, shares, precision={"w": torch.float64})
    with pytest.raises(UnattributableError, match="`w`"):
        check_sums(sum_errors([double], {"w": noise}, overall=1.0), {"w": noise}, double.precision)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_shares_that_are_no_numbers_are_refused_where_the_gradient_is_one(wrong: float) -> None:
    shares = MicroBatch(2, {"w": DenseShare(torch.tensor([[1.0, wrong], [1.0, 1.0]]))})
    with pytest.raises(UnattributableError, match="`w`"):
        check_sums(sum_errors([shares], {"w": torch.tensor([2.0, 2.0])}, overall=3.0), {"w": torch.zeros(2)})
    overflown = {"w": torch.tensor([2.0, wrong])}
    check_sums(sum_errors([shares], overflown, overall=torch.inf), overflown)


@pytest.mark.parametrize("across", ["uses", "samples"])
def test_what_cancels_in_half_precision_is_compared_with_its_terms(across: str) -> None:
    """The last bias of a reward model: the better answer moves it up, the worse one down, each rounded by itself."""
    up, down = torch.full((2, 3), 0.5), torch.full((2, 3), -0.502)
    parts = [up, down] if across == "uses" else [torch.stack([up[0], down[0]])]
    shares = {"b": add_shares([DenseShare(part) for part in parts])}
    left = {"b": torch.full((3,), 0.006)}
    half = MicroBatch(2, shares, precision={"b": torch.bfloat16})
    check_sums(sum_errors([half], left), left, half.precision)
    wrong = {"b": torch.full((3,), 0.1)}
    with pytest.raises(UnattributableError, match="`b`"):
        check_sums(sum_errors([half], wrong), wrong, half.precision)
    single = MicroBatch(2, shares, precision={"b": torch.float32})
    with pytest.raises(UnattributableError, match="`b`"):
        check_sums(sum_errors([single], left), left, single.precision)


@pytest.mark.parametrize("overall", [float("nan"), float("inf")])
def test_beside_gradients_that_are_not_finite_nothing_is_compared(overall: float) -> None:
    """Nobody knows which gradients are nothing but rounding then, as that of the bias of keys."""
    micro_batch = MicroBatch(1, {"k": DenseShare(torch.full((1, 2), 1e-9))})
    noise = {"k": torch.full((2,), -1e-9)}
    errors = sum_errors([micro_batch], noise, overall)
    assert np.isnan(errors["k"])
    check_sums(errors, noise)


@pytest.mark.parametrize("order", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_two_passes_through_one_batch_pass_the_coarser_precision(order) -> None:
    passes = Accumulation()
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    for dtype in order:
        passes.begin_pass({"w": w})
        w.sum().backward()
        one = MicroBatch(1, {"w": DenseShare(torch.ones(1, 2, dtype=torch.float64))}, precision={"w": dtype})
        passes.end_pass(0, one, torch.ones(()), {"w": w}, [0])
    (micro_batch,), _ = passes.of(0, ["w"])
    assert micro_batch.precision == {"w": torch.float32}


def test_shares_that_run_the_model_when_they_are_read_tell_of_their_precision() -> None:
    """A later batch of a loss per sample, whose shares are too large to be kept: no pass has run before its sum."""

    def losses(module, batch):
        return (module(batch[0]) - batch[1]).square().mean(1) / len(batch[0])

    torch.manual_seed(0)
    model = WeightCast()
    batch = tuple(t[:6].double() for t in data().tensors)
    engine = FunctionalEngine(model.eval(), losses, workspace=20)
    for n_told in (len(list(model.parameters())), 0):
        model.zero_grad()
        with engine.tape(dict(model.named_parameters()), batch, 6, 0) as moment:
            loss = losses(model, batch).sum()
        loss.backward()
        micro_batch = engine.collect(moment, 6, NoProbe())
        assert len(micro_batch.precision) == n_told
        gradients = {name: p.grad for name, p in model.named_parameters()}
        noise = {"first.weight": gradients["first.weight"] + 1e-6}  # as if all else were that much larger
        errors = sum_errors([micro_batch], noise, overall=1e6)
        assert 1e-9 < errors["first.weight"] < 1e-8  # of a thousandth of all gradients, not of a ten-thousandth
        assert set(micro_batch.precision.values()) == {torch.float32}
        check_sums(sum_errors([micro_batch], gradients), gradients, micro_batch.precision)

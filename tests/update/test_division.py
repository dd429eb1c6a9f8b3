"""What a division says of a step: residuals are honest, rules go to the right optimizers, odd steps are divided too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_gradtrace.capture.shares import DenseShare, OuterShare, RowShare
from lightning_gradtrace.update import UpdateRule, rule_for
from lightning_gradtrace.update._base import first_momentum
from lightning_gradtrace.update._registry import _subclasses
from lightning_gradtrace.update.division import StepDivision, explain, gradient_norm
from lightning_gradtrace.update.ledger import Balance, Entry, balance
from lightning_gradtrace.update.muon import newton_schulz_matrix
from lightning_gradtrace.update.preconditioned import precondition
from tests.update.cases import SETTINGS, clip, ledger, parameters_like, record_gradients


def take_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[StepDivision, dict]:
    """Divide one step of an optimizer whose gradients are there; returns the gradients before clipping too."""
    named = dict(model.named_parameters())
    division = StepDivision.begin(optimizer, explain(optimizer), named, ledger=True)
    gradients = {name: g.clone() for name, g in division.gradients.items()}
    optimizer.step()
    division.complete()
    return division, gradients


def residual(division: StepDivision, gradients: dict[str, Tensor]) -> float:
    def total(name: str) -> Tensor:
        return division.share(name, DenseShare(gradients[name][None])).total() * division.scale(name)

    return division.balance(total).residual


@pytest.mark.parametrize("setting", [{}, {"momentum": 0.9}], ids=str)
def test_the_ledger_notices_a_wrong_factor(setting: dict) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **setting)
    model(torch.randn(5, 4)).sum().backward()
    division, gradients = take_step(optimizer, model)
    assert division.balance(lambda name: gradients[name] * -0.09).residual == pytest.approx(0.1, rel=1e-4)


def test_the_ledger_of_a_step_that_did_not_ask_for_it_is_empty() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, 4)).sum().backward()
    division = StepDivision.begin(optimizer, explain(optimizer), dict(model.named_parameters()), ledger=False)
    optimizer.step()
    division.complete()
    outcome = division.balance(lambda name: pytest.fail("a total was formed"))
    assert outcome.residual != outcome.residual
    assert division.scale("weight") == -0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reading_the_ledger_leaves_the_weights_alone(dtype: torch.dtype) -> None:
    before, after, shifts = torch.ones(3, dtype=dtype), torch.full((3,), 2.0, dtype=dtype), torch.ones(3, dtype=dtype)
    outcome = balance([Entry(before, after, shifts)])
    assert outcome == Balance(0.0, pytest.approx(torch.finfo(dtype).eps, rel=1e-6))
    assert before.tolist() == [1, 1, 1] and after.tolist() == [2, 2, 2] and shifts.tolist() == [1, 1, 1]


@pytest.mark.parametrize("clipping", [None, "norm", "value"])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_a_learning_rate_of_zero_closes_the_ledger(cls: type, clipping: str | None) -> None:
    """The first step of a warm-up moves nothing; the memory is filled all the same and carries over into the next."""
    steps = record_gradients(torch.float64, False, 1, 4)
    parameters = parameters_like(steps[0])
    optimizer = cls(
        parameters.values(), lr=0.0, weight_decay=0.1, **{"momentum": 0.9} if cls is torch.optim.SGD else {}
    )
    first = ledger(optimizer, parameters, steps[:1], clipping)
    optimizer.param_groups[0]["lr"] = 0.1
    rest = ledger(optimizer, parameters, steps[1:], clipping)
    assert first[0].residual == 0.0
    assert max(outcome.residual for outcome in rest) < 1e-12


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam])
def test_an_optimizer_state_from_a_checkpoint_is_carried_on(cls: type) -> None:
    steps = record_gradients(torch.float64, False, 1, 6)
    parameters = parameters_like(steps[0])
    options = {"momentum": 0.9} if cls in (torch.optim.SGD, torch.optim.RMSprop) else {}
    optimizer = cls(parameters.values(), lr=0.1, **options)
    ledger(optimizer, parameters, steps[:3])
    fresh = cls(parameters.values(), lr=0.5, **options)
    fresh.load_state_dict(optimizer.state_dict())
    assert max(outcome.residual for outcome in ledger(fresh, parameters, steps[3:])) < 1e-12


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adagrad])
def test_hyperparameters_may_be_tensors(cls: type) -> None:
    steps = record_gradients(torch.float64, False, 1, 3)
    parameters = parameters_like(steps[0])
    optimizer = cls(parameters.values(), lr=torch.tensor(0.1, dtype=torch.float64), foreach=False)
    assert max(outcome.residual for outcome in ledger(optimizer, parameters, steps)) < 1e-12


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_a_differentiable_optimizer_is_divided(cls: type) -> None:
    steps = record_gradients(torch.float64, False, 1, 3)
    leaves = parameters_like(steps[0])
    parameters = {name: p.detach().clone().requires_grad_() * 1.0 for name, p in leaves.items()}
    for p in parameters.values():
        p.retain_grad()
    optimizer = cls([torch.zeros(1, requires_grad=True)], lr=0.1, differentiable=True)
    optimizer.param_groups[0]["params"] = list(parameters.values())  # what is trained through an inner loop is no leaf
    # Adam's bias corrections are then tensors of the default dtype, float32.
    assert max(outcome.residual for outcome in ledger(optimizer, parameters, steps)) < 1e-6


def test_parameters_without_gradient_and_of_no_group_do_not_move() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].requires_grad_(False)
    optimizer = torch.optim.AdamW([*model[0].parameters(), *model[1].parameters()], lr=0.1, weight_decay=0.1)
    model(torch.randn(5, 4)).sum().backward()
    division, gradients = take_step(optimizer, model)
    assert set(gradients) == {"0.weight", "0.bias"}
    assert division.scale("1.weight") is None and division.scale("2.weight") is None
    assert residual(division, gradients) < 1e-5


def test_complex_parameters_are_refused_by_name() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.abs().sum().backward()
    with pytest.raises(ValueError, match=r"steps of real parameters, and `w` is torch\.complex64\. Leave it out"):
        StepDivision.begin(optimizer, explain(optimizer), {"w": weight}, ledger=True)


# --- which rule explains which optimizer ------------------------------------------------------------------------------


class Custom(torch.optim.Optimizer):
    """Gradient descent that also pulls towards zero; a closed book to the package."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad + 0.5 * p, alpha=-group["lr"])


def test_an_optimizer_without_a_rule_is_warned_about_and_its_residual_is_honest() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = Custom(model.parameters(), lr=0.1)
    model(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match=r"no rule for the optimizer `Custom`: shifts are taken as -lr \* clipped"):
        division, gradients = take_step(optimizer, model)
    missed = torch.cat([0.05 * w.flatten() for w in before.values()]).norm()
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in model.named_parameters()]).norm()
    assert residual(division, gradients) == pytest.approx(float(missed / moved))


@pytest.mark.parametrize(
    ("group", "momentum"),
    [({"betas": (0.8, 0.9)}, 0.8), ({"momentum": torch.tensor(0.5)}, 0.5), ({}, 0.0), ({"betas": None}, 0.0)],
    ids=str,
)
def test_momentum_is_read_off_any_group(group: dict, momentum: float) -> None:
    assert first_momentum(group) == momentum


def test_a_momentum_that_is_no_number_is_not_known() -> None:
    assert math.isnan(first_momentum({"momentum": "heavy"}))
    assert math.isnan(first_momentum({"betas": ["a", "b"]}))


def test_an_optimizer_that_evaluates_the_loss_several_times_is_refused() -> None:
    with pytest.raises(ValueError, match="can't divide the steps of `LBFGS`: it evaluates the loss several times"):
        explain(torch.optim.LBFGS(nn.Linear(2, 2).parameters()))


class Renamed(torch.optim.AdamW):
    """Another default, a method of its own, a logger in `state_dict`: the steps stay AdamW's."""

    note = "mine"

    def __init__(self, parameters, lr: float = 0.1) -> None:
        super().__init__(parameters, lr=lr, weight_decay=0.3)

    def state_dict(self):
        return super().state_dict()

    def warm_up(self) -> None:
        self.param_groups[0]["lr"] *= 2


class OtherStep(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.9)


class OtherState(torch.optim.Adam):
    def _init_group(self, *arguments):
        return super()._init_group(*arguments)


class SignMixin:
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad.sign_()
        return super().step(closure)


class Mixed(SignMixin, torch.optim.SGD):
    pass


class OfAnotherStep(OtherStep):
    pass


@pytest.mark.parametrize("cls", [OtherStep, OtherState, Mixed, OfAnotherStep])
def test_a_subclass_with_another_step_has_no_rule(cls: type) -> None:
    for _ in range(2):  # torch wraps `step` when the first instance of a class is made
        assert rule_for(cls(nn.Linear(2, 2).parameters(), lr=0.1)) is None


def test_a_subclass_with_its_parents_step_has_its_parents_rule() -> None:
    class First(torch.optim.Adadelta):
        """The first instance of any Adadelta in this process may be one of these."""

    assert type(rule_for(First(nn.Linear(2, 2).parameters()))).__name__ == "AdadeltaRule"
    model = nn.Linear(4, 3).double()
    optimizer = Renamed(model.parameters())
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # wraps the step of the instance
    model(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    assert type(explain(optimizer)).__name__ == "AdamRule"
    assert residual(*take_step(optimizer, model)) < 1e-12


def test_every_optimizer_with_a_rule_is_tested() -> None:
    families = [c for c in _subclasses(UpdateRule) if c.__module__.startswith("lightning_gradtrace.")]
    ruled = {optimizer for family in families for optimizer in family.optimizers}
    assert ruled - {cls for cls, _ in SETTINGS} == {torch.optim.Muon, torch.optim.SparseAdam}  # tested on this page


def test_every_optimizer_of_torch_has_a_rule_or_is_refused() -> None:
    ruled = {cls for family in _subclasses(UpdateRule) for cls in family.optimizers}
    exported = [
        getattr(torch.optim, name) for name in torch.optim.__all__ if isinstance(getattr(torch.optim, name), type)
    ]
    optimizers = {cls for cls in exported if issubclass(cls, torch.optim.Optimizer)} - {torch.optim.Optimizer}
    assert optimizers - ruled == {torch.optim.LBFGS}


# --- steps that mix entries, or touch only some -----------------------------------------------------------------------


def matrices(n: int, dtype: torch.dtype, shape: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(n)]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_the_matrix_of_newton_schulz_is_its_whole_effect(shape: tuple[int, int]) -> None:
    """In float64 the iteration and the matrix agree to rounding: what Muon's residual shows is bfloat16."""
    torch.manual_seed(0)
    a, b, c = 3.4445, -4.7750, 2.0315
    updated = torch.randn(shape, dtype=torch.float64)
    x = updated.T if shape[0] > shape[1] else updated
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    matrix = newton_schulz_matrix(updated, (a, b, c), 5, 1e-7, torch.float64)
    found = updated @ matrix.T if shape[0] > shape[1] else matrix @ updated
    torch.testing.assert_close(found, x.T if shape[0] > shape[1] else x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("how", [None, "norm", "value"])
@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}], ids=str)
def test_muons_shares_carry_and_decay_add_up_to_its_rounding(options: dict, how: str | None, shape: tuple) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    optimizer = torch.optim.Muon([weight], lr=0.1, **options)
    with pytest.warns(
        UserWarning, match="step of `Muon` is not linear in the samples.*expect a ledger `residual` of 1e-2"
    ):
        rule = explain(optimizer)
    for _ in range(5):
        share = OuterShare(torch.randn(8, 3, shape[0]), torch.randn(8, 3, shape[1]))
        weight.grad = share.total()
        division = StepDivision.begin(optimizer, rule, {"w": weight}, ledger=True)
        clip(how)([weight])
        optimizer.step()
        division.complete()
        shares = division.share("w", share)
        assert isinstance(shares, OuterShare) == (how != "value")
        total = shares.total() * division.scale("w")
        torch.testing.assert_close(shares.dense().sum(0) * division.scale("w"), total, rtol=1e-4, atol=1e-6)
        outcome = division.balance(lambda name, total=total: total)
        assert outcome.residual < 0.1


def test_muons_residual_shows_what_it_makes_of_its_own_rounding() -> None:
    """Of a gradient of rank one it lifts rounding errors to singular values of a size with the real one."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 6))
    optimizer = torch.optim.Muon([weight], lr=0.1, momentum=0.0)
    weight.grad = torch.outer(torch.randn(6), torch.randn(6))
    with pytest.warns(UserWarning, match="`Muon`"):
        division = StepDivision.begin(optimizer, explain(optimizer), {"w": weight}, ledger=True)
    share = DenseShare(weight.grad.clone()[None])
    optimizer.step()
    division.complete()
    residual = division.balance(lambda name: division.share("w", share).total() * division.scale("w")).residual
    assert 0.05 < residual < 1.5


def test_a_preconditioned_share_is_the_product_of_matrices() -> None:
    torch.manual_seed(0)
    left, right, factor = torch.randn(5, 5).double(), torch.randn(4, 4).double(), torch.rand(5, 4).double()
    shares = [
        OuterShare(torch.randn(3, 2, 5).double(), torch.randn(3, 2, 4).double()),
        DenseShare(torch.randn(3, 5, 4).double()),
        RowShare(torch.randint(5, (3, 2)), torch.randn(3, 2, 4).double(), 5),
    ]
    for share in shares:
        for one in (0.5, factor):
            expected = left @ (share.dense() * one) @ right
            found = precondition(share, one, left, right)
            assert found.n_samples == 3 and found.shape == (5, 4)
            torch.testing.assert_close(found.dense(), expected)
            torch.testing.assert_close(found.dense(slice(1, 2)), expected[1:2])
            torch.testing.assert_close(found.total(), expected.sum(0))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, of Adagrad's step
@pytest.mark.parametrize("cls", [torch.optim.SparseAdam, torch.optim.Adagrad, torch.optim.SGD])
def test_sparse_gradients_of_an_embedding_are_divided(cls: type) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(9, 3, sparse=True).double()
    optimizer = cls(table.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (table(torch.randint(9, (4, 2))) ** 2).sum().backward()
        division, gradients = take_step(optimizer, table)
        assert residual(division, gradients) < 1e-12
        assert not gradients["weight"].is_sparse


def test_the_gradient_norm_is_that_of_clipping() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, 4)).sum().backward()
    norm = gradient_norm(optimizer)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)), rel=1e-6)

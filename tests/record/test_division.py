"""Division keeps the inner products that the weights themselves and the shifts of other records lead to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gradtrace import Dense, Division, GradTrace, TopK, open_trace
from lightning_gradtrace.analysis import divided, division
from lightning_gradtrace.ranks.beginning import check_strategy
from lightning_gradtrace.record.division import PARTS
from lightning_gradtrace.store import Trace
from tests.record.steps import make_infos, make_step, record_steps
from tests.test_callback import Model, fit

PARAM = "encoder.layers.0.linear1.weight"
RATE, DECAY = 0.02, 0.3


class Decaying(Model):
    """AdamW with a decay that can be seen, in float64."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=RATE, betas=(0.8, 0.9), weight_decay=DECAY)


def record(path: Path, *records, **options) -> Trace:
    torch.manual_seed(3)
    settings = {"precision": "64-true", "gradient_clip_val": None, "max_epochs": 1}
    fit(Decaying(), GradTrace(path, list(records), params="*", weights_every_n_steps=1, **options), **settings)
    return open_trace(path)


def parts_by_hand(trace: Trace, name: str) -> np.ndarray:
    """Weights, shifts, carry, decay of every step, shape (step, 4, *shape): carry is what the others leave."""
    weights = np.stack([trace.weights(name, int(step)) for step in trace.weight_steps])
    step, shifts = trace.occurrences["step"].to_numpy(), np.asarray(trace.dense[name])
    total = np.stack([shifts[step == number].sum(0) for number in trace.steps.index])
    decay = -RATE * DECAY * weights[:-1]
    return np.stack([weights[:-1], total, np.diff(weights, axis=0) - total - decay, decay], 1)


def test_inner_products_are_those_of_the_parts(tmp_path: Path) -> None:
    basis = torch.linalg.qr(torch.randn(Model().get_parameter(PARAM).shape[0], 5)).Q.T
    trace = record(tmp_path / "a.zarr", Dense(), Division(bases={PARAM: basis}))
    assert trace.verify().ok
    found = np.asarray(trace.array("division/gram"))
    assert found.shape == (trace.n_steps, len(trace.params), 5, 5)
    for column, name in enumerate(trace.params["param"]):
        flat = parts_by_hand(trace, name).reshape(trace.n_steps, 4, -1)
        np.testing.assert_allclose(found[:, column, :4, :4], flat @ flat.transpose(0, 2, 1), rtol=1e-6, atol=1e-12)
    assert np.abs(found[:, :, 4]).max() < 1e-9, "nothing is left over"
    turned = np.einsum("jr,tprc->tjpc", basis.numpy(), parts_by_hand(trace, PARAM))
    along = np.asarray(trace.array(f"division/along/{PARAM}/gram"))
    np.testing.assert_allclose(along[:, :, :4, :4], turned @ turned.transpose(0, 1, 3, 2), rtol=1e-5, atol=1e-12)


def test_products_add_up_to_the_change_and_growth_to_that_of_the_norm(tmp_path: Path) -> None:
    trace = record(tmp_path / "a.zarr", TopK(5), Division(bases={PARAM: np.eye(Model().get_parameter(PARAM).shape[0])}))
    table = division(trace)
    for name in trace.params["param"]:
        weights = np.stack([trace.weights(name, int(step)) for step in trace.weight_steps]).reshape(-1, 1)
        weights = weights.reshape(len(trace.weight_steps), -1)
        mine = table[table["param"] == name].groupby("step")[["product", "growth"]].sum()
        np.testing.assert_allclose(mine["product"], (np.diff(weights, axis=0) ** 2).sum(1), rtol=1e-8)
        np.testing.assert_allclose(mine["growth"], np.diff((weights**2).sum(1)), rtol=1e-6, atol=1e-12)
    whole = divided(table[table["param"] == PARAM]).set_index("part")
    assert list(whole.index) == list(PARTS[1:])
    assert whole["share"].sum() == pytest.approx(1)
    assert whole.loc["decay", "growth"] < 0
    rows = divided(division(trace, components_of=PARAM)).set_index("part")
    np.testing.assert_allclose(rows, whole, rtol=1e-8, atol=1e-12)
    assert set(division(trace, steps=[1])["step"]) == {1}


def test_recording_it_changes_no_weight_and_follows_its_own_schedule(tmp_path: Path) -> None:
    often = record(tmp_path / "a.zarr", TopK(5), Division(schedule=2), ledger_every_n_steps=3)
    never = record(tmp_path / "b.zarr", TopK(5), ledger_every_n_steps=None)
    last = int(never.weight_steps[-1])
    assert all(np.array_equal(often.weights(n, last), never.weights(n, last)) for n in often.params["param"])
    assert list(division(often)["step"].unique()) == [step for step in often.steps.index if step % 2 == 0]
    assert often.steps["residual"].notna().tolist() == [s % 2 == 0 or s % 3 == 0 for s in often.steps.index]
    assert never.steps["residual"].isna().all()


def test_the_recorded_quantity_makes_no_difference(tmp_path: Path) -> None:
    shifts = record(tmp_path / "a.zarr", Division())
    gradients = record(tmp_path / "b.zarr", Division(), quantity="gradient")
    np.testing.assert_array_equal(shifts.array("division/gram"), gradients.array("division/gram"))


def test_what_a_step_did_not_move_is_nan_and_left_out_of_the_table(tmp_path: Path) -> None:
    trace = record_steps(tmp_path / "a.zarr", [Division()], [make_step(0, [2], [3])])  # steps without a ledger
    assert np.isnan(trace.array("division/gram")).all()
    assert len(division(trace)) == 0


def test_a_basis_has_to_fit() -> None:
    with pytest.raises(ValueError, match=r"basis for `outer` has shape \(3, 9\), and the parameter has shape \(12"):
        Division(bases={"outer": np.ones((3, 9))}).arrays(make_infos())
    with pytest.raises(ValueError, match="and the parameter is not among outer, one row"):
        Division(bases={"other": np.ones((3, 9))}).arrays(make_infos())
    with pytest.raises(ValueError, match=r"basis for `w` has shape \(9,\); expected a matrix"):
        Division(bases={"w": np.ones(9)})
    assert Division(bases={"w": np.ones((3, 9))}).describe()["arguments"] == {"bases": {"w": [3, 9]}}


def test_several_processes_are_refused() -> None:
    class DDPStrategy:
        pass

    check_strategy(DDPStrategy(), 2, [TopK(3)])
    check_strategy(DDPStrategy(), 1, [TopK(3), Division()])
    with pytest.raises(ValueError, match=r"`Division\(\)` divides the whole change.*of 2 processes.*`devices=1`"):
        check_strategy(DDPStrategy(), 2, [TopK(3), Division()])


def test_traces_without_it_say_what_to_record(tmp_path: Path) -> None:
    trace = record(tmp_path / "a.zarr", TopK(5))
    with pytest.raises(ValueError, match=r"the trace holds none; record with `GradTrace\(..., record=\[..., Division"):
        division(trace)
    other = record(tmp_path / "b.zarr", Division())
    with pytest.raises(ValueError, match=r"no basis for `encoder.*record with `Division\(bases=\{'encoder"):
        division(other, components_of=PARAM)
    with pytest.raises(ValueError, match=r"lacks the columns \['growth', 'phase', 'product'\]"):
        divided(division(other)[["part"]], by="phase")

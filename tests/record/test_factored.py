"""Factored rebuilds every shift exactly, from shares of every form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_gradtrace.capture.shares import OuterShare, RowShare
from lightning_gradtrace.record import Factored, ParameterInfo, ParameterShifts, StepShifts
from tests.record.steps import dense_shifts, make_step, record_steps


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(["auto", "factors"]),
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=2, max_size=4),
    gains=st.lists(st.booleans(), min_size=4, max_size=4),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_every_shift_is_rebuilt(tmp_path_factory, form, lengths, gains, dtype) -> None:
    """Sequences of changing length, scales that are a number at one step and a tensor at the next."""
    steps = [make_step(i, [n, 2], [length, length + 1], gains[i], dtype) for i, (length, n) in enumerate(lengths)]
    trace = record_steps(tmp_path_factory.mktemp("trace") / "a.zarr", [Factored(form)], steps)
    report = trace.verify()
    assert report.ok, str(report)
    for name, expected in dense_shifts(steps).items():
        found = trace.factored[name].shifts(np.arange(trace.n_occurrences))
        assert found.shape == expected.shape
        tolerance = 1e-5 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * max(1, np.abs(expected).max()))
        aims = np.random.default_rng(0).normal(size=(2, *expected.shape[1:]))
        inner = np.tensordot(expected, aims, [range(1, expected.ndim), range(1, expected.ndim)])
        found = trace.factored[name].inner(np.arange(trace.n_occurrences), aims)
        np.testing.assert_allclose(found, inner, rtol=tolerance, atol=30 * tolerance * max(1, np.abs(inner).max()))


def test_positions_add_up_to_the_shift(tmp_path: Path) -> None:
    steps = [make_step(i, [2, 1], [3, 5], bool(i)) for i in range(2)]
    trace = record_steps(tmp_path / "a.zarr", [Factored("factors")], steps)
    for name in ("outer", "embedding", "tied", "heads"):
        for occurrence in range(trace.n_occurrences):
            parts = trace.factored[name].by_position(occurrence)
            length = (3, 3, 5)[occurrence % 3]
            assert len(parts) == (2 * length + 2 if name == "tied" else length)
            np.testing.assert_allclose(parts.sum(0), trace.factored[name].shifts(occurrence), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"`bias` by occurrence 1 was kept written out.*Factored\(form='factors'\)"):
        trace.factored["bias"].by_position(1)


def test_one_position_is_the_outer_product_of_its_factors(tmp_path: Path) -> None:
    step = make_step(1, [2], [3])
    trace = record_steps(tmp_path / "a.zarr", [Factored("factors")], [step])
    share = step.parameters[0].shares[0]
    assert isinstance(share, OuterShare)
    expected = torch.outer(share.left[1, 2], share.right[1, 2]) * step.parameters[0].scale
    np.testing.assert_allclose(trace.factored["outer"].by_position(1)[2], expected, rtol=1e-5)


def test_the_smaller_form_is_kept(tmp_path: Path) -> None:
    """Of a (12, 9) matrix factors of 5 positions are smaller than the shifts, of 6 they aren't."""
    trace = record_steps(tmp_path / "a.zarr", [Factored()], [make_step(0, [2, 2], [5, 6])])
    assert trace.array("factored/outer/occurrence")[:].tolist() == [0, 1]
    assert trace.array("factored_dense/outer/occurrence")[:].tolist() == [2, 3]
    assert trace.array("factored/outer/input").shape == (2, 5, 9)
    gains = record_steps(tmp_path / "b.zarr", [Factored()], [make_step(0, [2, 2], [5, 6], gains=True)])
    assert "factored_gain" not in gains.group  # the tensor of the scale would outweigh what the factors save


def test_a_gain_is_kept_once_per_step(tmp_path: Path) -> None:
    trace = record_steps(
        tmp_path / "a.zarr", [Factored()], [make_step(i, [9, 9], [2, 2], gains=True) for i in range(3)]
    )
    assert trace.array("factored_gain/outer/gain").shape == (3, 12, 9)
    assert trace.array("factored_gain/outer/step")[:].tolist() == [0, 1, 2]


def test_factors_in_half_precision_lose_nothing(tmp_path: Path) -> None:
    info = ParameterInfo("w", (8, 9), 0)
    for kind in (torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        shares = [OuterShare(torch.randn(4, 2, 8).to(kind), torch.randn(4, 2, 9).to(kind))]
        step = StepShifts([4], [ParameterShifts(info, -0.1, shares)])
        trace = record_steps(tmp_path / f"{kind}.zarr", [Factored()], [step])
        np.testing.assert_allclose(
            trace.factored["w"].shifts(range(4)), step.parameters[0].shifts(0).numpy(), rtol=1e-6, atol=1e-7
        )


def test_longer_sequences_leave_earlier_rows_as_they_were(tmp_path: Path) -> None:
    """The axis of positions grows by whole chunks; short rows have none there, and that is no damage."""
    steps = [make_step(number, [3], [length]) for number, length in enumerate((2, 40, 3))]
    trace = record_steps(tmp_path / "a.zarr", [Factored("factors")], steps, commit_bytes=1, commit_share=1)
    assert trace.verify().ok, str(trace.verify())
    assert trace.array("factored/outer/input").shape == (9, 40, 9)
    assert trace.array("factored/outer/length")[:].tolist() == [2] * 3 + [40] * 3 + [3] * 3
    assert not np.asarray(trace.array("factored/outer/input")[0, 2:]).any()
    (tmp_path / "a.zarr" / "factored" / "outer" / "input" / "c.0.0.0").unlink()
    assert "`factored/outer/input` chunk 0/0/0 (occurrence 0 to 8, steps 0 to 2) is missing" in str(trace.verify())


def test_precision_that_grows_is_refused(tmp_path: Path) -> None:
    steps = [make_step(0, [2], [3]), make_step(1, [2], [3], dtype="float64")]
    with pytest.raises(ValueError, match=r"was float32 at the first recorded step and is float64 now"):
        record_steps(tmp_path / "a.zarr", [Factored()], steps)


def test_an_occurrence_of_another_step_is_named(tmp_path: Path) -> None:
    steps = [make_step(number, [2], [3]) for number in range(3)]
    trace = record_steps(tmp_path / "a.zarr", [Factored(schedule=2)], steps)
    assert trace.factored["outer"].occurrence.tolist() == [0, 1, 4, 5]
    assert not trace.factored["sometimes"].shifts(4).any()  # the loss did not reach it
    with pytest.raises(KeyError, match="occurrence 2 is not in the Factored record, which holds 2 steps"):
        trace.factored["outer"].shifts(2)
    with pytest.raises(KeyError, match="occurrence 99 is not in the Factored record"):
        trace.factored["outer"].shifts(99)


def test_rows_are_kept_as_numbers_and_values(tmp_path: Path) -> None:
    share = RowShare(torch.tensor([[1, 1], [0, 2]]), torch.arange(16.0).reshape(2, 2, 4), 30)
    step = StepShifts([2], [ParameterShifts(ParameterInfo("e", (30, 4), 0), 2.0, [share])])
    trace = record_steps(tmp_path / "a.zarr", [Factored()], [step])
    assert trace.array("factored_rows/e/row")[:].tolist() == [[1, 1], [0, 2]]
    np.testing.assert_array_equal(trace.factored["e"].shifts([0, 1]), step.parameters[0].shifts(0))
    padded = replace(share, values=share.values[:1], rows=share.rows[:1])
    assert padded.n_samples == 1


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`Factored\(form='dense'\)`: expected one of `auto`, `factors`"):
        Factored("dense")  # type: ignore[arg-type]

"""Dense keeps every shift as it was, or rounded as it was asked to."""

from __future__ import annotations

from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import BitRound

from lightning_gradtrace.record import Dense
from lightning_gradtrace.record.dense import round_bits
from tests.record.steps import SHAPES, dense_shifts, make_step, record_steps


@pytest.mark.parametrize("gains", [False, True], ids=["number", "gains"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("workspace", [1, 60, 1 << 20])
def test_every_shift_is_kept_exactly(tmp_path: Path, gains: bool, dtype: str, workspace: int, monkeypatch) -> None:
    monkeypatch.setattr("lightning_gradtrace.record._parts.WORKSPACE", workspace)
    steps = [make_step(number, [2, 3], [4, 2], gains, dtype) for number in range(3)]
    trace = record_steps(tmp_path / "a.zarr", [Dense()], steps)
    assert trace.verify().ok, str(trace.verify())
    assert list(trace.dense) == list(SHAPES)
    for name, expected in dense_shifts(steps).items():
        array = trace.dense[name]
        assert array.shape == expected.shape and array.dtype == dtype and len(array) == 15
        np.testing.assert_allclose(np.asarray(array), expected, rtol=1e-5 if dtype == "float32" else 1e-12, atol=1e-6)
        np.testing.assert_array_equal(array.shifts([7, 2, 7]), np.asarray(array)[[7, 2, 7]])
        np.testing.assert_array_equal(array.shifts(14), array[14])


@pytest.mark.parametrize("bits", [1, 7, 15])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rounding_is_that_of_numcodecs_and_keeps_what_is_not_finite(bits: int, dtype: str) -> None:
    values = (np.random.default_rng(0).standard_normal(5000) * 10.0 ** np.arange(-2, 3).repeat(1000)).astype(dtype)
    if bits < 10 or dtype != "float16":
        codec = BitRound(bits)
        np.testing.assert_array_equal(round_bits(values, bits), codec.decode(codec.encode(values.copy())).view(dtype))
    odd = np.array([np.nan, np.inf, -np.inf, 0.0], dtype)
    np.testing.assert_array_equal(round_bits(odd, bits), odd)


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False), st.integers(1, 22))
def test_the_rounding_error_is_at_most_half_a_kept_bit(value: float, bits: int) -> None:
    array = np.array([value], np.float32)
    rounded = round_bits(array, bits)
    if np.isfinite(rounded[0]):  # the largest numbers round to infinity
        assert abs(float(rounded[0]) - value) <= abs(value) * 2.0 ** -(bits + 1)


def test_what_is_lossy_is_written_down(tmp_path: Path) -> None:
    step = make_step(0, [3], [2], dtype="float64")
    trace = record_steps(tmp_path / "a.zarr", [Dense("float32", keep_bits=7)], [step])
    array = trace.array("dense/outer/shift")
    assert array.attrs["keep_bits"] == 7 and array.attrs["rounded_from"] == "float64"
    expected = dense_shifts([step])["outer"].astype(np.float32)
    np.testing.assert_array_equal(array[:], round_bits(expected, 7))
    plain = record_steps(tmp_path / "b.zarr", [Dense()], [step]).array("dense/outer/shift")
    assert not {"keep_bits", "rounded_from"} & set(plain.attrs)


def test_one_file_holds_many_occurrences_that_are_read_alone(tmp_path: Path) -> None:
    from tests.record.steps import make_infos

    spec = next(s for s in Dense().specs(make_infos(shapes={"w": (200, 200)})))
    assert spec.inner_shape == (1, 200, 200) and spec.chunk_shape == (25, 200, 200)
    steps = [make_step(number, [5], [3]) for number in range(4)]
    trace = record_steps(
        tmp_path / "a.zarr", [Dense()], steps, commit_bytes=1, commit_share=1
    )  # the shard is written again every step
    array = zarr.open_array(tmp_path / "a.zarr" / "dense" / "outer" / "shift", mode="r")
    assert array.shards is not None and array.shards[0] > array.chunks[0]
    np.testing.assert_array_equal(array[:20], np.asarray(trace.dense["outer"]))


def test_the_array_serves_xarray_and_dask(tmp_path: Path) -> None:
    steps = [make_step(number, [2, 3], [4, 2]) for number in range(2)]
    trace = record_steps(tmp_path / "a.zarr", [Dense(schedule=lambda step: step == 1)], steps)
    lazy = trace.dense["outer"].to_xarray()
    assert lazy.dims == ("occurrence", "outer.0", "outer.1") and lazy.chunks is not None
    assert lazy["occurrence"].values.tolist() == trace.dense["outer"].occurrence.tolist() == [5, 6, 7, 8, 9]
    assert lazy["step"].values.tolist() == [1] * 5
    np.testing.assert_array_equal(lazy.sel(occurrence=7).values, trace.dense["outer"].shifts(7))
    total = da.from_array(trace.dense["outer"]).sum().compute()
    np.testing.assert_allclose(total, np.asarray(trace.dense["outer"]).sum(), rtol=1e-5)


def test_an_occurrence_that_is_not_held_is_named(tmp_path: Path) -> None:
    trace = record_steps(tmp_path / "a.zarr", [Dense()], [make_step(0, [2], [3])])
    with pytest.raises(KeyError, match=r"occurrence 9 has no row in `dense/outer`, which holds 2 of them, 0 to 1"):
        trace.dense["outer"].shifts([0, 9])
    with pytest.raises(KeyError, match="`nothing` is no tracked parameter"):
        trace.dense["nothing"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dtype": "bfloat16"},
            r"`Dense\(dtype='bfloat16'\)`: expected one of `float16`, `float32`, `float64`, or None",
        ),
        ({"keep_bits": 0}, r"`Dense\(keep_bits=0\)`: expected 1 to 52 bits, or None for all"),
        ({"dtype": "float32", "keep_bits": 24}, "expected 1 to 23 bits"),
        ({"schedule": "always"}, r"`Dense\(schedule='always'\)`: expected a Schedule, a whole number n"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dense(**arguments)

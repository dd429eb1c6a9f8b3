"""The predicted size of a trace is the size that it takes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradtrace.capture.shares import OuterShare
from lightning_gradtrace.record import (
    Dense,
    Factored,
    Norms,
    ParameterInfo,
    ParameterShifts,
    Record,
    Sketch,
    StepShifts,
    TopK,
)
from lightning_gradtrace.record.plan import plan
from tests.record.steps import make_infos, record_steps

SHAPES = {"one": (120, 80), "two": (80, 120), "three": (100, 100)}
N_STEPS, N_SAMPLES, N_POSITIONS = 30, 8, 12


def steps() -> list[StepShifts]:
    """Gradients of a training: rows and parameters differ in size."""
    torch.manual_seed(0)
    made = []
    for number in range(N_STEPS):
        parameters = []
        for info in make_infos(shapes=SHAPES):
            left = torch.randn(N_SAMPLES, N_POSITIONS, info.shape[0]) * torch.randn(info.shape[0]).exp()
            share = OuterShare(left, torch.randn(N_SAMPLES, N_POSITIONS, info.shape[1]))
            parameters.append(ParameterShifts(info, -0.01, [share]))
        made.append(StepShifts([N_SAMPLES], parameters, number))
    return made


def bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "records",
    [
        [TopK(200)],
        [TopK(1500, per="step")],
        [Dense()],
        [Sketch(400)],
        [Factored()],
        [TopK(50), Dense(keep_bits=20, schedule=5), Sketch(64, schedule=lambda step: step > 20), Norms()],
    ],
    ids=str,
)
def test_the_outcome_is_within_a_tenth_of_the_prediction(records: list[Record], tmp_path: Path) -> None:
    table = plan(make_infos(shapes=SHAPES), records, N_STEPS, N_SAMPLES, n_positions=N_POSITIONS)
    record_steps(tmp_path / "a.zarr", records, steps())
    assert table["bytes"].sum() == pytest.approx(bytes_of(tmp_path / "a.zarr"), rel=0.1)
    for record in records:
        name = type(record).__name__
        groups = {array.partition("/")[0] for array in table.loc[table["record"] == name, "array"]}
        found = sum(file.stat().st_size for group in groups for file in (tmp_path / "a.zarr" / group).rglob("c.*"))
        assert table.loc[table["record"] == name, "bytes"].sum() == pytest.approx(found, rel=0.1), name


def test_every_array_of_the_trace_is_in_the_table(tmp_path: Path) -> None:
    records = [TopK(5), TopK(9, per="step", schedule=7), Dense(), Factored("factors"), Sketch(9), Norms()]
    trace = record_steps(tmp_path / "a.zarr", records, steps()[:3])
    table = plan(make_infos(shapes=SHAPES), records, 3, N_SAMPLES, n_positions=N_POSITIONS).set_index("array")
    assert table.index.is_unique
    arrays = {path: node for path, node in trace.group.members(max_depth=None) if hasattr(node, "shape")}
    assert set(arrays) == set(table.index) - {"zarr.json"}
    for path, array in arrays.items():
        if path in table.index and array.dtype.kind in "fiu":
            assert table.loc[path, "rows"] == array.shape[0], path
            assert table.loc[path, "raw_bytes"] == array.size * array.dtype.itemsize, path


@pytest.mark.parametrize("record", [TopK(1000), Dense(), Dense(keep_bits=7), Factored(), Sketch(1024)], ids=str)
def test_a_model_of_hundreds_of_millions_of_weights_is_predicted_without_drawing_them(record: Record) -> None:
    infos = [ParameterInfo("a", (50_000, 4096), 0), ParameterInfo("b", (4096, 16_384), 50_000 * 4096)]
    tracemalloc.start()
    short, long = (plan(infos, record, n_steps, 8) for n_steps in (1, 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # one row has 1 GB
    ours = [table.loc[table["record"] == type(record).__name__, "bytes"].sum() for table in (short, long)]
    assert 700 * ours[0] < ours[1] < 1100 * ours[0]


def test_a_model_and_a_filter_can_be_given() -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    table = plan(model, Dense(), 10, 4, params="0.*")
    assert table.loc[table["record"] == "Dense", "array"].tolist() == ["dense/0.weight/shift", "dense/0.bias/shift"]
    every_other = plan(model, Dense(), 10, 4, params="0.*", every_n_steps=2)
    assert every_other["raw_bytes"].sum() < 0.6 * table["raw_bytes"].sum()
    assert (
        plan(model, Dense(), 0, 4)["rows"].sum()
        == len(plan(model, Dense(), 0, 4).query("array.str.startswith('params')")) * 2
    )


def test_without_a_length_factored_is_no_larger_than_predicted(tmp_path: Path) -> None:
    most = plan(make_infos(shapes=SHAPES), Factored(), N_STEPS, N_SAMPLES)["bytes"].sum()
    assert (
        most > plan(make_infos(shapes=SHAPES), Factored(), N_STEPS, N_SAMPLES, n_positions=N_POSITIONS)["bytes"].sum()
    )
    gains = plan(make_infos(shapes=SHAPES), Factored(), N_STEPS, N_SAMPLES, n_positions=N_POSITIONS, gains=True)
    assert np.isin(["factored_gain/one/gain"], gains["array"]).all()


@pytest.mark.parametrize(("name", "value"), [("n_steps", -1), ("n_steps", 2.5), ("n_samples", True)])
def test_arguments_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"`plan\({name}={value!r}\)`: expected a whole number, at least 0"):
        plan(make_infos(), Dense(), **{"n_steps": 1, "n_samples": 1, name: value})  # type: ignore[arg-type]

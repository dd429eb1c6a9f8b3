"""Shifts along directions equal products with dense shifts; a diffuse feature has no outlier but a direction."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from zarr.storage import MemoryStore

from lightning_gradtrace.analysis import direction_shifts, outliers, principal_directions
from lightning_gradtrace.record import ParameterInfo, Sketch
from lightning_gradtrace.record.projection import Projection
from lightning_gradtrace.store import TraceWriter, open_trace
from tests.analysis.traces import random_trace, write_trace
from tests.synthetic import params_table

SHAPES = {"a": (2, 3), "w": (6, 5)}


class DenseArray:
    """What a record of all shifts offers for one parameter."""

    def __init__(self, values, occurrence):
        self.values, self.occurrence = values, occurrence

    def shifts(self, occurrence):
        return self.values[np.searchsorted(self.occurrence, occurrence)]


def trace_with(values, k, kept=None, record="dense", shapes=SHAPES):
    """A trace of the k largest shifts of each occurrence, and beside it all shifts of `w` for the kept occurrences."""
    n = len(values)
    flat = np.concatenate([np.zeros((n, 6)), values.reshape(n, -1)], axis=1)
    index = np.sort(np.argsort(-np.abs(flat), axis=1, kind="stable")[:, :k], axis=1)
    trace = write_trace(shapes, np.arange(n).reshape(-1, 2), index, shift=np.take_along_axis(flat, index, axis=1))
    kept = np.arange(n) if kept is None else kept

    class Recorded(type(trace)):
        pass

    setattr(Recorded, record, {"w": DenseArray(values[kept], kept)})
    trace.__class__ = Recorded
    return trace


@pytest.mark.parametrize("record", ["dense", "factored"])
@pytest.mark.parametrize("axis", ["in", "out", "weight"])
def test_shifts_along_directions_equal_products(axis, record, monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 6, 5)).astype(np.float32)
    kept = np.arange(0, 20, 3)
    trace = trace_with(values, 4, kept, record)
    shape = {"in": (3, 5), "out": (3, 6), "weight": (3, 6, 5)}[axis]
    directions = rng.normal(size=shape) * 7
    found = direction_shifts(trace, "w", directions, axis)
    assert found["occurrence"].tolist() == np.repeat(kept, 3).tolist()
    assert set(found["record"]) == {record}
    for row in found.itertuples():
        one, s = directions[row.direction], values[row.occurrence].astype(float)
        one = one / np.linalg.norm(one)
        expected = (s * one).sum() if axis == "weight" else np.linalg.norm(s @ one if axis == "in" else one @ s)
        assert row.shift == pytest.approx(expected, rel=1e-6)
        assert row.share == pytest.approx(abs(expected) / np.linalg.norm(s), rel=1e-6)
    monkeypatch.setattr("lightning_gradtrace.analysis._shift_sources._BLOCK", 60)
    pd.testing.assert_frame_equal(direction_shifts(trace, "w", directions, axis), found)
    some = direction_shifts(trace, "w", directions[0], axis, steps=slice(2, 5))
    assert some["occurrence"].tolist() == [6, 9]


def test_a_turned_basis_keeps_the_length():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(10, 6, 5))
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    found = direction_shifts(trace_with(values, 4), "w", basis)
    squares = found.assign(square=found["shift"] ** 2).groupby("occurrence")["square"].sum()
    np.testing.assert_allclose(squares, (values**2).sum(axis=(1, 2)))
    column = direction_shifts(trace_with(values, 4), "w", np.eye(5)[2])
    np.testing.assert_allclose(column["shift"], np.linalg.norm(values[:, :, 2], axis=1))


def test_topk_is_an_approximation_that_becomes_exact():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(12, 6, 5)).astype(np.float32)
    direction = rng.normal(size=5)
    exact = direction_shifts(trace_with(values, 4), "w", direction, record="dense")
    whole = direction_shifts(trace_with(values, 30), "w", direction, record="topk")
    np.testing.assert_allclose(whole["shift"], exact["shift"], rtol=1e-5)
    few = direction_shifts(trace_with(values, 4), "w", direction, record="topk")
    assert few["occurrence"].tolist() == list(range(12))
    for row in few.itertuples():
        flat = values[row.occurrence].reshape(-1).astype(float)
        kept = np.where(np.isin(np.arange(30), np.argsort(-abs(flat))[:4]), flat, 0).reshape(6, 5)
        assert row.shift == pytest.approx(np.linalg.norm(kept @ direction) / np.linalg.norm(direction), rel=1e-5)


def test_a_diffuse_feature_is_found_along_its_direction_and_missed_by_outliers():
    """Half of the samples move all 320 weights a little, in a fixed pattern of signs; large shifts fall anywhere."""
    rng = np.random.default_rng(3)
    n, shape = 300, (20, 16)
    topic = rng.random(n) < 0.5
    feature = np.where(rng.random(shape) < 0.5, -1.0, 1.0)
    values = 0.05 * rng.normal(size=(n, *shape)) + 0.025 * topic[:, None, None] * feature
    spikes = rng.integers(320, size=(n, 3))
    np.put_along_axis(values.reshape(n, -1), spikes, rng.choice([-0.5, 0.5], size=(n, 3)), axis=1)
    trace = trace_with(values, 10, shapes={"a": (2, 3), "w": shape})

    def accuracy(score):
        return max(np.mean((score > limit) == topic) for limit in score)

    assert accuracy(direction_shifts(trace, "w", feature, "weight")["shift"].to_numpy()) > 0.98
    # The largest shifts are spikes, of either kind of sample alike, whatever they are compared with.
    for normalise in ("none", "series"):
        largest = outliers(trace, "param", n=100, normalise=normalise, min_count=3)
        assert abs(topic[largest["occurrence"]].mean() - topic.mean()) < 0.15
    # No entry, no column and no row tells the topic either.
    best_entry = max(accuracy(values[:, r, c] * feature[r, c]) for r in range(20) for c in range(16))
    columns = direction_shifts(trace, "w", np.eye(16))["shift"].to_numpy().reshape(n, 16)
    rows = direction_shifts(trace, "w", np.eye(20), "out")["shift"].to_numpy().reshape(n, 20)
    assert max(best_entry, *(accuracy(line) for line in [*columns.T, *rows.T])) < 0.75
    # From the k largest alone the direction shows less.
    blind = direction_shifts(trace, "w", feature, "weight", record="topk")["shift"].to_numpy()
    assert accuracy(blind) < 0.9


SIZES = {"w": (24, 20), "v": (40,), "small": (3, 4)}


def sketched_trace(shifts, dim, seed):
    """A trace whose only record is a Sketch of these shifts: (occurrence, *shape) by parameter."""
    params = params_table(SIZES)
    infos = [ParameterInfo(n, s, int(o)) for (n, s), o in zip(SIZES.items(), params["offset"], strict=True)]
    store = MemoryStore()
    writer = TraceWriter(store, params=params, specs=Sketch(dim, seed).specs(infos), attrs={})
    rows = {}
    for name, shape in SIZES.items():
        found = Projection.of(name, shape, dim, seed).apply(torch.from_numpy(shifts[name]))
        rows[f"sketch/{name}/shift"] = found.reshape(len(found), -1).numpy().astype(np.float32)
    n = np.arange(len(shifts["w"]))
    writer.append_step(
        {"step": 0, "epoch": 0, "lr": [0.1]}, {"micro_batch": n * 0, "slot": n, "rank": n * 0, "sample_id": n}, rows
    )
    writer.close(complete=True)
    return open_trace(store)


def test_sketches_estimate_shifts_along_directions_without_bias():
    """The mean over seeds meets the truth within its error, for matrices, folded vectors and what is kept whole."""
    rng = np.random.default_rng(5)
    shifts = {name: rng.normal(size=(3, *shape)) for name, shape in SIZES.items()}
    for name, shape in SIZES.items():
        directions = rng.normal(size=(2, *shape))
        units = directions / np.linalg.norm(directions.reshape(2, -1), axis=1).reshape(2, *[1] * len(shape))
        truth = shifts[name].reshape(3, -1) @ units.reshape(2, -1).T
        estimates, bounds = [], []
        for seed in range(24):
            trace = sketched_trace(shifts, 16, seed)
            found = direction_shifts(trace, name, directions, "weight")
            assert set(found["record"]) == {"sketch"}
            assert found["occurrence"].tolist() == [0, 0, 1, 1, 2, 2]
            estimates.append(found["shift"].to_numpy().reshape(3, 2))
            bounds.append(trace.array(f"sketch/{name}/shift").attrs["relative_error"])
        error = np.abs(np.mean(estimates, axis=0) - truth)
        length = np.linalg.norm(shifts[name].reshape(3, -1), axis=1)[:, None]
        assert (error <= 4 * bounds[0] * length / np.sqrt(24) + 1e-5).all()
        assert (np.std(estimates, axis=0) <= 1.5 * bounds[0] * length + 1e-5).all()
        assert (bounds[0] == 0) == (name == "small")


def test_sketches_find_a_diffuse_feature():
    rng = np.random.default_rng(6)
    topic = rng.random(200) < 0.5
    feature = np.where(rng.random((24, 20)) < 0.5, -1.0, 1.0)
    shifts = {name: 0.05 * rng.normal(size=(200, *shape)) for name, shape in SIZES.items()}
    shifts["w"] += 0.1 * topic[:, None, None] * feature
    found = direction_shifts(sketched_trace(shifts, 128, 0), "w", feature, "weight")["shift"].to_numpy()
    assert max(np.mean((found > limit) == topic) for limit in found) > 0.98


def test_sketches_hold_no_lengths_along_axes():
    trace = sketched_trace({name: np.ones((2, *shape)) for name, shape in SIZES.items()}, 16, 0)
    for call in (
        lambda: direction_shifts(trace, "w", np.ones(20)),
        lambda: direction_shifts(trace, "w", np.ones(20), record="sketch"),
        lambda: principal_directions(trace, "w"),
    ):
        with pytest.raises(ValueError, match='take `axis="weight"`, or record `Dense` or `Factored`'):
            call()


def test_principal_directions_find_a_planted_one():
    rng = np.random.default_rng(4)
    feature = rng.normal(size=5)
    feature /= np.linalg.norm(feature)
    values = 0.1 * rng.normal(size=(50, 6, 5)) + rng.normal(size=(50, 6, 1)) * feature
    trace = trace_with(values, 3)
    found, table = principal_directions(trace, "w", 5)
    assert abs(found[0] @ feature) > 0.99
    assert (found[np.arange(5), abs(found).argmax(axis=1)] > 0).all()
    assert table["share"].sum() == pytest.approx(1)
    along = direction_shifts(trace, "w", found)
    squares = along.assign(square=along["shift"] ** 2).groupby("direction")["square"].sum()
    np.testing.assert_allclose(table["square"], squares)


def test_what_does_not_fit_is_refused():
    trace = trace_with(np.ones((4, 6, 5)), 3)
    for arguments, message in (
        (("x", np.ones(5)), "`x` is not tracked in this trace; it tracks `a`, `w`"),
        (("w", np.ones(4)), r"has shape \(4,\), expected \(5,\) or \(n, 5\) for `axis='in'`"),
        (("w", np.zeros(5)), "holds one of length zero"),
        (("w", np.ones(5), "column"), '`axis` is \'column\', expected "in", "out" or "weight"'),
    ):
        with pytest.raises(ValueError, match=message):
            direction_shifts(trace, *arguments)
    with pytest.raises(ValueError, match="reads a record 'factored', and the trace holds topk"):
        direction_shifts(trace, "w", np.ones(5), record="factored")
    with pytest.raises(ValueError, match="`record` is 'sketches', expected one of 'auto'"):
        direction_shifts(trace, "w", np.ones(5), record="sketches")
    with pytest.raises(ValueError, match="`n` is 0, expected 1 or more directions"):
        principal_directions(trace, "w", 0)
    assert len(principal_directions(trace, "w", 6)[0]) == 5  # as many as the axis has
    with pytest.raises(ValueError, match=r"only parameters of shape \(out, in\)"):
        direction_shifts(random_trace().trace, "b.conv", np.ones(2))


def test_recorded_trainings_agree(tmp_path):
    """The same training through the callback: all shifts, their factors, and a TopK that keeps everything."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_gradtrace import Dense, Factored, GradTrace, TopK

    class Regression(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))

        def training_step(self, batch):
            return ((self.net(batch[0]) - batch[1]) ** 2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(12, 4), torch.randn(12, 2)), batch_size=4)
    callback = GradTrace(tmp_path / "a.zarr", record=[TopK(18), Dense(), Factored(), Sketch(18)], inputs=None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, callbacks=[callback], **quiet).fit(
        Regression(), loader
    )
    trace = open_trace(tmp_path / "a.zarr")
    tables = {r: direction_shifts(trace, "net.0.weight", np.ones(4), record=r) for r in ("dense", "factored", "topk")}
    assert tables["dense"]["shift"].min() > 0
    assert len(tables["dense"]) == 24
    for record in ("factored", "topk"):
        np.testing.assert_allclose(tables[record]["shift"], tables["dense"]["shift"], rtol=1e-5)
    assert set(direction_shifts(trace, "net.0.weight", np.ones(4))["record"]) == {"dense"}
    # A sketch of as many values as there are weights is exact.
    whole, exact = (
        direction_shifts(trace, "net.0.weight", np.ones((3, 4)), "weight", record=r) for r in ("sketch", "dense")
    )
    np.testing.assert_allclose(whole[["shift", "norm"]], exact[["shift", "norm"]], rtol=1e-4, atol=1e-9)

"""Sketches equal the projection written down in the docs, and estimate inner products without bias."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradtrace.record import Sketch, sketch
from lightning_gradtrace.record.projection import Projection, signs
from tests.record.steps import dense_shifts, make_step, record_steps


def project(shifts: np.ndarray, p: Projection) -> np.ndarray:
    """The definition, with matrices written out."""
    flat = shifts.reshape(len(shifts), -1).astype(np.float64)
    whole = np.zeros((len(flat), p.rows * p.columns))
    whole[:, : flat.shape[1]] = flat
    left = np.eye(p.rows) if p.left == p.rows else signs(f"{p.seed}/{p.name}/left", p.left, p.rows) / p.left**0.5
    right = signs(f"{p.seed}/{p.name}/right", p.right, p.columns) / p.right**0.5
    right = np.eye(p.columns) if p.right == p.columns else right
    return (left @ whole.reshape(-1, p.rows, p.columns) @ right.T).reshape(len(flat), -1)


@pytest.mark.parametrize("gains", [False, True], ids=["number", "gains"])
@pytest.mark.parametrize("dim", [1, 6, 20, 1000])
@pytest.mark.parametrize("workspace", [1, 1 << 20])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sketch_is_the_projection_of_the_dense_shifts(tmp_path, gains, dim, workspace, dtype, monkeypatch) -> None:
    monkeypatch.setattr("lightning_gradtrace.record._parts.WORKSPACE", workspace)
    steps = [make_step(number, [3, 2], [2, 4], gains, dtype) for number in range(2)]
    trace = record_steps(tmp_path / "a.zarr", [Sketch(dim, seed=5)], steps)
    assert trace.verify().ok
    for name, shifts in dense_shifts(steps).items():
        p = Projection.of(name, shifts.shape[1:], dim, 5)
        assert p.dim <= dim and trace.sketch[name].shape == (10, p.dim)
        expected = project(shifts, p)
        tolerance = 1e-5 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(
            trace.sketch[name], expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
        )


def test_outer_products_and_look_ups_are_never_formed(monkeypatch) -> None:
    monkeypatch.setattr(sketch, "shift_blocks", lambda *a: pytest.fail("shifts were formed"))
    step = make_step(0, [3], [2])
    step.parameters = [p for p in step.parameters if p.info.name in ("outer", "embedding", "tied", "kernel")]
    record = Sketch(12)
    record.arrays([p.info for p in step.parameters])
    assert all(np.isfinite(rows).all() for rows in record.reduce(step, 0).values())


def test_small_parameters_are_kept_exactly(tmp_path: Path) -> None:
    steps = [make_step(number, [3], [2]) for number in range(2)]
    trace = record_steps(tmp_path / "a.zarr", [Sketch(1000)], steps)
    shifts = np.concatenate([s.reshape(len(s), -1) for s in dense_shifts(steps).values()], 1).astype(np.float64)
    assert trace.sketch.relative_error == 0
    np.testing.assert_allclose(trace.sketch.inner(range(6), [4, 0]), shifts @ shifts[[4, 0]].T, rtol=1e-4, atol=1e-5)
    norms = np.linalg.norm(shifts, axis=1)
    cosine = shifts @ shifts.T / np.outer(norms, norms)
    np.testing.assert_allclose(trace.sketch.similarity(range(6), range(6)), cosine, rtol=1e-4, atol=1e-5)
    assert trace.sketch.inner(2, 3).shape == () and trace.sketch.inner(2, [3]).shape == (1,)
    one = dense_shifts(steps)["bias"].astype(np.float64)
    assert trace.sketch.inner(2, 3, params="bias") == pytest.approx(one[2] @ one[3], rel=1e-4)


@pytest.mark.parametrize("shape", [(40, 30), (3, 50), (200,), (5, 4, 6)], ids=str)
def test_inner_products_are_unbiased_and_vary_no_more_than_the_bound(shape: tuple[int, ...]) -> None:
    """Over 3000 seeds the mean is within 4 standard errors, and the variance below the bound (plus its own error)."""
    generator = np.random.default_rng(1)
    a = generator.standard_normal(shape)
    b = 0.5 * a + generator.standard_normal(shape)
    size = np.linalg.norm(a) * np.linalg.norm(b)
    found = []
    for seed in range(3000):
        p = Projection.of("w", shape, 36, seed)
        one, other = p.apply(torch.from_numpy(np.stack([a, b]))).flatten(1)
        found.append(float(one @ other))
    assert p.dim <= 36 and p.relative_error > 0
    assert abs(np.mean(found) - (a * b).sum()) < 4 * np.std(found) / len(found) ** 0.5
    assert np.std(found) < 1.06 * p.relative_error * size


def test_the_bound_is_nearly_reached_by_rank_one_shifts() -> None:
    """It is no bound for show: of outer products with themselves the variance is within a tenth of it."""
    generator = np.random.default_rng(1)
    a = np.outer(generator.standard_normal(60), generator.standard_normal(50))
    found = []
    for seed in range(3000):
        p = Projection.of("w", a.shape, 36, seed)
        one = p.apply(torch.from_numpy(a[None])).flatten()
        found.append(float(one @ one))
    assert 0.85 * p.relative_error < np.std(found) / np.linalg.norm(a) ** 2 < 1.06 * p.relative_error


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 30), min_size=0, max_size=3),
    dim=st.integers(1, 200),
    seed=st.integers(0, 2**40),
)
def test_sides_fit_and_projections_are_linear_and_the_same_every_time(shape, dim, seed) -> None:
    p = Projection.of("w", tuple(shape), dim, seed)
    assert 1 <= p.dim <= dim and p.left <= p.rows and p.right <= p.columns
    values = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    again = Projection.of("w", tuple(shape), dim, seed)
    both = p.apply(torch.stack([values[0] - 2 * values[1]]))[0]
    one, other = again.apply(values)
    torch.testing.assert_close(both, one - 2 * other)
    if values[0].numel() <= dim:
        torch.testing.assert_close(one.flatten()[: values[0].numel()], values[0].flatten())


def test_signs_depend_on_seed_name_and_side_alone() -> None:
    """The values themselves: a trace written today is compared with one written by a later version."""
    expected = [[1, 1, -1, -1, -1, 1, 1, -1], [1, 1, -1, -1, 1, -1, 1, 1]]
    assert signs("0/fc.weight/left", 2, 8).astype(int).tolist() == expected
    draws = [signs(key, 4, 64).tobytes() for key in ("0/a/left", "1/a/left", "0/b/left", "0/a/right")]
    assert len(set(draws)) == 4
    assert abs(signs("0/a/left", 100, 1000).mean()) < 0.01


def test_runs_with_the_same_seed_can_be_compared(tmp_path: Path) -> None:
    steps = [make_step(number, [3], [2]) for number in range(2)]
    whole = record_steps(tmp_path / "a.zarr", [Sketch(6)], steps)
    later = record_steps(tmp_path / "b.zarr", [Sketch(6)], steps[1:])
    np.testing.assert_array_equal(whole.sketch.vectors([3, 4, 5]), later.sketch.vectors([0, 1, 2]))
    attrs = whole.array("sketch/outer/shift").attrs
    p = Projection.of("outer", (12, 9), 6, 0)
    assert attrs["matrix"] == [12, 9] and attrs["sides"] == [p.left, p.right] and attrs["seed"] == 0
    assert attrs["relative_error"] == pytest.approx(p.relative_error)
    assert whole.sketch.relative_error >= p.relative_error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, r"`Sketch\(dim=0\)`: expected a whole number, at least 1"),
        ({"dim": 8, "seed": -1}, r"`Sketch\(seed=-1\)`: expected a whole number, at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sketch(**arguments)


def test_a_large_matrix_gets_two_even_sides() -> None:
    p = Projection.of("w", (768, 3072), 1024, 0)
    assert (p.left, p.right) == (32, 32)
    assert Projection.of("w", (10, 3072), 1000, 0).left == 10  # a short side is kept as it is

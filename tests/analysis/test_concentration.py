"""Concentration on samples and on weights equals plain arithmetic on the dense shifts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace import Norms, TopK, Trace
from lightning_gradtrace.analysis import selection_overlap, self_influence, shift_sparsity
from lightning_gradtrace.analysis.concentration import gini
from tests.analysis.traces import random_trace
from tests.record.steps import dense_shifts, make_step, record_steps

K = 9
SIZES = [3, 2]


@pytest.fixture(scope="module")
def steps() -> list:
    return [make_step(number, SIZES, [3, 2]) for number in range(5)]


@pytest.fixture(scope="module")
def trace(steps, tmp_path_factory) -> Trace:
    return record_steps(Path(tmp_path_factory.mktemp("c")) / "a.zarr", [TopK(K), Norms()], steps)


def mean_difference(values: np.ndarray) -> float:
    """The Gini coefficient by its definition."""
    return float(np.abs(values[:, None] - values).mean() / (2 * values.mean()))


def test_gini_is_half_the_relative_mean_difference() -> None:
    values = np.random.default_rng(0).exponential(size=50)
    assert gini(values) == pytest.approx(mean_difference(values))
    assert np.isnan(gini(np.zeros(3))) and np.isnan(gini(np.zeros(0)))


@pytest.mark.parametrize("every", [1, 2])
def test_self_influence_equals_dense_shifts(trace: Trace, steps: list, every: int) -> None:
    dense = dense_shifts(steps)
    squares = {name: (shift.reshape(len(shift), -1) ** 2).sum(axis=1) for name, shift in dense.items()}
    squares[""] = np.sum(list(squares.values()), axis=0)
    found = self_influence(trace, every=every)
    assert found["param"].drop_duplicates().tolist() == ["", *trace.params["param"]]
    for row in found.to_dict("records"):
        inside = [s for s in range(row["step"], min(row["step"] + every, 5))]
        parts = [squares[row["param"]][s * 5 : s * 5 + 5] for s in inside]
        assert row["samples"] == 5 * len(inside)
        assert row["square"] == pytest.approx(np.mean(np.concatenate(parts)), rel=1e-5)
        for name, value in (("gini", mean_difference), ("largest", lambda p: p.max() / p.sum())):
            per_step = [value(p) for p in parts if p.sum() > 0]
            if per_step:
                assert row[name] == pytest.approx(np.mean(per_step), rel=1e-4)
            else:
                assert np.isnan(row[name])


def test_sparsity_equals_the_largest_dense_shifts(trace: Trace, steps: list) -> None:
    dense = dense_shifts(steps)
    names = list(trace.params["param"])
    flat = np.concatenate([dense[name].reshape(25, -1) for name in names], axis=1)
    owner = np.repeat(np.arange(len(names)), [dense[name][0].size for name in names])
    largest = np.argsort(-np.abs(flat), axis=1, kind="stable")[:, :K]
    kept = np.zeros_like(flat)
    np.put_along_axis(kept, largest, np.take_along_axis(flat, largest, axis=1), axis=1)
    found = shift_sparsity(trace, every=5).set_index("param")
    for number, name in enumerate(["", *names]):
        mine = kept if not name else kept[:, owner == number - 1]
        whole = flat if not name else flat[:, owner == number - 1]
        row, any_kept = found.loc[name], (mine != 0).any(axis=1)
        assert row["kept"] == pytest.approx((mine != 0).sum() / 25)
        assert row["kept_share"] == pytest.approx((mine**2).sum() / (whole**2).sum(), rel=1e-5)
        assert row["share_of_kept"] == pytest.approx((mine**2).sum() / (kept**2).sum(), rel=1e-5)
        if any_kept.any():
            ratio = (mine**2).sum(axis=1)[any_kept] ** 2 / (mine**4).sum(axis=1)[any_kept]
            assert row["participation"] == pytest.approx(ratio.mean(), rel=1e-5)
        else:
            assert np.isnan(row["participation"])


def test_overlap_counts_entries_kept_twice() -> None:
    raw = random_trace(3)
    found = selection_overlap(raw.trace)
    for step in range(12):
        chosen = [raw.selected[i] for i in range(60) if raw.step[i] == step]
        kept, distinct = sum(map(len, chosen)), len(set().union(*chosen))
        row = found.set_index("step").loc[step]
        assert (row["kept"], row["distinct"]) == (kept, distinct)
        assert row["overlap"] == pytest.approx(1 - (distinct - kept / 5) / (kept - kept / 5))
    halves = selection_overlap(raw.trace, every=6)
    assert halves["overlap"].tolist() == pytest.approx(found["overlap"].to_numpy().reshape(2, 6).mean(axis=1).tolist())
    pd.testing.assert_frame_equal(
        selection_overlap(raw.trace, steps=slice(2, 4)), found.iloc[2:5].reset_index(drop=True)
    )


def test_small_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_trace(3)
    whole = selection_overlap(raw.trace), shift_sparsity(raw.trace)
    from lightning_gradtrace.analysis import _access

    once = _access.moved

    def in_pieces(trace, steps=None):
        for occurrence, entry, shift in once(trace, steps):
            for one in np.unique(occurrence):
                mine = occurrence == one
                yield occurrence[mine], entry[mine], shift[mine]

    monkeypatch.setattr(_access, "moved", in_pieces)
    for before, after in zip(whole, (selection_overlap(raw.trace), shift_sparsity(raw.trace)), strict=True):
        pd.testing.assert_frame_equal(before, after)


def test_a_trace_without_norms_says_what_to_record() -> None:
    with pytest.raises(ValueError, match=r"reads norms of shifts, and the trace holds \['topk'\]; record with"):
        self_influence(random_trace(3).trace)
    assert shift_sparsity(random_trace(3).trace)["kept_share"].isna().all()
    with pytest.raises(ValueError, match="`every` is 0, expected 1 or more steps"):
        shift_sparsity(random_trace(3).trace, every=0)

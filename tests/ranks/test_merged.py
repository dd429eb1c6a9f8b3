"""The merged trace answers every question as the trace of one process does."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr
from zarr.storage import MemoryStore

from lightning_gradtrace import Trace, open_trace
from lightning_gradtrace.analysis import frequent_entries, neurons, notable_tokens
from lightning_gradtrace.store import StoreError
from tests.ranks.parts import COUNTS, paths, write_parts, write_single
from tests.synthetic import write_trace


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Trace]:
    single, parts = paths(tmp_path_factory.mktemp("both"))
    return open_trace(parts), open_trace(single)


def test_tables(both):
    trace, expected = both
    assert len(trace.parts) == 3 and trace.attrs["complete"] and trace.attrs["ranks"] == 3
    pd.testing.assert_frame_equal(trace.params, expected.params)
    pd.testing.assert_frame_equal(trace.steps, expected.steps)
    pd.testing.assert_frame_equal(trace.occurrences, expected.occurrences)
    assert trace.records == expected.records and trace.vocab == expected.vocab
    # Factors are kept in the smaller form, step by step, and left out where the loss reached nothing.
    assert {k: n for k, n in trace.committed.items() if "factored" not in k} == {
        k: n for k, n in expected.committed.items() if "factored" not in k
    }
    assert repr(trace).split(":")[1] == repr(expected).split(":")[1]


def test_texts_and_weights(both):
    trace, expected = both
    ids = np.unique(expected.occurrences["sample_id"])
    assert np.array_equal(trace.inputs(ids), expected.inputs(ids))
    assert trace.text(int(ids[3])) == expected.text(int(ids[3]))
    assert np.array_equal(trace.weight_steps, expected.weight_steps)
    name = trace.params["param"][0]
    assert np.array_equal(trace.weights(name, 2), expected.weights(name, 2))


@pytest.mark.parametrize("record", ["topk", "topk_step"])
def test_selections(record, both):
    views = [t.using(record).topk for t in both]
    pd.testing.assert_frame_equal(views[0].frame(), views[1].frame())
    pd.testing.assert_frame_equal(views[0].frame(steps=[1, 4]), views[1].frame(steps=[1, 4]))
    for size in (1, 300, 2**20):
        joined = []
        for view in views:
            blocks = list(view.blocks(size))
            joined.append([np.concatenate([getattr(b, f) for b in blocks]) for f in ("occurrence", "entry", "shift")])
        assert all(np.array_equal(a, b) for a, b in zip(*joined, strict=True))


def _assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_records_with_rows_of_their_own_and_without(both):
    trace, expected = both
    for name in expected.params["param"]:
        for kind in ("dense", "factored"):
            found, other = getattr(trace, kind)[name], getattr(expected, kind)[name]
            assert np.array_equal(found.occurrence, other.occurrence)
            assert np.array_equal(found.shifts(other.occurrence), other.shifts(other.occurrence))
            some = other.occurrence[[7, 2, 3]]
            assert np.array_equal(found.shifts(some), other.shifts(some))
        assert np.array_equal(trace.dense[name][3:-2, 1], expected.dense[name][3:-2, 1])
        assert np.array_equal(trace.read(f"gains/{name}/gain"), expected.read(f"gains/{name}/gain"), equal_nan=True)
    every = np.arange(expected.n_occurrences)
    _assert_close(trace.sketch.inner(every, every), expected.sketch.inner(every, every))
    pd.testing.assert_frame_equal(trace.norms.frame(), expected.norms.frame())


def test_arrays_by_path(both):
    trace, expected = both
    arrays = [path for path, node in expected.group.members(max_depth=None) if isinstance(node, zarr.Array)]
    for path in arrays:
        if path.startswith(("inputs/", "factored")):
            continue  # samples come in another order; factors are kept in the smaller form, step by step
        found, other = trace.read(path), expected.read(path)
        if path.startswith("sketch"):  # products of matrices, of as many rows as a rank has samples
            _assert_close(found, other)
        else:
            assert np.array_equal(found, other, equal_nan=trace.array(path).dtype.kind == "f"), path
        assert trace.array(path).shape == expected.array(path).shape and trace.has(path)
    with pytest.raises(KeyError, match=r"holds no array `topk/weight`; it holds: .*topk"):
        trace.read("topk/weight")


def test_analyses_are_the_same(both):
    results = []
    for trace in both:
        entries = frequent_entries(trace, n_entries=20)
        tokens = notable_tokens(trace, entries, min_count=1)
        results.append((entries, tokens, neurons(trace, entries, tokens, axis="in")))
    for found, expected in zip(*results, strict=True):
        assert len(found)
        pd.testing.assert_frame_equal(found, expected)


def test_xarray_with_the_same_arrays_and_coordinates(both):
    trees = [t.to_xarray() for t in both]
    for path in ("topk", "topk_step", "dense/layers.0.bias", "norms", "occurrences", "steps"):
        found, expected = trees[0][path].to_dataset(), trees[1][path].to_dataset()
        assert set(found.variables) == set(expected.variables), path
        for name in expected.variables:
            np.testing.assert_array_equal(found[name].to_numpy(), expected[name].to_numpy(), err_msg=name)
            assert found[name].dims == expected[name].dims
    dense = trees[0]["dense/layers.0.bias"]
    assert dense.sel(occurrence=int(both[0].dense["layers.0.bias"].occurrence[4]))["rank"] in (0, 1, 2)


def test_export(both, tmp_path):
    trace, expected = both
    packed = open_trace(trace.to_zip(tmp_path / "a.zip"))
    assert packed.verify().ok and packed.topk_step.frame().equals(expected.topk_step.frame())
    for t, folder in ((trace, tmp_path / "a"), (expected, tmp_path / "b")):
        t.to_parquet(folder)
    for name in ("params", "steps", "occurrences", "topk", "topk_step"):
        found, other = (pd.read_parquet(tmp_path / folder / f"{name}.parquet") for folder in "ab")
        pd.testing.assert_frame_equal(found, other)
    again = pickle.loads(pickle.dumps(trace))
    assert again.topk.frame().equals(expected.topk.frame())


def test_a_store_that_is_no_directory():
    store, alone = MemoryStore(), MemoryStore()
    write_parts(store)
    write_single(alone)
    trace = open_trace(store)
    assert trace.verify().ok and trace.topk.frame().equals(open_trace(alone).topk.frame())


def test_steps_are_visible_when_all_ranks_have_committed_them(both, tmp_path):
    write_parts(tmp_path / "a.zarr", n_steps=[6, 4, 5])
    trace, expected = open_trace(tmp_path / "a.zarr"), both[1]
    assert trace.n_steps == 4 and trace.n_occurrences == COUNTS[:4].sum()
    assert trace.verify().ok and trace.verify().n_steps == 4
    assert not trace.attrs["complete"] and trace.attrs["end_reason"] == "rank 1: stop at 4; rank 2: stop at 5"
    assert trace.topk.frame().equals(expected.topk.frame(steps=slice(0, 3)))
    assert trace.topk_step.frame().equals(expected.topk_step.frame(steps=slice(0, 3)))
    dense, whole = trace.dense["layers.0.bias"], expected.dense["layers.0.bias"]
    assert np.array_equal(dense[:], whole[: len(dense)]) and dense.occurrence.max() < trace.n_occurrences


def test_each_part_is_a_trace_and_the_root_alone_is_an_empty_one(both):
    trace, expected = both
    for rank, part in enumerate(trace.parts):
        assert part.verify().ok and part.parts == [part]
        mine = expected.occurrences[expected.occurrences["rank"] == rank]
        assert part.occurrences["sample_id"].tolist() == mine["sample_id"].tolist()
    root = Trace(trace.name)  # as a reader of format 1.0 sees it
    assert root.n_steps == root.n_occurrences == 0 and root.params.equals(expected.params)


def _edit(folder: Path, rank: int | None, change: Any) -> None:
    file = folder / "zarr.json" if rank is None else folder / "ranks" / str(rank) / "zarr.json"
    document = json.loads(file.read_text())
    change(document["attributes"])
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("ranks", [0, -1, 2.5, "2", True, None, 10**9])
def test_a_number_of_ranks_that_can_not_be_is_refused(ranks, tmp_path):
    write_parts(tmp_path / "a.zarr")
    _edit(tmp_path / "a.zarr", None, lambda attrs: attrs.update(ranks=ranks))
    with pytest.raises(StoreError, match=r"`ranks` is .*, expected a number of processes"):
        open_trace(tmp_path / "a.zarr")


def test_parts_that_do_not_belong_together_are_found(tmp_path):
    folder = tmp_path / "a.zarr"
    write_parts(folder)
    _edit(folder, 1, lambda attrs: attrs.update(run_id="another"))
    shutil.rmtree(folder / "ranks" / "2")
    shutil.copytree(folder / "ranks" / "0", folder / "ranks" / "2")
    report = open_trace(folder).verify()
    assert "rank 1: `run_id` is 'another', that of the trace is 'made up': it is of another run" in report.problems
    assert "rank 2: occurrence 0 names another rank" in report.problems


def test_a_damaged_chunk_is_named_with_its_rank(tmp_path):
    folder = tmp_path / "a.zarr"
    write_parts(folder)
    (folder / "ranks" / "1" / "topk" / "shift" / "c.0.0").write_bytes(b"nothing")
    trace = open_trace(folder)
    assert any(p.startswith("rank 1: `topk/shift` chunk 0/0") for p in trace.verify().problems)
    with pytest.raises(StoreError, match="`topk/shift` chunk 0/0"):
        trace.topk.frame()
    assert len(trace.topk_step.frame())


def test_a_missing_part_is_a_run_that_ended_at_its_beginning(tmp_path):
    write_parts(tmp_path / "a.zarr")
    shutil.rmtree(tmp_path / "a.zarr" / "ranks" / "2")
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.n_steps == 0 and not len(trace.topk.frame())
    assert any("parts of its 3 ranks were being created" in note for note in trace.verify().notes)


def test_values_of_a_step_that_differ_between_ranks_are_not_made_one(tmp_path, monkeypatch):
    folder = tmp_path / "a.zarr"
    write_parts(folder)
    trace = open_trace(folder)
    part = trace.parts[1]
    read = part.read
    monkeypatch.setattr(part, "read", lambda path, *rows: read(path, *rows) * (1 if "bias/gain" not in path else 1.01))
    with pytest.raises(StoreError, match=r"`gains/layers.0.bias/gain` differs between ranks"):
        trace.read("gains/layers.0.bias/gain")


def test_overwriting_leaves_nothing_of_the_other_kind(tmp_path):
    folder = tmp_path / "a.zarr"
    write_parts(folder)
    trace = write_trace(folder, writer={"overwrite": True})
    assert trace.verify().ok and not (folder / "ranks").exists() and trace.n_steps == 10

"""What goes into a writer comes out of a reader: ours, zarr's and xarray's."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from lightning_gradtrace.store import TraceWriter, open_trace
from tests.synthetic import Synthetic, params_table, write_trace

OPTIONS = {
    "n_steps": st.integers(0, 6),
    "batch": st.integers(1, 5),
    "k": st.integers(1, 8),
    "k_step": st.integers(1, 12),
    "n_samples": st.integers(1, 12),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    options=st.fixed_dictionaries(OPTIONS), chunk_rows=st.integers(1, 20), commit_bytes=st.sampled_from([0, 300, 10**9])
)
def test_trace_holds_what_was_appended_whatever_the_chunks_and_commits(options, chunk_rows, commit_bytes):
    content = Synthetic(per="both", **options)
    trace = write_trace(
        MemoryStore(),
        per="both",
        chunk_rows=chunk_rows,
        writer={"commit_bytes": commit_bytes, "commit_share": 1},
        **options,
    )
    steps = list(content.steps())
    assert trace.n_steps == len(steps) == len(trace.steps)
    assert trace.n_occurrences == len(trace.occurrences) == sum(len(s.occurrences["slot"]) for s in steps)
    for path in ("topk/index", "topk/shift", "topk_step/index", "topk_step/shift", "topk_step/occurrence"):
        if steps:
            expected = np.concatenate([step.records[path] for step in steps])
            np.testing.assert_array_equal(trace.array(path)[:], expected)
    for name in ("loss", "grad_norm", "residual", "epoch"):
        np.testing.assert_array_equal(trace.steps[name], [step.step[name] for step in steps])
    for name in ("slot", "sample_id", "rank", "micro_batch"):
        np.testing.assert_array_equal(
            trace.occurrences[name], np.concatenate([[], *(step.occurrences[name] for step in steps)])
        )
    assert trace.verify().ok, str(trace.verify())


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=3, max_size=3),
        min_size=1,
        max_size=6,
    )
)
def test_every_float_is_kept_bit_for_bit_also_nan_and_infinities(steps):
    store = MemoryStore()
    content = Synthetic(k=3)
    writer = TraceWriter(store, params=content.params, specs=content.specs(2), attrs={})
    one = np.zeros(1, np.int32)
    for number, shifts in enumerate(steps):
        records = {"topk/index": np.array([[1, 4, 7]], np.uint32), "topk/shift": np.array([shifts], np.float32)}
        occurrences = {"micro_batch": one, "slot": one, "rank": one, "sample_id": one}
        writer.append_step({"step": number, "loss": shifts[0]}, occurrences, records)
    writer.close(complete=True)
    found = np.asarray(open_trace(store).array("topk/shift")[:])
    np.testing.assert_array_equal(found.view(np.uint32), np.array(steps, np.float32).view(np.uint32))


@pytest.mark.parametrize("per", ["sample", "step"])
@pytest.mark.parametrize("max_bytes", [1, 500, 10**8])
def test_blocks_hold_every_kept_entry_once_and_in_bounds(make_trace, per, max_bytes):
    trace = make_trace(per=per, chunk_rows=4)
    blocks = list(trace.topk.blocks(max_bytes))
    frame = trace.topk.frame()
    for block in blocks:
        assert len(block) == len(block.occurrence) == len(block.entry) == len(block.shift)
        assert max_bytes == 1 or sum(a.nbytes for a in (block.occurrence, block.entry, block.shift)) <= max_bytes
    np.testing.assert_array_equal(np.concatenate([b.occurrence for b in blocks]), frame["occurrence"])
    np.testing.assert_array_equal(np.concatenate([b.shift for b in blocks]), frame["shift"])
    names = trace.entries(np.concatenate([b.entry for b in blocks]))
    assert names["param"].tolist() == frame["param"].tolist()
    np.testing.assert_array_equal(names["index"], frame["index"])


@pytest.mark.parametrize("per", ["sample", "step"])
def test_frame_is_the_plain_loop_over_the_steps(make_trace, per):
    content, trace = Synthetic(per=per), make_trace(per=per)
    params = content.params
    rows = []
    first = 0
    for step in content.steps():
        group = "topk" if per == "sample" else "topk_step"
        index, shift = step.records[f"{group}/index"], step.records[f"{group}/shift"]
        n = len(step.occurrences["slot"])
        owner = step.records.get(
            "topk_step/occurrence", np.arange(first, first + n)[:, None] + np.zeros_like(index, int)
        )
        for who, entry, value in zip(owner.ravel(), index.ravel(), shift.ravel(), strict=True):
            param = params[params["offset"] <= entry].iloc[-1]
            slot = int(who) - first
            sample = step.occurrences["sample_id"][slot]
            rows.append((step.step["step"], slot, sample, param["name"], int(entry) - param["offset"], value))
        first += n
    names = ["step", "slot", "sample_id", "param", "index", "shift"]
    expected = pd.DataFrame(rows, columns=names)
    assert trace.topk.per == per and list(trace.topk.frame().columns[:6]) == names
    for steps in (None, 3, [3, 7], range(2, 5), slice(2, 4), []):
        wanted = range(2, 5) if isinstance(steps, slice) else [steps] if isinstance(steps, int) else steps
        chosen = expected if wanted is None else expected[expected["step"].isin(wanted)]
        found = trace.topk.frame(steps)
        for name in names:
            assert found[name].tolist() == chosen[name].tolist(), (steps, name)


def test_tables_have_the_columns_of_the_contract(make_trace):
    trace = make_trace(per="both")
    assert list(trace.params.columns) == ["param", "shape", "numel", "offset", "kind", "module"]
    assert trace.params["shape"][0] == (6, 5)
    assert trace.steps.index.name == "step"
    assert {"epoch", "loss", "lr", "grad_norm", "clip_factor", "residual"} <= set(trace.steps.columns)
    assert list(trace.occurrences.columns) == ["step", "micro_batch", "slot", "rank", "sample_id"]
    assert trace.attrs["complete"] is True and trace.attrs["end_reason"] is None
    assert trace.attrs["config"] == {"seed": 0}
    assert trace.n_entries == 85
    assert trace.param("layers.0.linear2.weight")["offset"] == 30
    assert trace.records == ["topk", "topk_step"] and trace.topk.per == "sample" and trace.topk_step.k == 9


def test_learning_rates_of_several_groups_get_a_column_each():
    store, content = MemoryStore(), Synthetic()
    writer = TraceWriter(store, params=content.params, specs=[], attrs={}, n_groups=2)
    empty = np.zeros(0, np.int32)
    occurrences = {"micro_batch": empty, "slot": empty, "rank": empty, "sample_id": empty}
    writer.append_step({"step": 5, "lr": [0.1, 0.2]}, occurrences, {})
    writer.close(complete=True)
    steps = open_trace(store).steps
    assert steps.loc[5, ["lr", "lr_1"]].tolist() == [0.1, 0.2]
    assert np.isnan(steps.loc[5, "loss"]) and steps.loc[5, "n_occurrences"] == 0


def test_inputs_of_growing_width_are_padded(make_trace):
    store, content = MemoryStore(), Synthetic()
    writer = TraceWriter(store, params=content.params, specs=[], attrs={}, vocab=content.vocab)
    writer.append_samples(np.array([7]), np.array([[1, 2]]), np.array([2]))
    writer.flush()
    wide = np.arange(200) % 11
    writer.append_samples(np.array([3]), wide[None], np.array([200]))
    writer.append_samples(np.array([5]), np.array([[4]]), np.array([1]))
    writer.close(complete=True)
    trace = open_trace(store)
    sample_id, tokens = trace.tokens()
    assert sample_id.tolist() == [7, 3, 5] and tokens.shape == (3, 200)
    assert trace.inputs(7).tolist() == [1, 2]
    np.testing.assert_array_equal(trace.inputs([3, 5])[0], wide)
    assert trace.inputs([3, 5])[1].tolist() == [4] + [-1] * 199
    assert trace.text(7) == "word1 word2" and trace.vocab == content.vocab
    assert trace.verify().ok, str(trace.verify())


def test_inputs_survive_a_change_of_width_between_whole_chunks():
    store, content = MemoryStore(), Synthetic()
    writer = TraceWriter(store, params=content.params, specs=[], attrs={})
    rng = np.random.default_rng(0)
    expected = {}
    for start, width in ((0, 3), (5000, 70), (10000, 150), (15000, 2)):
        tokens = rng.integers(0, 9, (5000, width)).astype(np.int32)
        writer.append_samples(np.arange(start, start + 5000), tokens, np.full(5000, width))
        expected[start] = tokens
    writer.close(complete=True)
    trace = open_trace(store)
    for start, tokens in expected.items():
        found = trace.inputs(np.arange(start, start + 5000))
        np.testing.assert_array_equal(found[:, : tokens.shape[1]], tokens)
        assert (found[:, tokens.shape[1] :] == -1).all()
    assert trace.verify().ok, str(trace.verify())


def test_weight_snapshots_are_found_by_step(make_trace):
    trace, content = make_trace(weight_steps=(0, 4, 10)), Synthetic()
    assert trace.weight_steps.tolist() == [0, 4, 10]
    name = "layers.0.linear1.weight"
    np.testing.assert_array_equal(trace.weights(name, 4), content.weights(4)[name])
    np.testing.assert_array_equal(trace.weights(name), content.weights(10)[name])


def test_plain_zarr_reads_the_trace_without_this_package(tmp_path):
    trace = write_trace(tmp_path / "a.zarr", per="both", weight_steps=(0,))
    for consolidated in (None, False):
        group = zarr.open_group(tmp_path / "a.zarr", mode="r", use_consolidated=consolidated)
        assert group.attrs["encoding-type"] == "gradtrace"
        np.testing.assert_array_equal(group["topk/shift"][:], trace.array("topk/shift")[:])
        assert [str(name) for name in group["params/name"][:]] == trace.params["param"].tolist()
        assert {path.partition("/")[0] for path, _ in group.members(max_depth=None)} == {
            "params", "steps", "occurrences", "inputs", "topk", "topk_step", "weights"
        }  # fmt: skip


def test_xarray_reads_the_trace_without_this_package(tmp_path):
    trace = write_trace(tmp_path / "a.zarr", per="both", weight_steps=(0,))
    for chunks in (None, {}):
        data = xr.open_zarr(tmp_path / "a.zarr", group="topk", chunks=chunks)
        assert data["index"].dims == ("occurrence", "k") and data["index"].dtype == np.uint32
        np.testing.assert_array_equal(data["shift"].values, trace.array("topk/shift")[:])
        steps = xr.open_zarr(tmp_path / "a.zarr", group="steps", chunks=chunks)
        assert float(steps["loss"].sel(step=3)) == trace.steps.loc[3, "loss"]
        assert steps["skipped"].dtype == bool and steps["epoch"].dtype == np.int32
    tree = xr.open_datatree(tmp_path / "a.zarr", engine="zarr")
    assert str(tree["params/name"].values[1]) == "layers.0.linear2.weight"


def test_to_xarray_carries_coordinates_and_is_lazy(make_trace):
    trace = make_trace(per="both")
    tree = trace.to_xarray()
    assert tree["topk/shift"].chunks is not None
    assert tree["topk/shift"].attrs["long_name"] == "shift of the weight"
    frame = trace.topk.frame([3])
    chosen = tree["topk/shift"].where(tree["topk"].coords["step"] == 3, drop=True)
    np.testing.assert_array_equal(chosen.values.ravel(), frame["shift"])
    assert tree["topk_step/shift"].sel(step=4).shape == (9,)


def test_to_xarray_names_the_extra_when_xarray_is_missing(make_trace, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"xarray, which is not installed: pip install 'lightning-gradtrace\[xarray\]'"
    ):
        make_trace().to_xarray()


def test_metadata_is_strict_json(tmp_path):
    write_trace(tmp_path / "a.zarr", per="both", weight_steps=(0,))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    documents = list((tmp_path / "a.zarr").rglob("zarr.json"))
    assert len(documents) > 10
    for path in documents:
        assert json.loads(path.read_text(), parse_constant=refuse)["zarr_format"] == 3


def test_no_temporary_files_are_left(tmp_path):
    write_trace(tmp_path / "a.zarr", chunk_rows=3)
    assert not list((tmp_path / "a.zarr").rglob("*.partial"))


def test_params_of_any_shape_and_name_are_kept():
    table = params_table({"a": (), "b/c": (0, 3), "ü%": (2,)})
    store = MemoryStore()
    writer = TraceWriter(store, params=table, specs=[], attrs={})
    values = {name: np.zeros(shape, np.float32) for name, shape in zip(table["name"], table["shape"], strict=True)}
    writer.append_weights(0, values)
    writer.close(complete=True)
    trace = open_trace(store)
    assert trace.params["param"].tolist() == ["a", "b/c", "ü%"] and trace.params["shape"].tolist() == [(), (0, 3), (2,)]
    assert [trace.weights(name).shape for name in table["name"]] == [(), (0, 3), (2,)]
    assert trace.verify().ok, str(trace.verify())

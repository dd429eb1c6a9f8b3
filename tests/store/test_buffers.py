"""Rows on their way to the disk: what isn't compressed is not copied, and keeps nothing else in memory."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from lightning_gradtrace.store.buffers import ArrayBuffer
from lightning_gradtrace.store.codecs import array_document
from lightning_gradtrace.store.schema import ArraySpec
from lightning_gradtrace.store.target import json_put, put_all


def spec(codec: str = "none", inner_rows: int | None = 2, chunk_rows: int = 6) -> ArraySpec:
    return ArraySpec(
        "dense/w/shift",
        ("occurrence", "w.0"),
        (3,),
        "float32",
        "",
        codec=codec,  # type: ignore[arg-type]
        inner_rows=inner_rows,
        chunk_rows=chunk_rows,
    )


@given(
    lengths=st.lists(st.tuples(st.integers(0, 17), st.booleans()), min_size=1, max_size=8),
    codec=st.sampled_from(["none", "fast"]),
    inner_rows=st.sampled_from([None, 1, 2, 3, 6]),
)
@settings(max_examples=100, deadline=None)
def test_rows_in_any_portions_with_commits_between_are_read_as_they_came(lengths, codec, inner_rows):
    array, store, rng = ArrayBuffer(spec(codec, inner_rows)), MemoryStore(), np.random.default_rng(0)
    expected = np.empty((0, 3), np.float32)
    for n, commit in lengths:
        rows = rng.standard_normal((n, 3)).astype(np.float32)
        expected = np.concatenate([expected, rows])
        put_all(store, array.append(rows))
        if commit:
            put_all(store, array.tail())
    put_all(store, array.tail())
    put_all(store, [json_put("zarr.json", array_document(array.spec, len(expected)))])
    keys = {key: value for key, value in store._store_dict.items() if key != "zarr.json"}
    for key, value in keys.items():
        store._store_dict[key.removeprefix("dense/w/shift/")] = value
    np.testing.assert_array_equal(zarr.open_array(store, mode="r")[:], expected)


def test_rows_go_out_without_being_copied():
    rows = np.arange(18, dtype=np.float32).reshape(6, 3)
    ((_, parts),) = ArrayBuffer(spec()).append(rows)
    views = [np.frombuffer(part, np.uint8) for part in parts]
    assert sum(np.shares_memory(view, rows) for view in views) == 3, "one for each inner chunk"


@pytest.mark.parametrize("n", [1, 2, 5, 6, 8, 13, 100])
def test_rows_that_wait_keep_no_others_in_memory(n):
    array = ArrayBuffer(spec())
    rows = np.zeros((n, 3), np.float32)
    alive = weakref.ref(rows)
    list(array.append(rows))
    del rows
    assert alive() is None


def test_rows_that_wait_do_not_change_with_those_that_come_later():
    array = ArrayBuffer(spec(inner_rows=4, chunk_rows=8))
    first, second = (np.full((n, 3), n, np.float32) for n in (3, 5))
    assert not list(array.append(first))
    ((_, parts),) = array.append(second)
    found = np.concatenate([np.frombuffer(part, np.float32) for part in parts if len(part) == 48]).reshape(8, 3)
    third = list(array.append(np.full((5, 3), 7, np.float32)))
    assert not third and found[:3].tolist() == first.tolist() and found[3:].tolist() == second.tolist()

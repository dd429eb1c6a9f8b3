"""Other places than a directory: object stores with a bad connection, zip files, Parquet; and other readers."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import fsspec
import numpy as np
import pytest
import zarr
from zarr.storage import FsspecStore, MemoryStore

from lightning_gradtrace import Dense, Factored, Norms, Sketch, TopK
from lightning_gradtrace.record import Gains
from lightning_gradtrace.store import StoreError, TraceWriter, open_trace
from tests.record.steps import make_step, record_steps
from tests.store.s3 import Proxy, s3_server
from tests.store.test_resuming import N_STEPS, Run, assert_same_arrays
from tests.synthetic import Synthetic, write_trace

OPTIONS: dict[str, Any] = {"per": "both", "weight_steps": (0, 5), "chunk_rows": 5}
FEW: dict[str, Any] = {"n_steps": 3, "inputs": False}  # the server takes tens of milliseconds for a request
KEYS = {"key": "test", "secret": "test"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        s3 = fsspec.filesystem("s3", endpoint_url=url, **KEYS)
        s3.mkdir("traces")
        yield url


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch):
    """Say where S3 is, the way the docs say to."""

    def configure(url: str) -> None:
        options = {"endpoint_url": url, **KEYS}
        options["config_kwargs"] = {"retries": {"max_attempts": 1}, "connect_timeout": 5, "read_timeout": 20}
        monkeypatch.setitem(fsspec.config.conf, "s3", options)

    return configure


def test_s3_url_holds_the_same_trace_and_is_resumed(server, configure):
    configure(server)
    trace = write_trace("s3://traces/a.zarr", **FEW)
    assert trace.topk.frame().equals(write_trace(MemoryStore(), **FEW).topk.frame())
    assert trace.verify().ok
    with pytest.raises(StoreError, match="already holds a trace"):
        write_trace("s3://traces/a.zarr")
    run = Run("s3://traces/b.zarr", commit_bytes=10**6).go(0, 4)
    cursor = run.writer.cursor()
    run.go(4, 7).writer.close(complete=False)
    Run("s3://traces/b.zarr", resume=cursor, commit_bytes=10**6).go(4, N_STEPS).end()
    whole = MemoryStore()
    Run(whole).go(0, N_STEPS).end()
    assert_same_arrays(open_trace("s3://traces/b.zarr"), open_trace(whole))


def test_dropped_connections_and_slow_answers_lose_nothing(server, configure, monkeypatch):
    monkeypatch.setattr("lightning_gradtrace.store.target.RETRY_SECONDS", (0.01, 0.05, 0.2))
    proxy = Proxy(urlparse(server).port or 0, drop_every=9, delay=0.002)
    configure(proxy.url)
    trace = write_trace("s3://traces/c.zarr", **FEW)
    proxy.close()
    assert proxy.n_dropped >= 3
    configure(server)
    trace = open_trace("s3://traces/c.zarr")
    assert trace.attrs["complete"] and trace.verify().ok
    assert trace.topk.frame().equals(write_trace(MemoryStore(), **FEW).topk.frame())


def test_a_connection_that_stays_away_is_an_error_and_what_was_committed_stays(server, configure, monkeypatch):
    monkeypatch.setattr("lightning_gradtrace.store.target.RETRY_SECONDS", (0.01,))
    proxy = Proxy(urlparse(server).port or 0)
    configure(proxy.url)
    content = Synthetic()
    writer = TraceWriter("s3://traces/d.zarr", params=content.params, specs=content.specs(), attrs={})
    steps = list(content.steps())
    for step in steps[:2]:
        writer.append_step(step.step, step.occurrences, step.records)
    writer.flush()
    proxy.drop_every = 1
    writer.append_step(steps[2].step, steps[2].occurrences, steps[2].records)
    with pytest.raises(
        StoreError, match=r"writing the trace `s3://traces/d\.zarr` failed: .*; its first 2 steps are on"
    ):
        writer.flush()
    writer.close(complete=False)
    proxy.close()
    configure(server)
    assert open_trace("s3://traces/d.zarr").n_steps == 2 and open_trace("s3://traces/d.zarr").verify().ok


def test_a_store_object_carries_its_own_options(server):
    store = FsspecStore.from_url("s3://traces/e.zarr", storage_options={"endpoint_url": server, **KEYS})
    assert write_trace(store).verify().ok


@pytest.mark.parametrize("place", ["memory", "s3"])
def test_the_first_of_two_runs_into_one_remote_path_is_told(place, server, configure):
    configure(server)
    target: Any = MemoryStore() if place == "memory" else "s3://traces/f.zarr"
    content = Synthetic()
    step = next(iter(content.steps()))
    first = TraceWriter(target, params=content.params, specs=content.specs(), attrs={"run_id": "1"})
    second = TraceWriter(target, params=content.params, specs=content.specs(), attrs={"run_id": "2"}, overwrite=True)
    first.append_step(step.step, step.occurrences, step.records)
    with pytest.raises(StoreError, match=r"another run, or somebody, has replaced the trace .* expected one run for"):
        first.flush()
    first.close(complete=False)
    second.append_step(step.step, step.occurrences, step.records)
    second.close(complete=True)
    trace = open_trace(target)
    assert trace.attrs["run_id"] == "2" and trace.attrs["complete"] and trace.verify().ok


def test_a_packed_trace_is_the_same_trace(tmp_path):
    trace = write_trace(tmp_path / "a.zarr", **OPTIONS)
    (tmp_path / "a.zarr" / "notes.txt").write_text("mine")
    packed = open_trace(trace.to_zip(tmp_path / "a.zip"))
    assert_same_arrays(packed, trace)
    assert packed.attrs == trace.attrs
    packed.store.close()
    assert "notes.txt" not in zipfile.ZipFile(tmp_path / "a.zip").namelist()
    with pytest.raises(StoreError, match=r"a\.zip` exists; pass overwrite=True to replace the file"):
        trace.to_zip(tmp_path / "a.zip")
    trace.to_zip(tmp_path / "a.zip", overwrite=True)
    with pytest.raises(StoreError, match=r"a\.tar` doesn't end in \.zip"):
        trace.to_zip(tmp_path / "a.tar")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr", "a.zip"]


def test_parquet_files_hold_the_tables_and_every_kept_entry(tmp_path):
    import pyarrow.parquet as pq

    trace = write_trace(tmp_path / "a.zarr", **OPTIONS)
    files = trace.to_parquet(tmp_path / "p")
    assert [file.name for file in files] == [
        "params.parquet",
        "steps.parquet",
        "occurrences.parquet",
        "topk.parquet",
        "topk_step.parquet",
    ]
    tables = {file.stem: pq.read_table(file).to_pandas() for file in files}
    for name in ("topk", "topk_step"):
        expected = trace.using(name).topk.frame()[list(tables[name].columns)]
        for column in expected:
            assert tables[name][column].tolist() == expected[column].tolist(), column
    np.testing.assert_array_equal(tables["steps"]["loss"], trace.steps["loss"])
    np.testing.assert_array_equal(tables["occurrences"]["sample_id"], trace.occurrences["sample_id"])
    assert [tuple(shape) for shape in tables["params"]["shape"]] == trace.params["shape"].tolist()
    assert b'"run"' not in pq.read_schema(files[0]).metadata[b"gradtrace"]
    with pytest.raises(StoreError, match=r"already holds params\.parquet, "):
        trace.to_parquet(tmp_path / "p")
    assert len(write_trace(tmp_path / "b.zarr", n_steps=0).to_parquet(tmp_path / "q")) == 4


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace with every kind of record, and with every codec."""
    path = tmp_path_factory.mktemp("everything") / "a.zarr"
    steps = [make_step(number, [3, 2], [3, 4], gains=number == 2) for number in range(4)]
    kinds = [TopK(5), TopK(7, per="step", schedule=2), Factored("factors"), Sketch(4), Norms(schedule=2), Gains()]
    for codec in ("none", "fast", "small"):
        records = [*kinds, Dense(codec=codec)]  # type: ignore[arg-type]
        record_steps(path.with_name(f"{codec}.zarr"), records, steps, vocab=["a", "b"])
    return path.parent


@pytest.mark.parametrize("codec", ["none", "fast", "small"])
def test_every_array_is_read_alike_by_zarr_dask_xarray_and_tensorstore(everything, codec):
    import dask.array
    import tensorstore
    import xarray

    path = everything / f"{codec}.zarr"
    trace = open_trace(path)
    assert trace.verify().ok
    members = dict(trace.group.members(max_depth=None))
    arrays = {name: array for name, array in members.items() if isinstance(array, zarr.Array)}
    assert len(arrays) > 60 and any(array.shards is not None for array in arrays.values())
    with xarray.open_datatree(path, engine="zarr", zarr_format=3) as tree:
        for name, array in arrays.items():
            expected = trace.read(name)
            np.testing.assert_array_equal(array[:], expected, err_msg=name)
            np.testing.assert_array_equal(tree[name].values, expected, err_msg=name)
            if expected.dtype == object:
                continue  # text: an extension that neither of the others knows
            np.testing.assert_array_equal(dask.array.from_zarr(str(path), component=name).compute(), expected)
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
            np.testing.assert_array_equal(tensorstore.open(spec, read=True).result().read().result(), expected)
    with xarray.open_zarr(path, group="topk", zarr_format=3) as dataset:
        assert dataset["shift"].dims == ("occurrence", "k")


def test_back_pressure_is_said_once(monkeypatch, caplog):
    import time

    from lightning_gradtrace.store.commit import Committer

    original = Committer.append
    content = Synthetic()
    writer = TraceWriter(MemoryStore(), params=content.params, specs=content.specs(), attrs={}, queue_bytes=1500)

    def slow(self, rows):
        time.sleep(0.01)
        original(self, rows)

    monkeypatch.setattr(Committer, "append", slow)
    with caplog.at_level(logging.WARNING, logger="lightning_gradtrace"):
        for step in content.steps():
            writer.append_step(step.step, step.occurrences, step.records)
        writer.close(complete=True)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and said[0].startswith("the training waits for the trace: over 0 MB are queued")

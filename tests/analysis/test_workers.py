"""A dask cluster of two workers returns what one process does."""

from __future__ import annotations

import pandas as pd
import pytest

from lightning_gradtrace.analysis import count_entries, frequent_entries, neurons, notable_tokens
from lightning_gradtrace.store import open_trace
from tests.synthetic import write_trace


@pytest.fixture(scope="module")
def client():
    from dask.distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize("per", ["sample", "step"])
def test_two_workers_return_what_one_process_does(client, tmp_path, per):
    write_trace(tmp_path / "a.zarr", per=per, n_steps=30, n_samples=40)
    trace = open_trace(tmp_path / "a.zarr")
    steps = slice(3, 27)
    pd.testing.assert_frame_equal(count_entries(trace, client=client), count_entries(trace))
    entries = frequent_entries(trace, 30, steps)
    pd.testing.assert_frame_equal(frequent_entries(trace, 30, steps, client=client), entries)
    for options in ({}, {"method": "hypergeometric", "by": "neuron"}, {"method": "kl", "weight": "shift"}):
        alone = notable_tokens(trace, entries, min_count=2, steps=steps, **options)
        assert len(alone) > 10
        shared = notable_tokens(trace, entries, min_count=2, steps=steps, client=client, **options)
        pd.testing.assert_frame_equal(shared, alone, rtol=1e-9)
    notable = notable_tokens(trace, entries, min_count=2)
    pd.testing.assert_frame_equal(neurons(trace, entries, notable, client=client), neurons(trace, entries, notable))


def test_something_else_is_refused(tmp_path):
    trace = write_trace(tmp_path / "a.zarr")
    with pytest.raises(TypeError, match=r"`client` is a int, expected a `dask.distributed.Client`, or None"):
        count_entries(trace, client=2)

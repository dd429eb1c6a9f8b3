"""A dask cluster of two workers returns what one process does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace import Dense, Factored, GradTrace, TokenGrads, analysis, open_trace
from lightning_gradtrace.analysis import (
    attributed_samples,
    count_entries,
    direction_shifts,
    frequent_entries,
    head_shifts,
    movement,
    movers,
    neurons,
    notable_tokens,
    outliers,
    principal_directions,
    weight_change,
)
from tests.analysis.test_head_records import ResearchModel
from tests.analysis.traces import write_trace as write_lists
from tests.synthetic import write_trace
from tests.test_callback import fit


@pytest.fixture(scope="module")
def client():
    from dask.distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
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


def heads_trace(path):
    """Two heads of queries and keys, with weights before, in the middle of and after twelve steps."""
    rng = np.random.default_rng(0)
    shapes = {f"attention.W_{part}": (2, 4, 2) for part in "QK"} | {"mlp.weight": (4, 6)}
    index = np.stack([np.sort(rng.permutation(56)[:9]) for _ in range(60)])
    weights = {step: {name: rng.normal(size=shape) for name, shape in shapes.items()} for step in (0, 6, 12)}
    sample_id = np.stack([rng.permutation(20)[:5] for _ in range(12)])
    return write_lists(shapes, sample_id, index, shift=rng.normal(size=(60, 9)), weights=weights, to=path)


SCANS = {
    "outliers of steps": lambda t, **o: outliers(t, "step", n=3, **o),
    "outliers of samples": lambda t, **o: outliers(t, "sample", n=2, normalise="series", min_count=3, **o),
    "outliers of neurons": lambda t, **o: outliers(t, "neuron", normalise="neuron", **o),
    "outliers of entries": lambda t, **o: outliers(t, "entry", n=1, normalise="param", **o),
    "movement": lambda t, **o: movement(t, by="neuron", every=2, **o),
    "movers": lambda t, **o: movers(t, by="param", n=4, **o),
    "attributed samples": lambda t, **o: attributed_samples(
        t, np.arange(56), pd.DataFrame({"param": "mlp.weight", "axis": ["in", "out"], "neuron": [3, 1]}), **o
    ),
    "head shifts": lambda t, **o: head_shifts(t, along=weight_change(t), **o),
    "shifts along directions": lambda t, **o: direction_shifts(t, "mlp.weight", np.eye(6)[:2], **o),
    "shifts along weights": lambda t, **o: direction_shifts(t, "attention.W_Q", np.ones((2, 4, 2)), "weight", **o),
    "principal directions": lambda t, **o: principal_directions(t, "mlp.weight", 3, "out", **o)[1],
}


@pytest.mark.parametrize("steps", [None, slice(2, 9), [3]], ids=["all", "range", "one"])
@pytest.mark.parametrize("name", SCANS)
def test_every_analysis_that_reads_the_record_shares_the_work(name, steps, client, tmp_path):
    trace = heads_trace(tmp_path / "h.zarr")
    alone = SCANS[name](trace, steps=steps)
    assert len(alone) > 1
    pd.testing.assert_frame_equal(SCANS[name](trace, steps=steps, client=client), alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("record", ["dense", "factored", "token_grads"])
def test_records_of_a_training_are_shared_out_too(record, client, tmp_path):
    records = [Dense(), Factored(), TokenGrads(k=30, slots=2)]
    fit(ResearchModel(), GradTrace(tmp_path / "a.zarr", records, params="attn.W_[QKVO]"), gradient_clip_val=None)
    trace = open_trace(tmp_path / "a.zarr")
    alone, shared = (head_shifts(trace, record=record, **options) for options in ({}, {"client": client}))
    assert len(alone) > 100
    pd.testing.assert_frame_equal(shared, alone, rtol=1e-6)
    if record != "token_grads":
        direction = np.ones(trace.param("attn.W_Q")["shape"])
        one, other = (
            direction_shifts(trace, "attn.W_Q", direction, "weight", record=record, **options)
            for options in ({}, {"client": client})
        )
        pd.testing.assert_frame_equal(one, other, rtol=1e-6)


def test_every_analysis_with_a_client_is_asked_with_one():
    functions = {name for name, f in vars(analysis).items() if inspect.isfunction(f)}
    named = {name for name in functions if "client" in inspect.signature(getattr(analysis, name)).parameters}
    asked = set(re.findall(r"\b(\w+)\(\s*(?:t|trace)\b", Path(__file__).read_text(encoding="utf-8")))
    assert named <= asked | {"components"}  # which `neurons` calls


def test_something_else_is_refused(tmp_path):
    trace = write_trace(tmp_path / "a.zarr")
    with pytest.raises(TypeError, match=r"`client` is a int, expected a `dask.distributed.Client`, or None"):
        count_entries(trace, client=2)

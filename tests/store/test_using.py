"""A trace with both selections can be read through either."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_gradtrace import open_trace
from tests.synthetic import write_trace


def test_using_chooses_the_record_that_analyses_read(tmp_path) -> None:
    write_trace(tmp_path / "a.zarr", n_steps=4, per="both", seed=0)
    trace = open_trace(tmp_path / "a.zarr")
    assert (trace.topk.per, trace.using("topk_step").topk.per, trace.using("topk").topk.per) == (
        "sample",
        "step",
        "sample",
    )
    assert trace.topk.per == "sample"
    a, b = (np.concatenate([block.entry for block in t.topk.blocks()]) for t in (trace, trace.using("topk")))
    np.testing.assert_array_equal(a, b)


def test_a_record_that_is_not_there_is_named(tmp_path) -> None:
    write_trace(tmp_path / "a.zarr", n_steps=2, per="sample", seed=0)
    with pytest.raises(AttributeError, match="this trace holds no `topk_step` record; it holds: topk"):
        open_trace(tmp_path / "a.zarr").using("topk_step")

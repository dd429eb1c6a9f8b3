"""What a notebook shows of a trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.analysis.traces import random_trace, write_trace


def test_a_notebook_shows_summary_steps_and_records() -> None:
    text = random_trace().trace._repr_html_()
    for part in ("12 (0 to 11)", ">60<", ">topk<", "43 in 5 parameters", ">complete<", "a.weight", "3 x 4", ">15<"):
        assert part in text, part


def test_names_are_escaped_and_long_lists_are_cut(tmp_path: Path) -> None:
    shapes = {f"layer{n}.<b>": (2,) for n in range(20)}
    trace = write_trace(shapes, np.zeros((1, 1), int), np.array([[0]]), to=tmp_path / "<i>.zarr")
    text = trace._repr_html_()
    assert "<b>" not in text and "<i>" not in text and "layer0.&lt;b&gt;" in text
    assert "layer11." in text and "layer12." not in text and "and 8 more" in text


def test_a_trace_without_a_step_shows_itself_too(tmp_path: Path) -> None:
    trace = write_trace({"a": (2,)}, np.zeros((0, 1), int), np.zeros((0, 1), int), to=tmp_path / "a.zarr")
    assert "0 steps" not in trace._repr_html_() and ">unknown<" in trace._repr_html_()

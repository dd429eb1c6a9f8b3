"""The command measures what it says and writes tables that can be read back."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning

from benchmarks import overhead, scaling, timing
from benchmarks.output import markdown
from benchmarks.workloads import TINY, Setting


@pytest.fixture(autouse=True)
def quiet():
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)


def run(tmp_path, *arguments: str) -> dict:
    path = tmp_path / "found.json"
    overhead.main(["--workload", "tiny", "--steps", "2", "--rounds", "2", "--json", str(path), *arguments])
    return json.loads(path.read_text(encoding="utf-8"))


def test_times_are_those_of_the_rounds(tmp_path, capsys) -> None:
    found = run(tmp_path, "--only", "TopK(7)", "--k", "7", "--threads", "1", "--optimizer", "adamw")
    name = "GradTrace, TopK(7)"
    assert found["machine"]["threads"] == 1 and found["optimizer"] == "adamw"
    rounds = found["rounds"]
    assert set(rounds) == {"plain", name} and len(rounds["plain"]) == 2
    ratios = np.array(rounds[name]) / np.array(rounds["plain"])
    row = found["times"][name]
    assert row["x plain"] == pytest.approx(np.median(ratios))
    assert (row["lowest"], row["highest"]) == pytest.approx((ratios.min(), ratios.max()))
    printed = capsys.readouterr().out
    assert f"| {name} | {row['seconds per step']:.3f} | {row['x plain']:.3f} |" in printed
    assert "threads 1, torch" in printed and "workload tiny, adamw, cpu" in printed


def test_scaling_has_a_row_for_every_size(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(scaling, "FACTORS", (1.0, 2.0))
    rows = run(tmp_path, "--scaling", "length", "k", "--k", "4")["scaling"]
    assert [(row["axis"], row["size"]) for row in rows] == [("length", 5), ("length", 10), ("k", 4), ("k", 8)]
    assert all(row["plain, s"] > 0 and row["x plain"] > 0 for row in rows)


def test_peak_memory_is_that_of_the_process() -> None:
    warnings.simplefilter("ignore", PossibleUserWarning)
    setting = Setting(TINY, steps=2, k=5)
    assert timing.alone(setting, setting.ours) > 50  # importing torch alone takes more
    held = torch.ones(40 * 2**18)  # 40 MB
    assert timing.alone(setting, "plain") > held.numel() * 4 / 2**20


def test_peers_that_do_not_know_the_model_are_named_with_the_reason(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(overhead.WORKLOADS, "tiny", replace(TINY, reference=True))
    found = run(tmp_path, "--only", "dattri")
    assert "nn.MultiheadAttention" in found["not available"]["dattri-llm collection, capture only"]
    assert "not available: dattri-llm" in capsys.readouterr().out


def test_a_table_in_markdown_has_its_numbers_and_what_is_missing() -> None:
    frame = pd.DataFrame({"peak MB": [100.0, np.nan]}, index=["plain", "a peer"])
    expected = "| | peak MB |\n|---|---|\n| plain | 100 |\n| a peer | not available |"
    assert markdown(frame, 0) == expected
    assert markdown(pd.DataFrame({"axis": ["k"], "size": [5]})) == "| axis | size |\n|---|---|\n| k | 5 |"

"""Tables to CSV and back, and the summaries read off them."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from lightning_gradtrace.report import neuron_summary, read_tables, result_text, run_summary, write_report, write_tables
from lightning_gradtrace.report.summary import count_clear

Tables = dict[str, pd.DataFrame]


def test_csv_round_trip_keeps_tokens_of_any_kind(tables: Tables, tmp_path: Path) -> None:
    write_tables(tmp_path, tables)
    again = read_tables(tmp_path)
    assert list(again) == list(tables)
    for name, table in tables.items():
        pd.testing.assert_frame_equal(again[name], table, check_dtype=False, check_exact=True, obj=name)


def test_empty_tables_survive_the_round_trip(empty: Tables, tmp_path: Path) -> None:
    write_tables(tmp_path, empty)
    assert all(read_tables(tmp_path)[name].empty for name in empty)


def test_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds none of \['run.csv', .*give the folder that `write_tables`"):
        read_tables(tmp_path)


def test_missing_and_unknown_tables_are_named(tables: Tables, tmp_path: Path) -> None:
    tables["extra"] = tables.pop("layers")
    with pytest.raises(ValueError, match=r"of which \['extra'\] are unknown and \['layers'\] are missing"):
        write_report(tmp_path, tables, title="run")
    assert not any(tmp_path.iterdir())


def test_missing_column_is_named(tables: Tables, tmp_path: Path) -> None:
    tables["controls"] = tables["controls"].drop(columns="low")
    with pytest.raises(ValueError, match=r"table `controls` has the columns .*, but lacks \['low'\]"):
        write_report(tmp_path, tables, title="run")


def test_neuron_summary_has_one_row_per_ablated_neuron_with_all_controls(tables: Tables) -> None:
    summary = neuron_summary(tables["neurons"], tables["controls"], n_tokens=2)
    assert summary["neuron"].tolist() == [3, 5, 8]
    assert summary["tokens_shown"].tolist()[1:] == ["$x^$", "plain"]
    assert summary["random_effect"].isna().tolist() == [False, False, True]
    assert summary[["neuron_low", "frequency_low", "null_low"]].notna().all(axis=None)
    assert count_clear(summary) == (1, 0, 2)


def test_result_text_shows_neuron_tokens_and_interval(tables: Tables) -> None:
    lines = result_text(tables).splitlines()
    headings = [
        "parameter",
        "neuron",
        "samples",
        "notable tokens",
        "attributed",
        "random",
        "difference [95 % interval]",
    ]
    assert re.split(r"  +", lines[0]) == headings
    assert "1.linear2  column 5  20       $x^$" in lines[3]
    assert lines[3].endswith("0.500       0.200   +0.300 [-0.100, +0.400]")
    assert result_text(tables, n_neurons=1).endswith("(2 more)")


def test_run_summary_reports_the_ledger(tables: Tables) -> None:
    attrs = {
        "complete": False,
        "end_reason": "ValueError: stop",
        "model": {"class": "package.Model", "n_parameters": 12345},
        "optimizer": [{"class": "torch.optim.sgd.SGD", "groups": [{"lr": 5.0}]}],
    }
    table = run_summary(attrs, tables["steps"], {"seed": 3})
    rows = dict(zip(table["name"], table["value"], strict=True))
    assert table["name"].iloc[0] == "seed"
    assert rows["trace"] == "incomplete: ValueError: stop"
    assert rows["ledger, largest residual"] == "1.0e-06"
    assert rows["ledger, steps checked"] == "4"
    assert (rows["steps"], rows["occurrences"]) == ("100", "2,000")
    assert (rows["model"], rows["parameters of the model"]) == ("Model", "12,345")
    assert rows["optimizer"] == "SGD, learning rate 5 at first"


def test_run_summary_without_a_checked_step_says_so(tables: Tables) -> None:
    table = run_summary({"complete": True}, tables["steps"].assign(residual=float("nan")))
    assert "never computed" in table["value"].tolist()

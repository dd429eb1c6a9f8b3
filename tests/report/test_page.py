"""The report holds what the tables say, escapes it, and needs nothing else."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace.report import TABLES, ReportFiles, read_tables, write_page, write_report
from lightning_gradtrace.report.figures import FIGURES
from lightning_gradtrace.report.theme import DARK, LIGHT, theme
from tests.report.conftest import make_page_tables, make_tables

Tables = dict[str, pd.DataFrame]


class Reader(HTMLParser):
    """Collects tags, the text and the cells of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    return write_report(tmp_path_factory.mktemp("report") / "new", make_tables(), title="<i>run</i>")


@pytest.fixture(scope="module")
def reader(files: ReportFiles) -> Reader:
    return read(files.page)


def test_report_writes_every_table_figure_and_one_page(files: ReportFiles) -> None:
    assert {file.stem for file in files.tables} == {name for name, spec in TABLES.items() if not spec.optional}
    assert {file.stem for file in files.figures} == set(FIGURES)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files.figures)


def data_of(page: Path) -> dict:
    return json.loads(page.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0])


def test_tokens_and_names_are_escaped(files: ReportFiles, reader: Reader) -> None:
    assert not {"b", "i"} & {tag for tag, _ in reader.tags}
    assert [tag for tag, _ in reader.tags].count("script") == 2
    assert "<b>bold</b>" in reader.text and "<i>run</i>" in reader.text
    assert "<script>alert('x')</script>" in data_of(files.page)["words"]


def test_no_text_ends_the_data(tmp_path: Path) -> None:
    words = ("</script>", "<!--<script>", "]]>", "&amp;", "\u2028", "{{script}}", "\ud800", "\x00", "\\1")
    page = write_page(tmp_path / "new" / "page.html", make_page_tables(words), title="{{data}}")
    data = data_of(page)
    assert [data["words"][word] for word in data["neurons"][0]["t"]] == list(words)
    assert [tag for tag, _ in read(page).tags].count("script") == 2
    assert "<h1>{{data}}</h1>" in page.read_text(encoding="utf-8")


def test_page_says_first_how_many_intervals_are_clear_and_holds_the_tables(files: ReportFiles, reader: Reader) -> None:
    data = data_of(files.page)
    assert "Switched off, 1 of 2 neurons flip the predictions of their words more often" in reader.text
    assert data["layers"][0]["share"] == "0.472222"
    assert (
        data["pooled"][0]["effect"] == "+0.300 [0.000, +0.400]"
    )  # of the three intervals one is missing, the others begin at 0.1 and -0.1
    three = data["neurons"][0]
    assert (three["s"], three["c"]["random"]) == (1200, [0.5, 0.2, 0.3, 0.1, 0.4])
    assert data["neurons"][2]["c"]["random"] == [None] * 5


def test_texts_are_stored_once_and_only_where_a_neuron_shows_them(tmp_path: Path) -> None:
    tables = make_page_tables()
    tables["texts"] = pd.DataFrame({"sample_id": [1, 99], "text": [("one", "two", "one"), ("unseen",)]})
    data = data_of(write_page(tmp_path / "page.html", tables, title="t"))
    assert [[data["words"][w] for w in text] for text in data["texts"].values()] == [["one", "two", "one"]]
    assert "unseen" not in data["words"]
    assert data["neurons"][0]["x"] == [[1, 0.5], [2, 0.25]]
    assert data["neurons"][0]["l"] == [1.5, 2.5] and data["bins"] == [0, 50]
    assert data["map"] == [{"p": 0, "a": "in", "m": [0.0, 0.0, 0.0, 4.0, 0.0, 3.0]}]


def test_long_runs_are_thinned_to_means(tables: Tables, tmp_path: Path) -> None:
    n = 10_001
    tables["steps"] = pd.DataFrame(
        {"step": range(n), "epoch": 0, "loss": np.arange(n, dtype=float), "residual": np.nan}
    )
    step, loss = data_of(write_page(tmp_path / "page.html", tables, title="t"))["loss"]
    assert len(step) == len(loss) <= 2000
    assert (step[1], loss[0], loss[1]) == (6, 2.5, 8.5)


def test_page_holds_the_phases(tmp_path: Path) -> None:
    page = write_page(tmp_path / "p.html", make_page_tables(), "phases")
    assert data_of(page)["phases"] == [[38, 41, 5, 9, 0.75, "loss, shift_norm"]]


def test_empty_tables_give_a_page_that_says_so(empty: Tables, tmp_path: Path) -> None:
    files = write_report(tmp_path, empty, title="nothing")
    assert data_of(files.page)["neurons"] == []
    assert "None of the 0 neurons has notable words" in read(files.page).text
    assert len(files.figures) == len(FIGURES)


def test_missing_table_of_the_page_is_named(tables: Tables, tmp_path: Path) -> None:
    del tables["neurons"]
    with pytest.raises(ValueError, match=r"\['neurons'\] are missing"):
        write_page(tmp_path / "page.html", tables, title="t")
    assert not any(tmp_path.iterdir())


def test_report_is_made_again_from_its_csv_files_byte_for_byte(files: ReportFiles) -> None:
    before = files.page.read_bytes()
    folder = files.page.parent
    again = write_report(folder, read_tables(folder / "tables"), title="<i>run</i>")
    assert again == files
    assert again.page.read_bytes() == before


def test_figures_leave_matplotlib_as_it_was(tables: Tables) -> None:
    before = dict(mpl.rcParams)
    with theme(DARK):
        figure = FIGURES["training"](tables, DARK)
    assert dict(mpl.rcParams) == before
    assert figure.get_facecolor() != mpl.colors.to_rgba(LIGHT.paper)


def test_missing_extra_is_named(tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    need = r"figures need matplotlib, which is not installed: `pip install 'lightning-gradtrace\[plot\]'`"
    with pytest.raises(ImportError, match=need):
        write_report(tmp_path, tables, title="run")
    assert write_page(tmp_path / "page.html", tables, title="the page needs nothing").is_file()

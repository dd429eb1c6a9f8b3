"""The report holds what the tables say, escapes it, and needs nothing else."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest

from lightning_gradtrace.report import TABLES, ReportFiles, read_tables, write_report
from lightning_gradtrace.report.figures import FIGURES
from lightning_gradtrace.report.theme import DARK, LIGHT, theme
from tests.report.conftest import make_tables

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
    assert {file.stem for file in files.tables} == set(TABLES)
    assert {file.stem for file in files.figures} == set(FIGURES)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files.figures)


def test_tokens_and_names_are_escaped(reader: Reader) -> None:
    assert not {"script", "b", "i"} & {tag for tag, _ in reader.tags}
    for text in ("<script>alert('x')</script>", "<b>bold</b>", "<i>run</i>", "naïve"):
        assert text in reader.text


def test_page_needs_no_other_file(reader: Reader) -> None:
    links = [v for _, attrs in reader.tags for k, v in attrs.items() if k in ("src", "href", "srcset")]
    assert len(links) == 2 * len(FIGURES)
    assert all(str(link).startswith("data:image/png;base64,") for link in links)
    assert len(set(links)) == len(links)
    assert not [tag for tag, _ in reader.tags if tag in ("link", "iframe", "script")]
    assert "@import" not in reader.text


def test_every_image_has_a_text_and_a_dark_version(reader: Reader) -> None:
    assert all(attrs["alt"] for tag, attrs in reader.tags if tag == "img")
    assert all(attrs["media"] == "(prefers-color-scheme: dark)" for tag, attrs in reader.tags if tag == "source")
    assert "@media (prefers-color-scheme: dark)" in reader.text


def test_page_says_how_many_intervals_are_clear_and_how_many_chance_gives(reader: Reader) -> None:
    text = re.sub(r"\s+", " ", reader.text)
    assert "3 neurons were switched off. For 1 of the 2 with an interval" in text
    assert "for 0 less often" in text
    assert "+0.300 [+0.100, +0.400]" in text
    assert "0.472222" in text
    assert "1,200" in text


def test_empty_tables_give_a_page_that_says_so(empty: Tables, tmp_path: Path) -> None:
    files = write_report(tmp_path, empty, title="nothing")
    assert "No neuron was switched off" in read(files.page).text
    assert len(files.figures) == len(FIGURES)


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


@pytest.mark.parametrize(
    ("module", "need"), [("matplotlib.figure", "figures need matplotlib"), ("jinja2", "the page needs jinja2")]
)
def test_missing_extra_is_named(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, need: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"{need}, which is not installed: `pip install 'lightning-gradtrace\[plot\]'`"
    ):
        write_report(tmp_path, tables, title="run")

"""The page in a real browser: what a reader sees and reaches, with hostile tokens and at full size."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace.report import write_page
from tests.report.browser import dump
from tests.report.conftest import WEIGHTS, make_page_tables
from tests.report.test_page import Reader

HOSTILE = (
    "</script><script>document.title='gone'</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "\u2028",
    "\n",
    "\u202eabc",
)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "a b#c?.html", make_page_tables(HOSTILE), "<i>run</i> & more")


def tags(reader: Reader, name: str) -> list[dict[str, str | None]]:
    return [attrs for tag, attrs in reader.tags if tag == name]


def rows(html: str) -> list[str]:
    """Return the text of the first cell of every row of the list."""
    body = html.partition('id="list"')[2].partition("<tbody>")[2].partition("</tbody>")[0]
    return re.findall(r'<th scope="row"><a [^>]*>([^<]*)</a>', body)


def detail(html: str) -> str:
    return html.partition('<article id="detail"')[2].partition("</article>")[0]


def test_hostile_tokens_are_text_and_nothing_else(page: Path) -> None:
    html = dump(page)
    reader = read(html)
    assert "data-ready=" in html
    assert not tags(reader, "img") and not tags(reader, "i")
    assert len(tags(reader, "script")) == 2
    assert "<title>&lt;i&gt;run&lt;/i&gt; &amp; more</title>" in html
    assert "&lt;/script&gt;&lt;script&gt;document.title='gone'&lt;/script&gt;" in html


def test_page_loads_nothing(page: Path) -> None:
    reader = read(dump(page))
    assert not [t for t, attrs in reader.tags if t in ("link", "iframe", "img", "object") or "src" in attrs]
    (policy,) = [a["content"] for a in tags(reader, "meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'")


def test_detail_shows_words_samples_time_flips_and_controls(page: Path) -> None:
    shown = detail(dump(page, urlencode({"n": f"{WEIGHTS[1]}~in~3"})))
    assert "1.linear2 column 3" in shown
    for heading in ("Notable words", "When it moved", "Switched off", "Samples that moved it most"):
        assert f"<h4>{heading}</h4>" in shown
    assert "<mark" in shown.partition("Samples that moved it most")[2]
    assert "random samples" in shown and "+0.300" in shown and "Flipped predictions" in shown
    assert "sample 1," in shown and "no text stored" in shown


def test_the_address_holds_search_sort_and_neuron(page: Path) -> None:
    everything = rows(dump(page))
    assert everything == ["1.linear2 column 3", "1.linear2 column 5", "1.linear2 column 8", "1.linear2 column 9"]
    assert rows(dump(page, urlencode({"q": "PLAIN"}))) == ["1.linear2 column 8"]
    assert rows(dump(page, urlencode({"sort": "s", "dir": "asc"}))) == everything[::-1]
    html = dump(page, urlencode({"sort": "s", "n": f"{WEIGHTS[1]}~in~8", "q": "linear2"}))
    assert "1.linear2 column 8</h3>" in html and re.search(r'aria-sort="descending"><button[^>]*id="sort-s"', html)


@pytest.mark.parametrize(
    "fragment", ["n=none", "sort=__proto__&dir=up", "p=99&colour=x", "%", "q=%3Cimg%20src=x%3E", "="]
)
def test_addresses_that_mean_nothing_show_the_page(page: Path, fragment: str) -> None:
    html = dump(page, fragment)
    assert "data-ready=" in html and not tags(read(html), "img")


def test_a_search_without_a_result_says_so(page: Path) -> None:
    html = dump(page, "q=nothingofthekind")
    assert "No neuron matches." in html and "0 of 4 neurons" in html


def test_screen_readers_find_landmarks_captions_and_names(page: Path) -> None:
    html = dump(page)
    reader = read(html)
    for landmark in ("header", "nav", "main", "footer", "article"):
        assert tags(reader, landmark), landmark
    assert tags(reader, "html")[0]["lang"] == "en"
    first_link = tags(reader, "a")[0]
    assert (first_link["class"], first_link["href"]) == ("skip", "#neurons")
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for section in tags(reader, "section"):
        assert section["aria-labelledby"] in ids
    assert html.count("<table") == html.count("<caption")
    for field in (*tags(reader, "input"), *tags(reader, "select")):
        assert f'for="{field["id"]}"' in html
    for picture in tags(reader, "svg"):
        assert picture["role"] == "img" and picture["aria-label"]
    assert tags(reader, "canvas")[1]["tabindex"] == "0"
    assert next(tag for tag, _ in reader.tags if re.fullmatch("h[1-6]", tag)) == "h1"
    sortable = [th for th in tags(reader, "th") if "aria-sort" in th]
    assert {th["scope"] for th in sortable} == {"col"}
    assert len(sortable) == len(
        [button for button in tags(reader, "button") if str(button.get("id")).startswith("sort-")]
    )


def test_without_optional_tables_the_page_still_stands(tmp_path: Path) -> None:
    tables = make_page_tables()
    few = {name: tables[name] for name in ("run", "steps", "neurons")}
    html = dump(write_page(tmp_path / "few.html", few, "few"), urlencode({"n": f"{WEIGHTS[1]}~in~5"}))
    assert "Not switched off" in html and "1.linear2 column 5</h3>" in html


def test_a_page_without_a_neuron_says_so(tmp_path: Path) -> None:
    tables = make_page_tables()
    none = {"run": tables["run"], "steps": tables["steps"].iloc[:0], "neurons": tables["neurons"].iloc[:0]}
    html = dump(write_page(tmp_path / "none.html", none, "none"))
    assert "data-ready=" in html and "No neuron has selected entries" in html and "No loss was recorded." in html


def large_tables(n_neurons: int = 1000, n_samples: int = 10_000) -> dict[str, pd.DataFrame]:
    """Return neurons with ten samples each, all different, of 35 words from a vocabulary of 5,000."""
    rng = np.random.default_rng(0)
    tables = make_page_tables()
    number = np.arange(n_neurons)
    keys = {"param": np.where(number % 2, *WEIGHTS), "axis": "in", "neuron": number // 2}
    texts = [tuple(f"w{w}" for w in row) for row in rng.integers(0, 5000, (n_samples, 35))]
    words = [texts[i][:5] for i in number]
    tables["neurons"] = pd.DataFrame(
        {**keys, "n_entries": 5, "n_samples": 1 + number, "n_notable": 5, "tokens": words, "text": words}
    )
    tables["texts"] = pd.DataFrame({"sample_id": range(n_samples), "text": texts})
    each = n_samples // n_neurons
    spread = {name: np.repeat(column, each) for name, column in keys.items() if name != "axis"}
    tables["samples"] = pd.DataFrame(
        {
            **spread,
            "axis": "in",
            "rank": np.tile(np.arange(each), n_neurons),
            "sample_id": range(n_samples),
            "moved": 0.5,
        }
    )
    return tables


def test_a_thousand_neurons_with_ten_thousand_samples_are_drawn_as_needed(tmp_path: Path) -> None:
    tables = large_tables()
    page = write_page(tmp_path / "large.html", tables, "large")
    html = dump(page, urlencode({"n": f"{WEIGHTS[0]}~in~499"}))
    assert "1,000 neurons" in html
    assert 100 <= len(rows(html)) < 1000  # the rest comes when it is scrolled to
    assert "0.linear1 column 499</h3>" in html
    assert detail(html).count("<li") == 5
    neurons = tables["neurons"]
    expected = [
        f"{'0.linear1' if param == WEIGHTS[0] else '1.linear2'} column {neuron}"
        for param, neuron, words in zip(neurons["param"], neurons["neuron"], neurons["text"], strict=True)
        if "499" in str(neuron) or any("499" in word for word in words)
    ]
    assert rows(dump(page, urlencode({"q": "column 499"}))) == expected
    assert {"0.linear1 column 499", "1.linear2 column 499"} < set(expected)


def test_phases_are_a_bar_for_each_boundary_over_what_chance_brings_together(page: Path) -> None:
    chart = dump(page).partition("<figcaption>Phases: ")[0].rpartition("<figure>")[2]
    assert chart.count('class="bar"') == len(make_page_tables()["phases"])
    assert chart.count('class="change"') == 1
    assert "<title>steps 38 to 41: loss, shift norm</title>" in chart

"""The page without a mouse, without good eyes, on small screens and on paper, as a running browser sees it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_gradtrace.report import write_page
from tests.report.conftest import WEIGHTS, make_page_tables
from tests.report.devtools import Browser, browser

# Of every text: the colour and what lies behind it, composed from the elements around it.
CONTRAST = """
(() => {
  const parse = (text) => { const v = text.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v; };
  const over = ([r, g, b, a], [x, y, z]) => [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a), 1];
  const linear = (v) => v <= .04045 * 255 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(linear).reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (node) => { const own = parse(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own : over(own, node.parentElement ? behind(node.parentElement) : [255, 255, 255, 1]); };
  const found = {};
  for (const node of document.body.querySelectorAll("*")) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !node.checkVisibility() || node.closest("script, noscript")) continue;
    const style = getComputedStyle(node), ground = behind(node);
    const ink = over(parse(node instanceof SVGElement ? style.fill : style.color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
    found[`${ink} on ${ground}`] = [Math.round(ratio * 100) / 100, node.tagName + "." + node.className];
  }
  return found;
})()
"""
FOCUSED = "((e) => e === document.body ? '' : e.id || e.textContent.trim().slice(0, 40))(document.activeElement)"
OUTLINE = (
    "((s) => s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2)(getComputedStyle(document.activeElement))"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("</script>", "\u202eabc", "\u200b", "\U0001f469\u200d\U0001f467", "\u0627\u0644", "x" * 10_000)
    return write_page(tmp_path_factory.mktemp("page") / "page.html", make_page_tables(words), "A run")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as running:
        yield running


@pytest.fixture
def shown(chromium: Browser, page: Path) -> Browser:
    chromium.media(prefers_color_scheme="light")
    chromium.open(page)
    return chromium


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(scheme: str, chromium: Browser, page: Path) -> None:
    chromium.media(prefers_color_scheme=scheme)
    chromium.open(page)
    chromium.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    found = chromium.js(CONTRAST)
    assert len(found) > 5
    assert {pair: ratio for pair, ratio in found.items() if ratio[0] < 4.5} == {}
    dark = chromium.js("getComputedStyle(document.body).backgroundColor") == "rgb(22, 25, 29)"
    assert dark == (scheme == "dark")


def test_everything_is_reached_with_the_keyboard_and_the_focus_is_seen(shown: Browser) -> None:
    reached = []
    for _ in range(60):
        shown.press("Tab")
        at = shown.js(FOCUSED)
        if reached and at in ("", reached[0]):  # round the page
            break
        assert shown.js(OUTLINE), f"the focus on {at} can't be seen"
        reached.append(at)
    assert reached[:2] == ["Skip to the list of neurons", "Map"]
    order = [reached.index(one) for one in ("colour", "map", "search", "param", "sort-v", "1.linear2 column 5")]
    assert order == sorted(order)
    assert "Phases as a table" in reached


def test_a_neuron_is_found_and_opened_without_a_mouse(shown: Browser) -> None:
    shown.press("Tab")
    shown.press("Enter")  # the link over the head of the page
    shown.until(f"{FOCUSED} === 'neurons'")
    shown.press("Tab")
    assert shown.js(FOCUSED) == "search"
    shown.type("column 5")
    shown.until("document.getElementById('count').textContent === '1 of 4 neurons'")
    while not shown.js(FOCUSED).startswith("1.linear2"):
        shown.press("Tab")
    shown.press("Enter")
    shown.until(f"{FOCUSED} === 'detail'")
    assert shown.js("document.getElementById('detail-title').textContent") == "1.linear2 column 5"
    address = shown.js("location.hash")
    shown("Page.reload")
    shown.wait()
    assert shown.js("location.hash") == address
    assert shown.js("document.getElementById('search').value") == "column 5"
    assert shown.js("document.getElementById('detail-title').textContent") == "1.linear2 column 5"


def test_the_map_is_walked_with_arrow_keys_and_says_where_one_is(shown: Browser) -> None:
    shown.js("document.getElementById('map').focus()")
    for key in ("Home", *["ArrowRight"] * 3):
        shown.press(key)
    assert shown.js("document.getElementById('map-cell').textContent").startswith("1.linear2 column 3: 4;")
    shown.press("Enter")
    shown.until(f"location.hash.includes('{WEIGHTS[1]}') && {FOCUSED} === 'detail'")
    assert shown.js("document.getElementById('detail-title').textContent") == "1.linear2 column 3"


def test_a_screen_reader_is_told_names_headings_and_tables(shown: Browser) -> None:
    told = shown.reader()
    for role in ("banner", "navigation", "main", "contentinfo", "search", "article"):
        assert role in {r for r, _ in told}, role
    named = {"region", "image", "table", "searchbox", "combobox", "link", "button", "img", "canvas", "navigation"}
    assert [(role, name) for role, name in told if role in named and not name.strip()] == []
    levels = shown.js("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    heads = shown.js("[...document.querySelectorAll('th')].map((th) => th.scope)")
    assert set(heads) == {"col", "row"}
    pictures = [name for role, name in told if role in ("image", "img")]
    assert any(name.startswith("Training loss, from") for name in pictures)
    assert any("random samples +0.300" in name for name in pictures)


@pytest.mark.parametrize("width", [320, 400, 900, 2200])
def test_nothing_runs_out_of_the_window(width: int, chromium: Browser, page: Path) -> None:
    chromium.open(page, f"n={WEIGHTS[1]}~in~3", width=width)
    assert chromium.js("document.documentElement.scrollWidth") <= width


def test_nothing_moves_and_nothing_is_cut_off_on_paper(shown: Browser) -> None:
    moving = "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).transitionDuration !== '0s').length"
    assert shown.js(moving) == 0 and shown.js("document.getAnimations().length") == 0
    shown.media(media="print")
    assert shown.js("getComputedStyle(document.getElementById('detail')).maxHeight") == "none"
    assert shown.js("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_tokens_without_a_picture_are_shown_by_number_and_long_ones_are_cut(shown: Browser, page: Path) -> None:
    shown.open(page, f"n={WEIGHTS[1]}~in~3")
    words = shown.js("[...document.querySelectorAll('#detail > p mark')].map((m) => m.textContent)")
    assert words == [
        "</script>",
        "\u27e8202E\u27e9abc",
        "\u27e8200B\u27e9",
        "\U0001f469\u200d\U0001f467",
        "\u0627\u0644",
        "x" * 60 + "…",
    ]
    assert shown.js("getComputedStyle(document.querySelector('#detail mark')).unicodeBidi") == "isolate"

"""One static HTML page, with everything in it: tables as text, figures as embedded PNG files."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_gradtrace.report.figures import FIGURES
from lightning_gradtrace.report.summary import count_clear, neuron_summary, short_names
from lightning_gradtrace.report.tables import Tables, check_tables, write_tables
from lightning_gradtrace.report.text import layer_rows, neuron_rows, pooled_rows
from lightning_gradtrace.report.theme import DARK, LIGHT, need_matplotlib, png, theme

if TYPE_CHECKING:
    from jinja2 import Template

_MOST_ROWS = 40


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written: the page, the figures and the tables."""

    page: Path
    figures: list[Path]
    tables: list[Path]


@dataclass(frozen=True)
class Figure:
    """A figure in the page: data URLs of its light and its dark version, and its text for screen readers."""

    light: str
    dark: str
    text: str


def write_report(folder: str | os.PathLike[str], tables: Tables, title: str) -> ReportFiles:
    """Write all tables (CSV), all figures (PNG) and one page that holds both.

    The page needs no network and no other file. Text of tokens and names is escaped.

    Args:
        folder: made if it does not exist; files of an earlier report are replaced.
        tables: by name, see `TABLES`. Tables may be empty.
        title: heading of the page.

    Raises:
        ImportError: matplotlib or jinja2 is missing; both come with the extra `plot`.
        ValueError: a table or one of its columns is missing.
    """
    check_tables(tables)
    need_matplotlib()
    template = load_template()
    folder = Path(folder)
    written = write_tables(folder / "tables", tables)
    (folder / "figures").mkdir(exist_ok=True)
    figures, files = {}, []
    for name, draw in FIGURES.items():
        images = {}
        for colours in (LIGHT, DARK):
            with theme(colours):
                images[colours] = png(draw(tables, colours))
        files.append(folder / "figures" / f"{name}.png")
        files[-1].write_bytes(images[LIGHT])
        text = str(draw.__doc__).splitlines()[0]
        figures[name] = Figure(_data_url(images[LIGHT]), _data_url(images[DARK]), text)
    page = folder / "index.html"
    page.write_text(render_page(template, title, tables, figures), encoding="utf-8")
    return ReportFiles(page, files, written)


def load_template() -> Template:
    """Return the template of the page, with escaping on.

    Raises:
        ImportError: jinja2 is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError(
            "the page needs jinja2, which is not installed: `pip install 'lightning-gradtrace[plot]'`"
        ) from error
    text = resources.files("lightning_gradtrace.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text)


def render_page(template: Template, title: str, tables: Tables, figures: Mapping[str, Figure]) -> str:
    """Return the page as HTML text.

    Args:
        template: from `load_template`.
        title: heading.
        tables: by name, see `TABLES`.
        figures: by name, see `FIGURES`.
    """
    summary = neuron_summary(tables["neurons"], tables["controls"])
    names = short_names(tables)
    above, below, known = count_clear(summary)
    return template.render(
        title=title,
        run=tables["run"].to_dict("records"),
        neurons=neuron_rows(summary.head(_MOST_ROWS), names),
        n_left_out=max(0, len(summary) - _MOST_ROWS),
        n_neurons=len(tables["neurons"]),
        n_with_tokens=int((tables["neurons"]["n_notable"] > 0).sum()),
        n_ablated=len(summary),
        above=above,
        below=below,
        known=known,
        pooled=pooled_rows(tables["pooled"]),
        layers=layer_rows(tables["layers"], names),
        figures=figures,
    )


def _data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}"

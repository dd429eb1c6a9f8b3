"""One static HTML page with everything in it: no network, no other file, no script from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lightning_gradtrace.report.document import page_document
from lightning_gradtrace.report.figures import FIGURES
from lightning_gradtrace.report.tables import Tables, check_tables, write_tables
from lightning_gradtrace.report.theme import LIGHT, need_matplotlib, png, theme


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written: the page, the figures and the tables."""

    page: Path
    figures: list[Path]
    tables: list[Path]


def write_report(folder: str | os.PathLike[str], tables: Tables, title: str) -> ReportFiles:
    """Write all tables (CSV), all figures (PNG) and the page.

    Args:
        folder: made if it does not exist; files of an earlier report are replaced.
        tables: by name, see `TABLES`. Tables may be empty.
        title: heading of the page.

    Raises:
        ImportError: matplotlib is missing; it comes with the extra `plot`.
        ValueError: a table or one of its columns is missing.
    """
    check_tables(tables)
    need_matplotlib()
    folder = Path(folder)
    written = write_tables(folder / "tables", tables)
    (folder / "figures").mkdir(exist_ok=True)
    files = []
    for name, draw in FIGURES.items():
        files.append(folder / "figures" / f"{name}.png")
        with theme(LIGHT):
            files[-1].write_bytes(png(draw(tables, LIGHT)))
    return ReportFiles(write_page(folder / "index.html", tables, title), files, written)


def write_page(file: str | os.PathLike[str], tables: Tables, title: str) -> Path:
    """Write the page alone; it needs no further package.

    Args:
        file: the file; its folder is made if it does not exist, and what was in the file is replaced as a whole.
        tables: `run`, `steps` and `neurons`, and any of the others of `TABLES`.
        title: heading of the page.

    Returns:
        The file.

    Raises:
        ValueError: a table or one of its columns is missing.
    """
    text = render_page(page_document(tables, title))
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def render_page(document: dict[str, Any]) -> str:
    """Return the page as HTML text.

    Args:
        document: from `page_document`.
    """
    script = _resource("charts.js") + "\n" + _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    facts = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
        for name, value in document["run"]
    )
    found = "".join(
        f"<li><strong>{html.escape(name)}</strong> {html.escape(text)}</li>" for name, text in document["found"]
    )
    parts = {
        "title": html.escape(document["title"]),
        "style": _resource("page.css"),
        "digest": digest,
        "found": found,
        "facts": facts,
        "data": embedded(document),
        "script": script,
    }
    # One pass over the template: what is filled in is never looked at again, whatever tokens hold.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _resource("page.html"))


def embedded(document: Any) -> str:
    r"""Return JSON that can stand inside a script element: no token ends the element or opens a comment.

    Example:
        >>> embedded("</script><!--")
        '"\\u003c/script\\u003e\\u003c!--"'
    """
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A lone surrogate can't be written as UTF-8.
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _resource(name: str) -> str:
    return resources.files("lightning_gradtrace.report").joinpath(name).read_text(encoding="utf-8")

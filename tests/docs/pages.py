"""Code blocks and tables of the documentation, so that tests run and compare what the pages show.

A block that belongs to an example is announced by a comment above its fence, which a rendered page doesn't show::

    <!-- example: reader -->
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(?:<!-- example: (?P<name>[\w-]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class CodeBlock:
    """One fenced block.

    Attributes:
        page: path below the root of the repository.
        line: line of its first statement on the page.
        language: as written after the fence.
        name: the example it belongs to, "" for none.
        text: what is inside.
    """

    page: str
    line: int
    language: str
    name: str
    text: str

    def run(self, namespace: dict[str, Any]) -> dict[str, Any]:
        """Execute the block; errors name the page and its line."""
        padding = "\n" * (self.line - 1)
        exec(compile(padding + self.text, str(ROOT / self.page), "exec", dont_inherit=True), namespace)
        return namespace


def blocks(page: str, language: str = "python", name: str | None = None) -> list[CodeBlock]:
    """Return the blocks of a page, of one example if `name` is given."""
    source = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(source):
        line = source.count("\n", 0, match.start("text")) + 1
        found.append(CodeBlock(page, line, match["language"], match["name"] or "", match["text"]))
    return [b for b in found if b.language == language and name in (None, b.name)]


def between(page: str, mark: str) -> str:
    """Return what stands between the comments `<!-- mark: begin -->` and `<!-- mark: end -->` of a page."""
    source = (ROOT / page).read_text(encoding="utf-8")
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    assert source.count(begin) == 1 and source.count(end) == 1, f"{page} needs the marks of `{mark}` once each"
    return source.partition(begin)[2].partition(end)[0]


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table, without its rule."""
    lines = [line.strip().strip("|") for line in text.splitlines() if line.strip().startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in rows if not all(set(cell) <= set("-:") for cell in row)]

"""Hooks of the site: the README becomes a page of it, and links to files outside docs/ become plain text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the README, with its links as they look from inside docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "readme.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to the README into links to its page; of links to other files outside docs/ keep the text."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def inside(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        place = (folder / target).resolve()
        if place == ROOT / "README.md":
            up = "../" * page.file.src_uri.count("/")
            return f"[{text}]({up}readme.md{anchor})"
        return match[0] if place.is_relative_to(ROOT / "docs") else text

    return _LINK.sub(inside, markdown)

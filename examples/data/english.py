"""Real English that is on every machine: the documentation that comes with CPython."""

from __future__ import annotations

import re

from typing_extensions import override

from examples.data.base import TextDataModule

_HOLD_OUT = 10

# Emphasis, underlines of headings and frames of tables are not words.
_MARKUP = re.compile(r"[*|`]+|[=\-~+]{3,}")


class EnglishData(TextDataModule):
    """The help topics of the running CPython (`pydoc_data.topics`, about 65,000 words); arguments as `TextDataModule`.

    A line is a paragraph; every tenth one is held out for validation. The text differs a little between versions of
    Python, so numbers are comparable within one version only.
    """

    @override
    def lines(self) -> dict[str, list[str]]:
        """Return the paragraphs of the training and the validation split."""
        from pydoc_data.topics import topics

        paragraphs = [
            _MARKUP.sub(" ", paragraph)
            for _, text in sorted(topics.items())
            for paragraph in re.split(r"\n\s*\n", text)
        ]
        return {
            "train": [p for i, p in enumerate(paragraphs) if i % _HOLD_OUT != _HOLD_OUT - 1],
            "val": paragraphs[_HOLD_OUT - 1 :: _HOLD_OUT],
        }

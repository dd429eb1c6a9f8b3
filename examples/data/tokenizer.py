"""Lower-cased "basic english" tokens and a vocabulary, as torchtext made them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

UNKNOWN = "<unk>"

# torchtext's rules, in its order: quotation marks and line breaks vanish, `;` and `:` too, other marks become tokens.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"'", " '  "),
        (r"\"", ""),
        (r"\.", " . "),
        (r"<br />", " "),
        (r",", " , "),
        (r"\(", " ( "),
        (r"\)", " ) "),
        (r"!", " ! "),
        (r"\?", " ? "),
        (r";", " "),
        (r":", " "),
    ]
]


def tokenize(line: str) -> list[str]:
    r"""Split a line into lower-cased words and punctuation marks.

    Source: torchtext's `basic_english` normalisation, which the 2023 experiment used.

    Example:
        >>> tokenize('It\'s "late" (very); go: now.')
        ['it', "'", 's', 'late', '(', 'very', ')', 'go', 'now', '.']
    """
    line = line.lower()
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)
    return line.split()


class Vocabulary:
    """Numbers for words: `<unk>` is 0, then by falling count in the training text, ties in alphabetical order.

    Args:
        words: all words, `<unk>` first.

    Raises:
        ValueError: if `<unk>` is not the first word, or words repeat.

    Example:
        >>> vocabulary = Vocabulary.from_lines([["b", "a", "b"]])
        >>> vocabulary.words
        ['<unk>', 'b', 'a']
        >>> vocabulary.encode(["a", "zebra"]).tolist()
        [2, 0]
    """

    def __init__(self, words: Sequence[str]) -> None:
        if not words or words[0] != UNKNOWN or len(set(words)) != len(words):
            raise ValueError(
                f"`words` starts with {list(words[:3])} and has {len(words) - len(set(words))} repetitions, expected "
                f"different words with `{UNKNOWN}` first; use `Vocabulary.from_lines` to make them from a text"
            )
        self.words = list(words)
        self._number = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def from_lines(cls, lines: Iterable[Sequence[str]], min_count: int = 1) -> Vocabulary:
        """Make the vocabulary of a text.

        Args:
            lines: the tokens of each line of the training split.
            min_count: words seen less often are left to `<unk>`.
        """
        counts = Counter(token for line in lines for token in line)
        counts.pop(UNKNOWN, None)
        kept = (word for word, count in counts.items() if count >= min_count)
        return cls([UNKNOWN, *sorted(kept, key=lambda word: (-counts[word], word))])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: Iterable[str]) -> np.ndarray:
        """Return the numbers of `tokens`, (n,) int64; unknown words are 0."""
        return np.fromiter((self._number.get(token, 0) for token in tokens), dtype=np.int64)

"""Basic-english tokens and the vocabulary."""

from __future__ import annotations

import pytest

from examples.data.tokenizer import Vocabulary, tokenize


@pytest.mark.parametrize(
    ("line", "tokens"),
    [
        ("You can now install TorchText", ["you", "can", "now", "install", "torchtext"]),
        ("It's 3.5, (really)!?", ["it", "'", "s", "3", ".", "5", ",", "(", "really", ")", "!", "?"]),
        ('say "so"; then: go', ["say", "so", "then", "go"]),
        ("one<br />two", ["one", "two"]),
        (" = Robert <unk> = \n", ["=", "robert", "<unk>", "="]),
        ("well @-@ known", ["well", "@-@", "known"]),
        ("  \t ", []),
    ],
)
def test_tokenize_follows_torchtext_basic_english(line: str, tokens: list[str]) -> None:
    assert tokenize(line) == tokens


def test_vocabulary_orders_by_count_then_alphabet_with_unknown_first() -> None:
    lines = [["pear", "fig", "apple"], ["fig", "<unk>", "<unk>", "<unk>"]]
    assert Vocabulary.from_lines(lines).words == ["<unk>", "fig", "apple", "pear"]
    assert Vocabulary.from_lines(reversed(lines)).words == ["<unk>", "fig", "apple", "pear"]


def test_rare_and_unknown_words_become_unknown() -> None:
    vocabulary = Vocabulary.from_lines([["a", "a", "b"]], min_count=2)
    assert len(vocabulary) == 2
    assert vocabulary.encode(["a", "b", "c", "<unk>"]).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("words", [[], ["a", "<unk>"], ["<unk>", "a", "a"]])
def test_vocabulary_refuses_words_without_unknown_first_or_with_repetitions(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"expected different words with `<unk>` first; use `Vocabulary.from_lines`"):
        Vocabulary(words)

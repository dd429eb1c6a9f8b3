"""How well does the pipeline recover what was planted?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd


def planted_scores(notable: pd.DataFrame, topics: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Compare notable tokens with the known topic words.

    Args:
        notable: table of `notable_tokens`, with `entry` and `text`.
        topics: words by topic.

    Returns:
        `planted_share`: share of notable tokens that are topic words. `purity`: mean over the entries of the share of
        notable tokens that belong to the entry's commonest topic, 1 if every entry stands for one topic.
        `recall`: share of all topic words that are notable somewhere. NaN without notable tokens.

    Example:
        >>> table = pd.DataFrame({"entry": [1, 1, 2], "text": ["ship", "sail", "the"]})
        >>> planted_scores(table, {"sea": ["ship", "sail", "tide"], "law": ["judge"]})["purity"]
        0.5
    """
    if notable.empty:
        return dict.fromkeys(("planted_share", "purity", "recall"), math.nan)
    topic_of = {word: topic for topic, words in topics.items() for word in words}
    topic = notable["text"].astype(str).map(topic_of)
    largest = topic.groupby(notable["entry"]).agg(lambda own: own.value_counts().max() if own.notna().any() else 0)
    size = notable.groupby("entry").size()
    return {
        "planted_share": float(topic.notna().mean()),
        "purity": float((largest / size).mean()),
        "recall": len(set(notable["text"]) & set(topic_of)) / len(topic_of),
    }

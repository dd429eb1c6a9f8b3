"""The scores of the planted experiment, by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from examples.ground_truth import planted_scores

TOPICS = {"sea": ["ship", "sail"], "law": ["judge", "court"]}


def test_scores_by_hand() -> None:
    notable = pd.DataFrame(
        {"entry": [1, 1, 1, 2, 2, 3], "text": ["ship", "sail", "judge", "the", "ship", "of"]},
    )
    scores = planted_scores(notable, TOPICS)
    assert scores["planted_share"] == pytest.approx(4 / 6)
    assert scores["purity"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert scores["recall"] == pytest.approx(3 / 4)


def test_no_notable_tokens_have_no_scores() -> None:
    scores = planted_scores(pd.DataFrame({"entry": [], "text": []}), TOPICS)
    assert len(scores) == 3
    assert all(math.isnan(value) for value in scores.values())

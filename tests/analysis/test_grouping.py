"""Variance between groups, against closed forms and a null."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace.analysis import grouped_variance, variance_explained


def test_the_share_is_that_of_an_analysis_of_variance() -> None:
    rng = np.random.default_rng(0)
    values = pd.Series(rng.normal(size=40), index=rng.permutation(40) + 100)
    groups = pd.DataFrame({"g": rng.integers(0, 5, 40), "one": 0}, index=values.index[::-1])
    table = variance_explained(values, groups).set_index("grouping")
    means = values.groupby(groups["g"].reindex(values.index)).transform("mean")
    assert table.loc["g", "explained"] == pytest.approx(means.var() / values.var())
    assert table.loc["g", "n_groups"] == 5
    assert table.loc["one", "explained"] == pytest.approx(0, abs=1e-12)


def test_the_null_finds_chance_and_a_planted_group_sticks_out() -> None:
    rng = np.random.default_rng(1)
    groups = pd.DataFrame(
        {"planted": np.repeat(np.arange(10), 20), "other": rng.permutation(np.repeat(np.arange(10), 20))}
    )
    values = pd.Series(groups["planted"] * 0.3 + rng.normal(size=200))
    table = variance_explained(values, groups, seed=2).set_index("grouping")
    assert table["null_mean"].to_numpy() == pytest.approx([9 / 199] * 2, rel=0.1)
    assert table.loc["planted", "explained"] > table.loc["planted", "null_high"]
    assert table.loc["planted", "p_value"] == pytest.approx(1 / 1000)
    assert table.loc["other", "p_value"] > 0.05


def test_equal_values_say_nothing_and_unknown_samples_are_named() -> None:
    groups = pd.DataFrame({"g": [0, 1]})
    assert variance_explained(pd.Series([2.0, 2.0]), groups).loc[0, ["explained", "p_value"]].isna().all()
    with pytest.raises(ValueError, match=r"says nothing of samples \[7\]"):
        variance_explained(pd.Series([1.0, 2.0], index=[0, 7]), groups)
    with pytest.raises(ValueError, match="holds 1 that are not finite"):
        variance_explained(pd.Series([1.0, np.nan]), groups)


def test_each_thing_is_explained_by_itself_and_samples_that_moved_nothing_count() -> None:
    rng = np.random.default_rng(3)
    moved = pd.DataFrame({"sample_id": rng.integers(0, 30, 200), "head": rng.integers(0, 2, 200)})
    moved["size"] = rng.random(200)
    groups = pd.DataFrame({"third": np.arange(40) % 3, "half": np.arange(40) % 2})
    seen = pd.DataFrame({"sample_id": np.arange(40)})
    found = grouped_variance(moved, groups, by=["head"], occurrences=seen, n_permutations=19)
    for head, part in moved.groupby("head"):
        values = part.groupby("sample_id")["size"].sum().reindex(np.arange(40), fill_value=0.0)
        expected = variance_explained(values, groups, n_permutations=19)
        pd.testing.assert_frame_equal(
            found[found["head"] == head][expected.columns].reset_index(drop=True), expected, check_dtype=False
        )
    with pytest.raises(ValueError, match=r"`moved` lacks the columns \['part'\]"):
        grouped_variance(moved, groups, by=["part"])

"""The layer table is the post's."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace.analysis import layer_table


def test_first_layer_row_of_the_post():
    table = layer_table(pd.DataFrame({"param": ["1.2"] * 2, "flipped_tokens": [330, 191], "notable_flipped": [8, 4]}))
    assert table["mean_flipped_tokens"].tolist() == [260.5]
    assert round(table["notable_share"][0], 6) == 0.022592


def test_layers_equal_brute_force_and_neurons_without_flips_have_no_share():
    rng = np.random.default_rng(0)
    flipped = rng.integers(0, 5, size=40)
    ablation = pd.DataFrame(
        {
            "param": rng.choice(["z", "a", "m"], size=40),
            "axis": rng.choice(["in", "out"], size=40),
            "flipped_tokens": flipped,
            "notable_flipped": np.minimum(flipped, rng.integers(0, 3, size=40)),
        }
    )
    table = layer_table(ablation, ["param", "axis"])
    seen = []
    for row in ablation.itertuples():
        if (row.param, row.axis) not in seen:
            seen.append((row.param, row.axis))
    assert list(table[["param", "axis"]].itertuples(index=False, name=None)) == seen
    for row in table.itertuples():
        own = [r for r in ablation.itertuples() if (r.param, r.axis) == (row.param, row.axis)]
        shares = [r.notable_flipped / r.flipped_tokens for r in own if r.flipped_tokens]
        assert row.neurons == len(own)
        assert row.neurons_without_flips == len(own) - len(shares)
        assert row.mean_flipped_tokens == pytest.approx(sum(r.flipped_tokens for r in own) / len(own))
        assert row.notable_share == pytest.approx(sum(shares) / len(shares))


def test_layer_without_any_flip_has_no_share():
    table = layer_table(pd.DataFrame({"param": ["a"], "flipped_tokens": [0], "notable_flipped": [0]}))
    assert np.isnan(table["notable_share"][0])


def test_missing_columns_are_refused():
    with pytest.raises(ValueError, match=r"`ablation` lacks the columns \['notable_flipped'\]"):
        layer_table(pd.DataFrame({"param": ["a"], "flipped_tokens": [0]}))

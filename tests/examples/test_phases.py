"""The experiment on phases runs with its control and checks its claims; scrambled text keeps its words alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

from examples.data import EnglishData
from examples.phases.__main__ import run
from examples.phases.study import main_change
from examples.train import CONF
from lightning_gradtrace import open_trace

TINY = ["model.width=16", "model.hidden=16", "model.n_layers=1", "model.n_heads=2", "trainer.accelerator=cpu"]
TINY += ["trainer.max_epochs=2", "+trainer.limit_train_batches=8", "+trainer.limit_val_batches=1"]
TINY += ["callbacks.gradtrace.weights_every_n_steps.n=4", "callbacks.progress.refresh_rate=0", "data.min_count=20"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phases")
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("phases", [f"run_dir={folder}", *TINY])
    run(cfg)
    return folder


def test_claims_and_series_are_written(finished: Path) -> None:
    claims = pd.read_csv(finished / "claims.csv")
    assert len(claims) == 13
    right = {">=": claims["found"] >= claims["wanted"], "<": claims["found"] < claims["wanted"]}
    for relation, holds in right.items():
        mine = claims["relation"] == relation
        assert (claims["holds"][mine] == holds[mine]).all()
    names = set(pd.read_csv(finished / "series.csv")["series"])
    assert {"loss", "bigram_alignment", "held_out_alignment", "overlap", "self_influence_gini", "weight_norm"} <= names
    assert (finished / "phases.png").stat().st_size > 10_000


def test_shifts_of_single_steps_are_compared_with_their_own_batch(finished: Path) -> None:
    pairs = pd.read_csv(finished / "pairs.csv")
    assert pairs["first_step"].tolist() == [0, 4, 8, 12]
    assert (pairs["last_step"] - pairs["first_step"] == 1).all()
    assert (pairs["bigrams"] == 20 * 34).all()
    between = pd.read_csv(finished / "held_out.csv")
    assert between["first_step"].tolist() == [1, 5, 9, 13]
    assert between["bigrams"].nunique() == 1


def test_the_control_reads_the_same_words_in_another_order(finished: Path) -> None:
    texts = []
    for folder in (finished, finished / "scrambled"):
        trace = open_trace(folder / "trace.zarr")
        assert trace.verify().ok
        texts.append(trace.inputs([0, 1]))
    assert not (texts[0] == texts[1]).all()


def test_scrambled_text_keeps_its_words_and_the_held_out_text() -> None:
    plain, mixed = EnglishData(min_count=5), EnglishData(min_count=5, scramble=True)
    for data in (plain, mixed):
        data.setup()
    one, other = (data.datasets["train"].columns.reshape(-1) for data in (plain, mixed))
    counts = [torch.bincount(text, minlength=len(plain.vocabulary)) for text in (one, other)]
    # What does not fill a row of all columns is left out, so a few words may differ.
    assert (counts[0] - counts[1]).abs().sum() < 2 * 20 and not torch.equal(one, other)
    assert torch.equal(plain.datasets["val"].columns, mixed.datasets["val"].columns)


def test_the_main_change_leaves_the_start_out() -> None:
    changes = pd.DataFrame({"series": "loss", "param": "", "step": [5, 40, 60], "jump": [-90.0, -3.0, 4.0]})
    assert main_change(changes, "loss", 10) == 60
    assert pd.isna(main_change(changes, "overlap", 0))

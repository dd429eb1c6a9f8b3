"""The tasks of the mechanism experiments hold what they say, and every experiment runs and checks its claims."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from examples.mechanisms.__main__ import run, train
from examples.mechanisms.addition import ModularAddition
from examples.mechanisms.addition_study import half_way
from examples.mechanisms.again import main as again
from examples.mechanisms.heads_study import best_head, main_change, rise, switched_off
from examples.mechanisms.repeats import Repeats
from examples.mechanisms.study import Claim
from examples.mechanisms.task import TaskData
from examples.mechanisms.watch import read_measures
from examples.models import CircuitModel
from examples.models.circuit_model import IGNORE
from examples.train import CONF

TABLES = ["callbacks.tables.every_n_steps=2", "learning_coefficient.n_draws=2"]
SMALL = {
    "induction": ["data.n_samples=640", "task.n_tokens=12", "task.context=12", "measure_every_n_steps=2"],
    "brackets": ["data.n_samples=640", "+task.context=16", "measure_every_n_steps=2"],
    "brackets_text": ["+task.context=12", "+task.stride=100", "trainer.max_epochs=1", "measure_every_n_steps=2"],
    "names": ["data.n_samples=640", "measure_every_n_steps=2"],
    "names_by_ablation": ["data.n_samples=640", "measure_every_n_steps=2"],
    "grokking": ["data.full_batches=6", "task.p=7", "model.hidden=16", "measure_every_n_steps=1", *TABLES],
    "grokking_full": ["data.full_batches=6", "task.p=7", "model.hidden=16", "measure_every_n_steps=1", *TABLES],
}


@pytest.mark.parametrize("experiment", SMALL)
def test_an_experiment_runs_with_its_controls_and_checks_its_claims(experiment: str, tmp_path: Path) -> None:
    small = [*SMALL[experiment], "callbacks.gradtrace.every_n_steps=2", "callbacks.gradtrace.weights_every_n_steps=2"]
    small.append("callbacks.progress.refresh_rate=0")
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("mechanisms", [f"experiment={experiment}", f"run_dir={tmp_path}", *small])
    if "brackets" in experiment:
        cfg.callbacks.gradtrace.record[1].schedule.n = 2
    finished = run(cfg)
    claims = pd.read_csv(tmp_path / "claims.csv")
    assert len(claims) >= 5
    assert (claims["holds"] == [c.holds for c in map(_claim, claims.to_dict("records"))]).all()
    assert finished.trace.verify().ok
    assert finished.trace.n_steps > 1
    (tmp_path / "claims.csv").unlink()
    for control in cfg.controls:
        shutil.rmtree(tmp_path / control)  # one that is missing is trained again
    again([str(tmp_path)])
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "claims.csv"), claims)
    for control in cfg.controls:
        assert (tmp_path / control / "measures.csv").exists()
        assert not (tmp_path / control / "trace.zarr").exists()


def _claim(row: dict) -> Claim:
    return Claim(row["text"], row["found"], row["relation"], row["wanted"])


@pytest.mark.parametrize("every", [1, 3])
def test_watching_and_recording_leave_the_training_as_it_is(every: int, tmp_path: Path) -> None:
    weights = []
    for traced in (False, True):
        folder = tmp_path / str(traced)
        overrides = [*SMALL["induction"], f"run_dir={folder}", f"callbacks.gradtrace.every_n_steps={every}"]
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose("mechanisms", ["experiment=induction", "callbacks.progress.refresh_rate=0", *overrides])
        cfg.measure_every_n_steps = every if traced else 1000
        train(cfg, instantiate(cfg.task), folder, traced=traced)
        weights.append(torch.load(folder / "model.pt", weights_only=True))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_claims_compare_and_nan_holds_nothing() -> None:
    assert Claim("a", 1.0, ">=", 1.0).holds
    assert not Claim("a", 1.0, "<", 1.0).holds
    assert not Claim("a", float("nan"), ">=", 0.0).holds
    assert str(Claim("a", 0.5, "<", 0.2)) == "FAIL  a: 0.500 (< 0.2)"


def test_repeats_repeat_with_their_period_and_the_others_do_not() -> None:
    data = Repeats(n_tokens=50, context=24, share=0.4).sequences(500, seed=3)
    text = torch.cat([data.tokens, data.targets[:, -1:]], 1)
    assert torch.equal(data.tokens[:, 1:], data.targets[:, :-1])
    assert 0.3 < data.patterns["repeated"].mean() < 0.5
    for row, repeated, period in zip(text, data.patterns["repeated"], data.patterns["period"], strict=True):
        if repeated:
            assert 4 <= period <= 12
            assert torch.equal(row[period:], row[:-period])
        else:
            assert not any(torch.equal(row[p:], row[:-p]) for p in range(4, 13))


def test_modular_addition_splits_all_pairs_and_answers_right() -> None:
    task = ModularAddition(p=11, fraction=0.3)
    assert sorted([*task.train.tolist(), *task.test.tolist()]) == list(range(121))
    data = task.sequences(0, seed=0)
    assert torch.equal((data.tokens[:, 0] + data.tokens[:, 1]) % 11, data.targets[:, 2])
    assert (data.targets[:, :2] == IGNORE).all()
    batches = list(TaskData(task, full_batches=3).train_dataloader())
    assert len(batches) == 3 and all(torch.equal(tokens, data.tokens) for tokens, _ in batches)


def test_a_head_that_is_switched_off_adds_nothing() -> None:
    model = CircuitModel(n_tokens=9, context=6, n_layers=1, width=8, n_heads=2)
    tokens = torch.randint(0, 9, (3, 6))
    with torch.no_grad():
        whole = model(tokens)
        with switched_off(model, (0, 0)), switched_off(model, (0, 1)):
            pass
        with switched_off(model, (0, 1)):
            off = model(tokens)
        model.network.attention[0].W_O[1] = 0
        torch.testing.assert_close(model(tokens), off)
    assert not torch.allclose(whole, off)


def test_series_know_when_they_rose() -> None:
    series = pd.Series([0.0, 0.0, 0.05, 0.5, 0.95, 1.0], index=[0, 10, 20, 30, 40, 50])
    assert rise(series) == slice(20, 30)
    assert rise(series, 0.1, 0.9) == slice(30, 40)
    assert half_way(series) == 30
    assert half_way(pd.Series([1.0, 5.0, 4.0, 1.0, 0.0], index=range(5))) == 3
    late = pd.Series([0.0, 0.01, 0.0, 0.01, 0.5, 0.9, 1.0, *(1 + 0.01 * n for n in range(20))])
    assert main_change(late.to_frame("score"), "score") in (4, 5, 6)
    assert main_change(pd.DataFrame({"score": [1.0] * 9}), "score") == 0
    measures = pd.DataFrame({"score.0.1": [0, 0.2], "score.1.0": [0.3, 0.7], "other": [1, 2]})
    assert best_head(measures, "score") == (1, 0)


def test_measures_are_read_by_step(tmp_path: Path) -> None:
    rows = pd.DataFrame({"step": [0, 0, 5, 5], "measure": ["a", "b", "a", "b"], "value": [1.0, 2.0, 3.0, 4.0]})
    rows.to_csv(tmp_path / "m.csv", index=False)
    assert read_measures(tmp_path / "m.csv").loc[5].to_dict() == {"a": 3.0, "b": 4.0}

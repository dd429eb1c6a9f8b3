"""The grokking experiment: its phases, and that its tables say what the two traces say."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

from examples.mechanisms.__main__ import run
from examples.mechanisms.addition import ModularAddition, number_waves
from examples.mechanisms.addition_parts import growth_check, parts_by_phase, parts_by_step
from examples.mechanisms.addition_samples import TABLES, components, growth_by_sample, patterns
from examples.mechanisms.phases import changes, find_phases, label_steps
from examples.mechanisms.study import Run
from examples.train import CONF
from lightning_gradtrace.analysis import division

KEYS = [2]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Addition modulo 7, eight steps, every one of them recorded."""
    folder = tmp_path_factory.mktemp("grokking")
    small = ["data.full_batches=8", "task.p=7", "model.hidden=16", "measure_every_n_steps=1", "controls={}"]
    small += ["callbacks.gradtrace.every_n_steps=1", "callbacks.tables.every_n_steps=1", "trainer.accelerator=cpu"]
    small += ["callbacks.progress.refresh_rate=0", "study=tests.examples.test_grokking.no_claims", f"run_dir={folder}"]
    with initialize_config_dir(CONF, version_base="1.3"):
        return run(compose("mechanisms", ["experiment=grokking", *small]))


def no_claims(run: Run) -> list:
    return []


def measures() -> pd.DataFrame:
    steps = np.arange(0, 100, 10)
    train = [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]
    test = [0, 0, 0.1, 0.1, 0.1, 0.2, 0.5, 0.995, 1, 1]
    loss = [4, 5, 8, 10, 9.5, 8.5, 3, 0.1, 0.01, 0.01]
    return pd.DataFrame({"train_accuracy": train, "test_accuracy": test, "test_loss": loss}, index=steps)


def test_phases_follow_from_what_is_known_when() -> None:
    phases = find_phases(measures())
    assert phases[["start", "stop"]].to_numpy().tolist() == [[0, 20], [20, 50], [50, 70], [70, 90]]
    labels = label_steps(pd.Series([0, 19, 20, 69, 70, 90]), phases)
    assert labels.tolist() == ["memorisation"] * 2 + ["circuit formation", "clean-up", "afterwards", "afterwards"]


def test_a_phase_that_does_not_come_has_no_steps() -> None:
    never = measures().assign(test_accuracy=0.1, test_loss=5.0)
    phases = find_phases(never).set_index("phase")
    assert phases.loc["circuit formation"].tolist() == [20, 90]
    assert phases.loc["clean-up"].tolist() == phases.loc["afterwards"].tolist() == [90, 90]
    assert set(label_steps(pd.Series([0, 50]), find_phases(never))) == {"memorisation", "circuit formation"}


def test_changes_take_losses_by_their_logarithm() -> None:
    loss = pd.Series([1.0] * 10 + [0.01] * 10, index=np.arange(20) * 5)
    table = changes({"test_loss": loss})
    assert table["step"].tolist() == [50]
    assert table["after"].iloc[0] == pytest.approx(np.log(0.01))


def test_waves_of_numbers_leave_other_tokens_alone() -> None:
    waves = number_waves(7, 2)
    assert waves.shape == (7, 9) and not waves[:, 7:].any()
    torch.testing.assert_close(waves @ waves.T, torch.eye(7, dtype=torch.float64))
    assert components(7, [2], "key") == [3, 4]
    assert sorted(components(7, [2], "key") + components(7, [2], "other")) == list(range(1, 7))
    wave = torch.cos(2 * torch.pi * 2 * torch.arange(7, dtype=torch.float64) / 7)
    assert waves[[3, 4], :7].matmul(wave).norm() == pytest.approx(wave.norm().item())


def test_the_samples_of_one_trace_add_up_to_the_shifts_of_the_other(small: Run) -> None:
    """Growth by sample from the exact shifts of `tables.zarr`, in sum, is twice <P W, P shifts> of the division."""
    growth = growth_by_sample(small, KEYS, find_phases(small.measures()))
    for table, param in TABLES.items():
        gram = np.asarray(small.trace.array(f"division/along/{param}/gram"))
        for kind in ("key", "other"):
            expected = 2 * gram[:, components(7, KEYS, kind), 0, 1].sum()
            mine = growth[(growth["table"] == table) & (growth["kind"] == kind)]
            assert mine["growth"].sum() == pytest.approx(expected, rel=1e-4)
            assert set(mine["sample_id"]) == set(range(len(small.sequences.tokens)))


def test_parts_of_every_step_add_up_to_what_the_norm_did(small: Run) -> None:
    phases = find_phases(small.measures())
    parts = parts_by_step(small, KEYS)
    check = growth_check(small, parts_by_phase(parts, phases, 1), phases)
    np.testing.assert_allclose(check["estimated"].fillna(0), check["measured"], rtol=1e-4, atol=1e-4)
    constant = division(small.trace, components_of=TABLES["head"])
    constant = constant[constant["component"] == 0]["growth"].sum()
    of = parts.groupby("of")["growth"].sum()
    assert of["head, key"] + of["head, other"] + constant == pytest.approx(of[TABLES["head"]], rel=1e-6)


def test_patterns_of_pairs() -> None:
    task = ModularAddition(7, 0.5)
    known = patterns(SimpleNamespace(task=task, sequences=task.sequences(0, 0)))  # type: ignore[arg-type]
    pairs = set(zip(known["a"], known["b"], strict=True))
    for row in known.itertuples():
        assert (row.b + row.difference) % 7 == row.a and (row.a + row.b) % 7 == row.answer
        assert row.distance == min(abs(row.a - row.b), 7 - abs(row.a - row.b))
        assert row.mirrored == (row.a != row.b and (row.b, row.a) in pairs)
        assert row.same_answer == (known["answer"] == row.answer).sum()
    assert known["mirrored"].any() and not known["mirrored"].all()

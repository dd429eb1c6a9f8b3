"""The tutorial's commands compose, and its code runs in order on a small trace of the same experiment."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from examples.data.planted import TOPICS
from examples.ground_truth import planted_scores
from examples.train import CONF
from tests.docs.pages import ROOT, blocks
from tests.examples.conftest import Run

PAGE = "docs/tutorial.md"
WORDS = {topic: words.split() for topic, words in TOPICS.items()}


@pytest.fixture(scope="module")
def run(run_experiment: Run) -> Path:
    return run_experiment("planted", "data.n_documents=240", "trainer.max_epochs=4")


def test_the_code_finds_a_neuron_that_stands_for_topics(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "planted").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    page: dict = {}
    for block in blocks(PAGE, name="tutorial"):
        block.run(page)
    assert "no problems" in capsys.readouterr().out
    assert planted_scores(page["notable"], WORDS)["planted_share"] > 0.95
    planted = {word for words in WORDS.values() for word in words}
    assert set(page["found"]["text"].iloc[0]) <= planted
    assert page["flips"]["count"].sum() > 0
    assert page["random"]["measure"].tolist() == ["flip_rate", "notable_flip_rate", "notable_share", "token_share"]
    null = page["null"].set_index("measure")
    assert null.loc["n_notable", "control_value"] < 0.5 * null.loc["n_notable", "value"]


def test_by_hand_means_about_thirty_lines() -> None:
    lines = [line for block in blocks(PAGE, name="tutorial") for line in block.text.splitlines() if line.strip()]
    assert len(lines) <= 40


@pytest.mark.parametrize(
    ("name", "module", "config"), [("train", "train", "config"), ("analyze", "analyze", "analyze")]
)
def test_commands_compose(name: str, module: str, config: str) -> None:
    (block,) = blocks(PAGE, "bash", name)
    python, flag, target, *overrides = shlex.split(block.text)
    assert (python, flag, target) == (".venv/bin/python", "-m", f"examples.{module}")
    assert (ROOT / "examples" / f"{module}.py").is_file()
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose(config, overrides=[*overrides, *(["run_dir=x"] if module == "train" else [])])
    if module == "train":
        assert cfg.name == "planted" and cfg.callbacks.gradtrace.record.k == 50

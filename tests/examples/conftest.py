"""Small runs of the experiments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from examples.train import CONF, train

Run = Callable[..., Path]


@pytest.fixture(scope="session")
def run_experiment(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train an experiment with overrides; returns its run directory."""

    def run(experiment: str, *overrides: str) -> Path:
        folder = tmp_path_factory.mktemp(experiment)
        quiet = ["callbacks.progress.refresh_rate=0", "trainer.accelerator=cpu", f"run_dir={folder}"]
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose("config", overrides=[f"experiment={experiment}", *quiet, *overrides])
        train(cfg)
        return folder

    return run

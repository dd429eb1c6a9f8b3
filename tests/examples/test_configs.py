"""Every experiment composes, and `wikitext2` is the reference experiment to the letter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from examples.train import CONF, instantiate_callbacks
from lightning_gradtrace import GradTrace, TopK

FILES = sorted(Path(CONF, "experiment").glob("*.yaml"))
# The others are mechanisms: `tests/examples/test_mechanisms.py`.
EXPERIMENTS = [file.stem for file in FILES if "\ntask:" not in file.read_text(encoding="utf-8")]


def composed(*overrides: str, name: str = "config") -> DictConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(name, overrides=list(overrides))


def targets(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [t for value in node.values() for t in targets(value)]
    return [t for value in node for t in targets(value)] if isinstance(node, list) else []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes_and_names_only_what_exists(experiment: str, tmp_path: Path) -> None:
    cfg = composed(f"experiment={experiment}", f"run_dir={tmp_path}")
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    names = targets(resolved)
    assert {"lightning.Trainer", "lightning_gradtrace.GradTrace", "torch.optim.SGD"} <= set(names)
    assert all(get_object(name) is not None for name in names)
    assert experiment.startswith(cfg.name)
    callback = instantiate(cfg.callbacks.gradtrace)
    assert isinstance(callback, GradTrace)
    assert str(callback.path) == str(tmp_path / "trace.zarr")
    assert isinstance(callback.records[0], TopK)


def test_english_is_the_default() -> None:
    assert composed("run_dir=x") == composed("experiment=english", "run_dir=x")


def test_wikitext2_is_the_reference_experiment() -> None:
    cfg = composed("experiment=wikitext2", "run_dir=x")
    assert {**cfg.model} == {
        "_target_": "examples.models.LanguageModel",
        "width": 200,
        "n_heads": 4,
        "hidden": 200,
        "n_layers": 3,
        "dropout": 0.2,
    }
    assert (cfg.data.batch_size, cfg.data.context, cfg.data.shuffle, cfg.data.min_count) == (20, 35, False, 1)
    assert (cfg.trainer.max_epochs, cfg.trainer.gradient_clip_val) == (5, 0.5)
    assert (cfg.optim.optimizer._target_, cfg.optim.optimizer.lr) == ("torch.optim.SGD", 5.0)
    assert cfg.optim.scheduler.gamma == 0.95
    record = cfg.callbacks.gradtrace.record
    assert (record.k, record.per) == (1000, "sample")
    thresholds = {"n_entries": 5000, "min_count": 20, "n_relative": 200, "n_notable": 5, "n_samples": 2000}
    assert {name: cfg.analysis[name] for name in thresholds} == thresholds
    assert (cfg.analysis.axis, cfg.analysis.min_relative) == ("in", 0.0)


def test_every_threshold_can_be_overridden_in_the_analysis() -> None:
    assert set(composed("run=x", name="analyze").analysis) == set(composed("run_dir=x").analysis)


def test_callbacks_none_trains_without_a_trace() -> None:
    cfg = composed("callbacks=none", "run_dir=x")
    assert instantiate_callbacks(cfg.callbacks, config={}, vocab=[]) == []


def test_multirun_gives_each_seed_a_run_directory_of_its_own(tmp_path: Path) -> None:
    overrides = ["experiment=planted", "seed=1,2", "data.n_documents=20", "data.contexts_per_document=1"]
    overrides += ["model.width=8", "model.hidden=8", "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    overrides += ["callbacks.gradtrace.record.k=5", "callbacks.progress.refresh_rate=0", f"hydra.sweep.dir={tmp_path}"]
    command = [sys.executable, "-m", "examples.train", "--multirun", *overrides]
    done = subprocess.run(command, cwd=Path(CONF).parent, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    for number, seed in enumerate((1, 2)):
        run = tmp_path / str(number)
        assert OmegaConf.load(run / "config.yaml").seed == seed
        assert (run / "trace.zarr" / "zarr.json").is_file()
        assert f"run directory          {run}" in done.stdout

"""Train an experiment with its controls and check its claims: `python -m examples.mechanisms experiment=induction`.

The run directory holds the trace, the measures by step, the model, the claims (`claims.csv`) and the figures; each
control has a folder of its own in it. `python -m examples.mechanisms.again RUN_DIR` studies a trained run once more,
and trains controls that are missing.
"""

from __future__ import annotations

import time
from pathlib import Path

import hydra
import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from examples.mechanisms.study import Run, build_model, conclude
from examples.mechanisms.task import Task, TaskData
from examples.mechanisms.watch import Watch
from examples.train import CONF, instantiate_callbacks, quietly, write_settings


def train(cfg: DictConfig, task: Task, folder: Path, *, traced: bool) -> float:
    """Train one network into one folder.

    Args:
        cfg: the configuration.
        task: the task.
        folder: where configuration, measures, weights and, if `traced`, the trace go.
        traced: whether the callbacks of the configuration are used; a control has none.

    Returns:
        Seconds that the training took.
    """
    resolved = write_settings(cfg, folder)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = TaskData(task, seed=cfg.seed, **cfg.data)
    model = build_model(cfg, task)
    callbacks: list[L.Callback] = [Watch(task, folder / "measures.csv", cfg.measure_every_n_steps)]
    if traced:
        callbacks += instantiate_callbacks(cfg.callbacks, resolved, task.words)
    trainer: L.Trainer = instantiate(cfg.trainer, callbacks=callbacks)
    started = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - started
    torch.save(model.state_dict(), folder / "model.pt")
    return seconds


def run(cfg: DictConfig) -> Run:
    """Train the experiment and its controls, and write down its claims.

    Args:
        cfg: as composed from `conf/mechanisms.yaml`.
    """
    folder = Path(cfg.run_dir)
    task: Task = instantiate(cfg.task)
    seconds = {"run": train(cfg, task, folder, traced=True)}
    write_seconds(folder, seconds | train_controls(cfg, folder))
    return conclude(folder)


def train_controls(cfg: DictConfig, folder: Path, *, missing: bool = False) -> dict[str, float]:
    """Train the controls of an experiment.

    Args:
        cfg: the configuration of the experiment.
        folder: its run directory; each control gets a folder in it.
        missing: only those that have no trained model yet.

    Returns:
        Seconds that each training took, by control.
    """
    seconds = {}
    for name, changes in cfg.controls.items():
        if missing and (folder / str(name) / "model.pt").exists():
            continue
        control = OmegaConf.merge(cfg, changes)
        assert isinstance(control, DictConfig)
        seconds[str(name)] = train(control, instantiate(control.task), folder / str(name), traced=False)
    return seconds


def write_seconds(folder: Path, seconds: dict[str, float]) -> None:
    """Add to ``seconds.yaml`` how long some trainings took, by name."""
    file = folder / "seconds.yaml"
    known = OmegaConf.load(file) if file.exists() else OmegaConf.create()
    OmegaConf.save(OmegaConf.merge(known, seconds), file)


@hydra.main(version_base="1.3", config_path=CONF, config_name="mechanisms")
def main(cfg: DictConfig) -> None:
    """Compose the configuration and run."""
    quietly()
    run(cfg)


if __name__ == "__main__":
    main()

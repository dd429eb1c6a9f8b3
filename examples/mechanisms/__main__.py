"""Train an experiment with its controls and check its claims: `python -m examples.mechanisms experiment=induction`.

The run directory holds the trace, the measures by step, the model, the claims (`claims.csv`) and the figures; each
control has a folder of its own in it. `python -m examples.mechanisms.again RUN_DIR` studies a trained run once more.
"""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from examples.mechanisms.study import Run, build_model, conclude
from examples.mechanisms.task import Task, TaskData
from examples.mechanisms.watch import Watch
from examples.train import CONF, instantiate_callbacks


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
    folder.mkdir(parents=True, exist_ok=True)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    OmegaConf.save(OmegaConf.create(resolved), folder / "config.yaml")
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
    seconds: dict[str, Any] = {"run": train(cfg, task, folder, traced=True)}
    for name, changes in cfg.controls.items():
        control = OmegaConf.merge(cfg, changes)
        assert isinstance(control, DictConfig)
        seconds[str(name)] = train(control, instantiate(control.task), folder / str(name), traced=False)
    OmegaConf.save(OmegaConf.create(seconds), folder / "seconds.yaml")
    return conclude(folder)


@hydra.main(version_base="1.3", config_path=CONF, config_name="mechanisms")
def main(cfg: DictConfig) -> None:
    """Compose the configuration and run."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    run(cfg)


if __name__ == "__main__":
    main()

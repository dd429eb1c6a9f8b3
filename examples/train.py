"""Train an experiment and record it: `python -m examples.train experiment=english`.

The run directory holds the trace (`trace.zarr`), the trained model (`model.ckpt`), the resolved configuration
(`config.yaml`, also inside the trace), the commit of the code (`commit.txt`), perplexities and times (`metrics.yaml`)
and what Hydra writes. Of the times, `training_seconds` is the whole of `Trainer.fit`, `loop_seconds` what lies between
the start of its first and the end of its last step, validation and the writing of the trace included; neither holds the
loading of the text.
"""

from __future__ import annotations

import logging
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig, OmegaConf

from examples.data.base import TextDataModule
from lightning_gradtrace import GradTrace

CONF = str(Path(__file__).resolve().parents[1] / "conf")


def instantiate_callbacks(specs: DictConfig, config: Any, vocab: list[str]) -> list[L.Callback]:
    """Make the callbacks of a configuration, each under a name of its own.

    Args:
        specs: the group `callbacks`.
        config: the whole resolved configuration, which the trace keeps.
        vocab: the words of the data, which the trace keeps.
    """
    callbacks = []
    for spec in specs.values():
        if "_target_" not in spec:  # an experiment's settings of a callback that `callbacks=none` has removed
            continue
        make = instantiate(spec, _partial_=True)
        callbacks.append(make(config=config, vocab=vocab) if make.func is GradTrace else make())
    return callbacks


def write_settings(cfg: DictConfig, folder: Path) -> Any:
    """Write what a run is made from into its directory: ``config.yaml`` and ``commit.txt``.

    Args:
        cfg: the configuration.
        folder: the run directory; made if it isn't there.

    Returns:
        The resolved configuration, in plain containers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    OmegaConf.save(OmegaConf.create(resolved), folder / "config.yaml")
    command = ["git", "-C", CONF, "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown: no git, or no repository\n"
    (folder / "commit.txt").write_text(commit)
    return resolved


def train(cfg: DictConfig) -> L.Trainer:
    """Train one run and write everything into its run directory.

    Args:
        cfg: as composed from `conf/config.yaml`.
    """
    run = Path(cfg.run_dir)
    resolved = write_settings(cfg, run)
    L.seed_everything(cfg.seed, workers=True, verbose=False)

    data: TextDataModule = instantiate(cfg.data)
    data.prepare_data()
    data.setup("fit")
    model = instantiate(cfg.model, n_tokens=len(data.vocabulary), **instantiate(cfg.optim))
    callbacks = instantiate_callbacks(cfg.callbacks, resolved, data.vocabulary.words)
    clock = Timer(verbose=False)  # last, so that it stops when the trace is written
    trainer: L.Trainer = instantiate(cfg.trainer, callbacks=[*callbacks, clock])

    started = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - started
    trainer.save_checkpoint(run / "model.ckpt", weights_only=True)
    metrics = {"validation_perplexity": float(trainer.callback_metrics["val_perplexity"])}
    if "test" in data.datasets:
        trainer.test(model, datamodule=data, verbose=False)
        metrics["test_perplexity"] = float(trainer.callback_metrics["test_perplexity"])
    metrics["training_seconds"] = seconds
    metrics["loop_seconds"] = clock.time_elapsed("train")
    if torch.cuda.is_initialized():
        metrics["peak_gpu_megabytes"] = torch.cuda.max_memory_allocated() / 1e6
    OmegaConf.save(OmegaConf.create(metrics), run / "metrics.yaml")
    for name, value in metrics.items():
        print(f"{name.replace('_', ' '):<22} {value:.2f}")
    print(f"{'run directory':<22} {run}")
    return trainer


def quietly() -> None:
    """Leave out what a run of these experiments need not say."""
    # Lightning's advice on speed (the texts are in memory, and workers are a choice of the configuration), its use of
    # what torch 2.13 has deprecated, and its tips.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def main(cfg: DictConfig) -> None:
    """Compose the configuration and train."""
    quietly()
    train(cfg)


if __name__ == "__main__":
    main()

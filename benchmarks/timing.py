"""Times and peak memory of one variant: interleaved in one process, or alone in a fresh one."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import torch
from typing_extensions import override

from benchmarks.peers import PEERS, NotAvailable
from benchmarks.workloads import Setting, Training, Workload
from lightning_gradtrace import GradTrace, TopK

WARM_UP = 2
Maker = Callable[[], tuple[pl.LightningModule, list[pl.Callback]]]


class Clock(pl.Callback):
    """Times a fit from its third step to the end of the training."""

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start after the warm-up."""
        if batch_idx == WARM_UP:
            self.started = now()

    @override
    def on_train_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Stop; callbacks before this one, the trace among them, are closed by now."""
        self.seconds = (now() - self.started) / (trainer.fit_loop.total_batch_idx + 1 - WARM_UP)


def now() -> float:
    """Return the time at which all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def variants(setting: Setting, folder: Path) -> dict[str, Maker]:
    """Return what is compared: makers of a model and its callbacks, by name."""
    workload, optimizer = setting.workload, setting.optimizer

    def traced(*records: TopK) -> tuple[pl.LightningModule, list[pl.Callback]]:
        target = folder / f"{time.monotonic_ns()}.zarr"
        return Training(workload, optimizer), [GradTrace(target, list(records))]

    per_step = setting.k * workload.batch
    made: dict[str, Maker] = {
        "plain": lambda: (Training(workload, optimizer), []),
        setting.ours: lambda: traced(TopK(setting.k)),
        f"GradTrace, TopK({per_step}, per='step')": lambda: traced(TopK(per_step, per="step")),
    }
    for name, peer in PEERS.items():
        made[name] = lambda peer=peer: (peer(workload, optimizer), [])  # type: ignore[misc]
    return made


def fit(make: Maker, setting: Setting) -> float:
    """Train for some steps and return the seconds per step after the warm-up."""
    pl.seed_everything(1111, verbose=False)
    model, callbacks = make()
    clock, workload = Clock(), setting.workload
    trainer = pl.Trainer(
        max_epochs=1,
        gradient_clip_val=workload.clip if model.automatic_optimization else None,
        accelerator=setting.device,
        precision=setting.precision,  # type: ignore[arg-type]  # any of Lightning's names
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, clock],
    )
    trainer.fit(model, workload.data(setting.steps + WARM_UP, setting.text))
    return clock.seconds


def interleaved(setting: Setting, rounds: int, only: str | None) -> tuple[pd.DataFrame, dict[str, str]]:
    """Measure all variants in turns.

    Args:
        setting: what is measured.
        rounds: number of rounds; one more comes first, to warm up caches and threads.
        only: besides plain training, only variants whose name contains this.

    Returns:
        Seconds per step, one row per round, one column per variant; and why others are not available.
    """
    rows, missing = [], {}
    # Peers keep all per-sample gradients at once and are slow; a few steps tell.
    few = replace(setting, steps=max(2, setting.steps // 8))
    with tempfile.TemporaryDirectory() as folder:
        made = variants(setting, Path(folder))
        made = {n: make for n, make in made.items() if only is None or n == "plain" or only in n}
        for number in range(rounds + 1):
            order = list(made)[number % len(made) :] + list(made)[: number % len(made)]
            row = {}
            for name in order:
                try:
                    row[name] = fit(made[name], few if "capture only" in name else setting)
                except NotAvailable as error:
                    missing[name] = str(error)
                    del made[name]
            if number:
                rows.append(row)
                print("  ".join(f"{name}: {row[name]:.4f}" for name in made), flush=True)
    return pd.DataFrame(rows), missing


def table(seconds: pd.DataFrame) -> pd.DataFrame:
    """Return medians of seconds and of the ratios to plain training within a round, with lowest and highest."""
    ratios = seconds.div(seconds["plain"], axis=0)
    found = pd.DataFrame({"seconds per step": seconds.median(), "x plain": ratios.median()})
    found["lowest"], found["highest"] = ratios.min(), ratios.max()
    return found


def peak_memory(setting: Setting, name: str) -> float | None:
    """Return the peak memory in MB of a fresh process that trains one variant; None if it is not available.

    It is resident memory on the host, or what torch allocated on the GPU.
    """
    arguments = {**asdict(setting), "text": None if setting.text is None else str(setting.text)}
    command = [sys.executable, "-m", "benchmarks.timing", json.dumps([arguments, name, torch.get_num_threads()])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    return None if answer is None else float(answer)


def alone(setting: Setting, name: str) -> float | None:
    """Train one variant in this process and return the peak memory of the process in MB, None if not available."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            fit(variants(setting, Path(folder))[name], setting)
        except NotAvailable:
            return None
    if setting.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    given, chosen, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    text = None if given["text"] is None else Path(given["text"])
    print(json.dumps(alone(Setting(**{**given, "workload": Workload(**given["workload"]), "text": text}), chosen)))

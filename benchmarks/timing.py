"""Times and peak memory of one variant: interleaved in one process, or alone in a fresh one."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
from typing_extensions import override

from benchmarks.peers import PEERS, NotAvailable
from benchmarks.workloads import Optimizer, Training, Workload
from lightning_gradtrace import GradTrace, TopK

WARM_UP = 2
Maker = Callable[[], tuple[pl.LightningModule, list[pl.Callback]]]


class Clock(pl.Callback):
    """Times a fit from its third step to the end of the training."""

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start after the warm-up."""
        if batch_idx == WARM_UP:
            self.started = time.perf_counter()

    @override
    def on_train_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Stop; callbacks before this one, the trace among them, are closed by now."""
        self.seconds = (time.perf_counter() - self.started) / (trainer.fit_loop.total_batch_idx + 1 - WARM_UP)


def variants(workload: Workload, optimizer: Optimizer, folder: Path, k: int) -> dict[str, Maker]:
    """Return what is compared: makers of a model and its callbacks, by name."""

    def traced(*records: TopK) -> tuple[pl.LightningModule, list[pl.Callback]]:
        target = folder / f"{time.monotonic_ns()}.zarr"
        return Training(workload, optimizer), [GradTrace(target, list(records))]

    per_step = k * workload.batch
    made: dict[str, Maker] = {
        "plain": lambda: (Training(workload, optimizer), []),
        f"GradTrace, TopK({k})": lambda: traced(TopK(k)),
        f"GradTrace, TopK({per_step}, per='step')": lambda: traced(TopK(per_step, per="step")),
    }
    for name, peer in PEERS.items():
        made[name] = lambda peer=peer: (peer(workload, optimizer), [])  # type: ignore[misc]
    return made


def fit(make: Maker, workload: Workload, steps: int, text: Path | None) -> float:
    """Train for some steps and return the seconds per step after the warm-up."""
    pl.seed_everything(1111, verbose=False)
    model, callbacks = make()
    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=1,
        gradient_clip_val=workload.clip if model.automatic_optimization else None,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, clock],
    )
    trainer.fit(model, workload.data(steps + WARM_UP, text))
    return clock.seconds


def interleaved(
    workload: Workload, optimizer: Optimizer, text: Path | None, rounds: int, steps: int, k: int, only: str | None
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Measure all variants in turns.

    Args:
        workload: what is trained.
        optimizer: by which optimizer.
        text: text of the batches.
        rounds: number of rounds; one more comes first, to warm up caches and threads.
        steps: steps per block.
        k: entries kept per sample.
        only: besides plain training, only variants whose name contains this.

    Returns:
        Seconds per step, one row per round, one column per variant; and why others are not available.
    """
    rows, missing = [], {}
    with tempfile.TemporaryDirectory() as folder:
        made = variants(workload, optimizer, Path(folder), k)
        made = {n: make for n, make in made.items() if only is None or n == "plain" or only in n}
        for number in range(rounds + 1):
            order = list(made)[number % len(made) :] + list(made)[: number % len(made)]
            row = {}
            for name in order:
                # Peers keep all per-sample gradients at once and are slow; a few steps tell.
                few = max(2, steps // 8) if "capture only" in name else steps
                try:
                    row[name] = fit(made[name], workload, few, text)
                except NotAvailable as error:
                    missing[name] = str(error)
                    del made[name]
            if number:
                rows.append(row)
                print("  ".join(f"{name}: {row[name]:.3f}" for name in made), flush=True)
    return pd.DataFrame(rows), missing


def table(seconds: pd.DataFrame) -> pd.DataFrame:
    """Return medians of seconds and of the ratios to plain training within a round, with lowest and highest."""
    ratios = seconds.div(seconds["plain"], axis=0)
    found = pd.DataFrame({"seconds per step": seconds.median(), "x plain": ratios.median()})
    found["lowest"], found["highest"] = ratios.min(), ratios.max()
    return found


def peak_memory(workload: str, optimizer: Optimizer, name: str, steps: int, k: int) -> float | None:
    """Return the peak resident memory in MB of a fresh process that trains one variant; None if not available."""
    arguments = json.dumps([workload, optimizer, name, steps, k])
    command = [sys.executable, "-m", "benchmarks.timing", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    return None if answer is None else float(answer)


def _alone(workload: Workload, optimizer: Optimizer, name: str, steps: int, k: int) -> float | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            fit(variants(workload, optimizer, Path(folder), k)[name], workload, steps, None)
        except NotAvailable:
            return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    from benchmarks.workloads import WORKLOADS

    chosen, *rest = json.loads(sys.argv[1])
    print(json.dumps(_alone(WORKLOADS[chosen], *rest)))

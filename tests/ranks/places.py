"""What two ranks do that write to one place which is no directory of theirs."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any

import fsspec
from lightning.pytorch.callbacks import ModelCheckpoint
from zarr.storage import MemoryStore

from lightning_gradtrace import GradTrace, TopK
from lightning_gradtrace.store import target
from tests.ranks.failures import Flush, Kill, error_of, rank, stoppable, train

SECRETS = {"key": "test", "secret": "test"}


def connect(url: str) -> None:
    """Say where S3 is, and don't wait long for what is dropped."""
    options = {"endpoint_url": url, **SECRETS}
    options["config_kwargs"] = {"retries": {"max_attempts": 1}, "connect_timeout": 20, "read_timeout": 60}
    fsspec.config.conf["s3"] = options
    target.RETRY_SECONDS = (0.01, 0.05, 0.2)


def few(path: Any) -> GradTrace:
    """A callback with few arrays: the server takes tens of milliseconds for a request."""
    return GradTrace(path, [TopK(7), TopK(9, per="step", schedule=2)], inputs=None)


def recorded(folder: Path, url: str, path: str) -> Any:
    connect(url)
    train(few(path))


def recorded_here(folder: Path, path: str) -> Any:
    train(few(folder / path))


def killed(folder: Path, url: str, path: str) -> Any:
    """Rank 1 has committed two steps and is killed before the fifth."""
    connect(url)
    trace = few(path)
    train(trace, *([Flush(trace, 2), Kill(4, signal.SIGKILL)] if rank() == 1 else []))


def resumed(folder: Path, url: str, path: str) -> Any:
    """Stop before step 7 and go on from the checkpoint of step 4."""
    connect(url)
    saver = ModelCheckpoint(folder, filename="s3-{step}", every_n_train_steps=4, save_top_k=-1)
    with contextlib.suppress(RuntimeError):
        stoppable(path, Kill(7, RuntimeError("stopped")), saver)  # type: ignore[arg-type]
    stoppable(path, step=4, ckpt_path=folder / "s3-step=4.ckpt")  # type: ignore[arg-type]


def whole(folder: Path) -> Any:
    stoppable(folder / "whole.zarr")


def refused(folder: Path, kind: str) -> Any:
    """Train into a place that the ranks don't share."""
    places: dict[str, Any] = {
        "memory": MemoryStore(),
        "zip": folder / "a.zip",
        "a directory of each": folder / f"of-rank-{rank()}.zarr",
    }
    return error_of(few(places[kind]))

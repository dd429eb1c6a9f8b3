"""The same made-up run, written by one process and by several: what the merged trace is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_gradtrace import Dense, Factored, Norms, Sketch, TopK
from lightning_gradtrace.capture.shares import DenseShare, OuterShare
from lightning_gradtrace.record import ParameterInfo, ParameterShifts, Record, StepShifts
from lightning_gradtrace.record.gains import Gains
from lightning_gradtrace.record.parameters import parameter_table
from lightning_gradtrace.store import TraceWriter
from lightning_gradtrace.store.parts import PartWriter, part_target
from lightning_gradtrace.store.target import Target

INFOS = [
    ParameterInfo("layers.0.linear1.weight", (6, 5), 0, "linear", "layers.0.linear1"),
    ParameterInfo("layers.0.bias", (4,), 30, "bias", "layers.0"),
    ParameterInfo("layers.0.linear2.weight", (5, 6), 34, "linear", "layers.0.linear2"),
]
COUNTS = np.array([[3, 2, 2], [1, 4, 1], [2, 2, 3], [1, 1, 2], [3, 3, 3], [2, 1, 2]])
"""Occurrences of every step and rank."""

VOCAB = [f"word{i}" for i in range(9)]
ATTRS = {"run_id": "made up", "quantity": "shift"}


def records() -> list[Record]:
    """New records, of every kind."""
    return [TopK(6), TopK(7, per="step"), Dense(schedule=2), Factored(schedule=2), Norms(), Sketch(4), Gains()]


class Content:
    """Whole numbers, whose sums and products are exact however they are formed."""

    def __init__(self, step: int) -> None:
        rng = np.random.default_rng(step)
        n = COUNTS[step].sum()
        self.step, self.loss = step, rng.integers(1, 9, COUNTS.shape[1]) / 4
        self.sample_id = rng.integers(0, 20, n)
        self.left, self.right = (torch.as_tensor(rng.integers(-4, 5, (n, 3, width)) / 1.0) for width in (6, 5))
        self.bias, self.matrix = (torch.as_tensor(rng.integers(-40, 41, (n, *shape)) / 8) for shape in ((4,), (5, 6)))
        self.gain = torch.as_tensor(2.0 ** rng.integers(-2, 3, (5, 6)))
        self.rank = np.repeat(np.arange(COUNTS.shape[1]), COUNTS[step])
        self.slot = np.concatenate([np.arange(k) for k in COUNTS[step]])

    def shifts(self, rows: np.ndarray) -> StepShifts:
        """The shifts of some occurrences; the last matrix is not reached by rank 1."""
        of = torch.as_tensor(rows)
        reached = not len(rows) or bool((self.rank[rows] != 1).any())
        outer = OuterShare(self.left[of].float(), self.right[of].float())
        matrix = self.matrix[of].float() * torch.as_tensor(self.rank[rows] != 1)[:, None, None]
        shares: list[Any] = [outer, DenseShare(self.bias[of].float()), DenseShare(matrix) if reached else None]
        scales: list[Any] = [0.5, 2.0, self.gain.float()]
        parameters = [
            ParameterShifts(info, scale, [share], scale)
            for info, scale, share in zip(INFOS, scales, shares, strict=True)
        ]
        return StepShifts([len(rows)], parameters, self.step)


def append(writer: TraceWriter, kept: Sequence[Record], content: Content, rows: np.ndarray, loss: float) -> None:
    """Append what a process that saw some occurrences of a step records of it."""
    lengths = content.sample_id[rows] % 5 + 1
    tokens = np.where(np.arange(5) < lengths[:, None], (content.sample_id[rows][:, None] * 3 + np.arange(5)) % 9, -1)
    new = ~np.isin(content.sample_id[rows], writer.stored_samples)
    new &= np.arange(len(rows)) == np.array([np.argmax(content.sample_id[rows] == i) for i in content.sample_id[rows]])
    if new.any():
        writer._stored_samples = np.append(writer.stored_samples, content.sample_id[rows][new])
        writer.append_samples(content.sample_id[rows][new], tokens[new], lengths[new])
    shifts, first = content.shifts(rows), writer.n_occurrences
    arrays: dict[str, np.ndarray] = {}
    for record in sorted(kept, key=lambda record: record.group):
        if record.due(content.step):
            writer.declare(record.later_specs(shifts))
            arrays |= record.rows(shifts, first)
    row = {"step": content.step, "epoch": content.step // 3, "loss": loss, "lr": [0.5, 0.25], "clip_factor": 1.0}
    row |= {"grad_norm": 2.0, "residual": 1e-7, "nonfinite": 0}
    where = {"rank": content.rank[rows], "slot": content.slot[rows], "sample_id": content.sample_id[rows]}
    writer.append_step(row, {"micro_batch": np.zeros(len(rows), np.int32), **where}, arrays)


def _options(kept: Sequence[Record]) -> dict[str, Any]:
    specs = [spec for record in kept for spec in record.arrays(INFOS)]
    return {"params": parameter_table(INFOS), "specs": specs, "n_groups": 2, "vocab": VOCAB}


def _weights(step: int) -> dict[str, np.ndarray]:
    return {info.name: np.full(info.shape, step, np.float32) for info in INFOS}


def write_single(target: Target) -> None:
    """Write the run of one process that saw everything."""
    kept = records()
    writer = TraceWriter(target, attrs=ATTRS, **_options(kept))
    for step in range(len(COUNTS)):
        if step % 2 == 0:
            writer.append_weights(step, _weights(step))
        content = Content(step)
        append(writer, kept, content, np.arange(len(content.rank)), float(content.loss.mean()))
    writer.close(complete=True)


def write_parts(target: Target, n_steps: Sequence[int] | None = None) -> None:
    """Write the run of several processes.

    Args:
        target: where to.
        n_steps: steps that each of them commits; None for all.
    """
    for rank in range(COUNTS.shape[1]):
        kept = records()
        options = _options(kept)
        root = TraceWriter(target, attrs=ATTRS, n_ranks=COUNTS.shape[1], **options) if rank == 0 else None
        writer = PartWriter(part_target(target, rank), attrs=ATTRS | {"rank": rank}, **options)
        writer.root = root
        last = len(COUNTS) if n_steps is None else n_steps[rank]
        for step in range(last):
            if rank == 0 and step % 2 == 0:
                writer.append_weights(step, _weights(step))
            content = Content(step)
            append(writer, kept, content, np.flatnonzero(content.rank == rank), float(content.loss[rank]))
        writer.close(complete=last == len(COUNTS), end_reason=None if last == len(COUNTS) else f"stop at {last}")


def paths(folder: Path) -> tuple[Path, Path]:
    """Write both."""
    write_single(folder / "single.zarr")
    write_parts(folder / "parts.zarr")
    return folder / "single.zarr", folder / "parts.zarr"

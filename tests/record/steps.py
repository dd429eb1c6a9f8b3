"""Steps with shares of every form and scales of both kinds, for the tests of all records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_gradtrace.capture.shares import DenseShare, OuterShare, RowShare, Share, SumShare
from lightning_gradtrace.capture.shares.contraction import OuterView
from lightning_gradtrace.capture.shares.convolution import ConvolutionShare
from lightning_gradtrace.record import ParameterInfo, ParameterShifts, Record, StepShifts
from lightning_gradtrace.record.parameters import parameter_table
from lightning_gradtrace.record.search import comparison, forming, searcher
from lightning_gradtrace.store import Trace, TraceWriter, open_trace


@contextmanager
def searched(workspace: int = forming.WORKSPACE, parts: int = 1, many: int = comparison.MANY) -> Iterator[None]:
    """Search in blocks of so many entries, however small a step in so many parts, with so many candidates a block."""
    before = forming.WORKSPACE, searcher.PART, searcher.n_threads, comparison.MANY
    forming.WORKSPACE, searcher.PART, searcher.n_threads, comparison.MANY = workspace, 1, lambda: parts, many
    try:
        yield
    finally:
        forming.WORKSPACE, searcher.PART, searcher.n_threads, comparison.MANY = before


SHAPES = {
    "outer": (12, 9),
    "one row": (1, 40),
    "bias": (7,),
    "scalar": (),
    "convolution/weight": (4, 3, 2),
    "embedding": (9, 2),
    "tied": (8, 5),
    "tied and dense": (3, 4),
    "sometimes": (5, 6),
    "heads": (2, 7, 3),
    "kernel": (6, 5, 3),
}


def make_infos(dtype: str = "float32", shapes: dict[str, tuple[int, ...]] | None = None) -> list[ParameterInfo]:
    infos, offset = [], 0
    for name, shape in (shapes or SHAPES).items():
        infos.append(ParameterInfo(name, shape, offset, "linear", "", dtype))
        offset += infos[-1].numel
    return infos


def make_step(
    number: int, sizes: Sequence[int], positions: Sequence[int], gains: bool = False, dtype: str = "float32"
) -> StepShifts:
    """Draw shares of every form.

    Args:
        number: of the step; also the seed.
        sizes: samples of every micro-batch.
        positions: length of the sequences of every micro-batch.
        gains: whether the scale differs between weights, as Adam's does.
        dtype: of the shares.
    """
    torch.manual_seed(number)
    kind = getattr(torch, dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=kind)

    def outer(n: int, t: int, shape: tuple[int, ...]) -> OuterShare:
        return OuterShare(draw(n, t, shape[0]), draw(n, t, shape[1]))

    def rows(n: int, t: int, shape: tuple[int, ...]) -> RowShare:
        return RowShare(torch.randint(shape[0], (n, t)), draw(n, t, shape[1]), shape[0])

    parameters = []
    for info in make_infos(dtype):
        shares: list[Share | None] = []
        for m, (n, t) in enumerate(zip(sizes, positions, strict=True)):
            if info.name in ("outer", "one row"):
                shares.append(outer(n, t, info.shape))
            elif info.name == "embedding":
                shares.append(rows(n, t, info.shape))
            elif info.name == "tied":
                shares.append(SumShare([outer(n, t, info.shape), rows(n, t + 1, info.shape), rows(n, 1, info.shape)]))
            elif info.name == "tied and dense":
                shares.append(SumShare([outer(n, t, info.shape), DenseShare(draw(n, *info.shape))]))
            elif info.name == "heads":  # (heads, width, features) out of a matrix (heads * features, width)
                shares.append(OuterView(outer(n, t, (6, 7)), (2, 3, 7), (0, 2, 1)))
            elif info.name == "kernel":
                shares.append(ConvolutionShare(draw(n, 1, 6, t), draw(n, 1, 5, t + 2), (3,), (1,), (1,), 1))
            elif info.name == "sometimes":
                shares.append(outer(n, t, info.shape) if (number + m) % 2 else None)
            else:
                shares.append(DenseShare(draw(n, *info.shape)))
        scale: float | Tensor = draw(*info.shape).abs() + 0.1 if gains else -0.1 * (number + 1)
        parameters.append(ParameterShifts(info, scale, shares))
    return StepShifts(list(sizes), parameters, number)


def dense_shifts(steps: Sequence[StepShifts]) -> dict[str, np.ndarray]:
    """Write out all shifts of some steps by parameter, shape (occurrence, *shape)."""
    found: dict[str, list[np.ndarray]] = {info.name: [] for info in make_infos()}
    for step in steps:
        for parameter in step.parameters:
            for m, n in enumerate(step.n_samples):
                zeros = np.zeros((n, *parameter.info.shape))
                share = parameter.shares[m]
                found[parameter.info.name].append(zeros if share is None else parameter.shifts(m).numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def record_steps(path: Path, records: Sequence[Record], steps: Sequence[StepShifts], **options: object) -> Trace:
    """Write a trace of some steps as the tracer does."""
    infos = steps[0].parameters and [p.info for p in steps[0].parameters]
    specs = [spec for record in records for spec in record.arrays(infos)]
    writer = TraceWriter(path, params=parameter_table(infos), specs=specs, attrs={}, **options)  # type: ignore[arg-type]
    for step in steps:
        n, first, rows = step.n_occurrences, writer.n_occurrences, {}
        for record in records:
            if record.due(step.number):
                writer.declare(record.later_specs(step))
                rows |= record.rows(step, first)
        micro_batch = np.repeat(np.arange(len(step.n_samples), dtype=np.int32), step.n_samples)
        slot = np.concatenate([np.arange(size, dtype=np.int32) for size in step.n_samples])
        occurrences = {
            "micro_batch": micro_batch,
            "slot": slot,
            "rank": np.zeros(n, np.int32),
            "sample_id": np.arange(n, dtype=np.int64),
        }
        writer.append_step({"step": step.number, "lr": [0.1]}, occurrences, rows)
    writer.close(complete=True)
    return open_trace(path)

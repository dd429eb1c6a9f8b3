"""A small trace without a training: what tests of the store, the analyses and the report read.

Example:
    trace = write_trace(tmp_path / "a.zarr", n_steps=12, batch=4, k=8)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lightning_gradtrace.store import ArraySpec, Trace, TraceWriter, open_trace
from lightning_gradtrace.store.target import Target

SHAPES = {"layers.0.linear1.weight": (6, 5), "layers.0.linear2.weight": (5, 6), "layers.0.out_proj.weight": (5, 5)}


def params_table(shapes: dict[str, tuple[int, ...]] | None = None) -> pd.DataFrame:
    """Params table of made-up linear layers."""
    shapes = SHAPES if shapes is None else shapes
    numel = np.array([int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()], np.int64)
    offset = np.concatenate([[0], np.cumsum(numel)])[:-1].astype(np.int64)
    return pd.DataFrame(
        {
            "name": list(shapes),
            "shape": list(shapes.values()),
            "numel": numel,
            "offset": offset,
            "kind": ["linear"] * len(shapes),
            "module": [name.rpartition(".")[0] for name in shapes],
        }
    )


@dataclass
class Step:
    """Arguments of one `TraceWriter.append_step`."""

    step: dict[str, Any]
    occurrences: dict[str, np.ndarray]
    records: dict[str, np.ndarray]


@dataclass(frozen=True)
class Synthetic:
    """What a synthetic trace holds; the same numbers for the same fields.

    Attributes:
        n_steps: optimizer steps.
        batch: samples per step; the last step of an epoch has what is left of them.
        k: entries kept per occurrence.
        k_step: entries kept per step, for per="step" and "both".
        per: "sample", "step" or "both".
        n_samples: size of the data set, of which every epoch is a permutation.
        n_tokens: longest sample; they have one token at least.
        vocabulary: number of words.
        seed: of all random numbers.
    """

    n_steps: int = 10
    batch: int = 4
    k: int = 6
    k_step: int = 9
    per: str = "sample"
    n_samples: int = 18
    n_tokens: int = 7
    vocabulary: int = 11
    seed: int = 0
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = tuple(SHAPES.items())

    @property
    def params(self) -> pd.DataFrame:
        """Params table."""
        return params_table(dict(self.shapes))

    @property
    def n_entries(self) -> int:
        """Number of tracked weights."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def vocab(self) -> list[str]:
        """Words, one per token id."""
        return [f"word{token}" for token in range(self.vocabulary)]

    def specs(self, chunk_rows: int | None = None) -> list[ArraySpec]:
        """Arrays of the TopK records."""
        specs = []
        for group, axis, k in (("topk", "occurrence", self.k), ("topk_step", "step", self.k_step)):
            if self.per == "both" or (self.per == "step") == (axis == "step"):
                dims, tail = (axis, "k"), (k,)
                specs += [
                    ArraySpec(f"{group}/index", dims, tail, "uint32", "global entry number", "", "index", chunk_rows),
                    ArraySpec(f"{group}/shift", dims, tail, "float32", "shift of the weight", "", "float", chunk_rows),
                ]
                if axis == "step":
                    name = "topk_step/occurrence"
                    specs.append(ArraySpec(name, dims, tail, "int64", "occurrence", "", "plain", chunk_rows))
        return specs

    def texts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample ids, tokens padded with -1, and lengths of the whole data set."""
        rng = np.random.default_rng(self.seed)
        length = rng.integers(1, self.n_tokens + 1, self.n_samples).astype(np.int32)
        tokens = rng.integers(0, self.vocabulary, (self.n_samples, self.n_tokens)).astype(np.int32)
        tokens[np.arange(self.n_tokens) >= length[:, None]] = -1
        return np.arange(self.n_samples, dtype=np.int64), tokens, length

    def steps(self) -> Iterator[Step]:
        """Arguments of `append_step`, step by step."""
        rng = np.random.default_rng(self.seed + 1)
        n_entries = self.n_entries
        n_occurrences = epoch = 0
        left = rng.permutation(self.n_samples)
        for number in range(self.n_steps):
            if not len(left):
                left, epoch = rng.permutation(self.n_samples), epoch + 1
            ids, left = left[: self.batch], left[self.batch :]
            n = len(ids)
            records = {}
            if self.per in ("sample", "both"):
                chosen = [np.sort(rng.choice(n_entries, self.k, replace=False)) for _ in range(n)]
                records["topk/index"] = np.array(chosen, np.uint32).reshape(n, self.k)
                records["topk/shift"] = rng.standard_normal((n, self.k), np.float32)
            if self.per in ("step", "both"):
                flat = np.sort(rng.choice(n * n_entries, self.k_step, replace=False))
                records["topk_step/occurrence"] = flat[None] // n_entries + n_occurrences
                records["topk_step/index"] = (flat[None] % n_entries).astype(np.uint32)
                records["topk_step/shift"] = rng.standard_normal((1, self.k_step), np.float32)
            step = {
                "step": number,
                "epoch": epoch,
                "loss": float(rng.uniform(1, 5)),
                "lr": [0.1],
                "grad_norm": float(rng.uniform(0.1, 2)),
                "clip_factor": 1.0,
                "residual": float(rng.uniform(1e-8, 1e-6)) if number % 5 == 0 else np.nan,
            }
            zeros = np.zeros(n, np.int32)
            occurrences = {"micro_batch": zeros, "slot": np.arange(n, dtype=np.int32), "rank": zeros, "sample_id": ids}
            yield Step(step, occurrences, records)
            n_occurrences += n

    def weights(self, step: int) -> dict[str, np.ndarray]:
        """A weight snapshot."""
        rng = np.random.default_rng([self.seed, 2, step])
        return {name: rng.standard_normal(shape, np.float32) for name, shape in self.shapes}


def write_trace(
    target: Target,
    *,
    complete: bool = True,
    inputs: bool = True,
    weight_steps: tuple[int, ...] = (),
    chunk_rows: int | None = None,
    writer: dict[str, Any] | None = None,
    **options: Any,
) -> Trace:
    """Write a synthetic trace and open it.

    Args:
        target: where to.
        complete: value of the attribute.
        inputs: whether texts and vocabulary are kept.
        weight_steps: steps before which a snapshot is kept.
        chunk_rows: rows per chunk of the record.
        writer: further arguments of `TraceWriter`.
        options: fields of `Synthetic`.

    Returns:
        The trace.
    """
    content = Synthetic(**options)
    attrs = {"model": "synthetic", "quantity": "shift", "config": {"seed": content.seed}}
    out = TraceWriter(
        target,
        params=content.params,
        specs=content.specs(chunk_rows),
        attrs=attrs,
        vocab=content.vocab if inputs else None,
        **(writer or {}),
    )
    if inputs:
        sample_id, tokens, length = content.texts()
        out.append_samples(sample_id, tokens, length)
    for number, step in enumerate(content.steps()):
        if number in weight_steps:
            out.append_weights(number, content.weights(number))
        out.append_step(step.step, step.occurrences, step.records)
    if content.n_steps in weight_steps:
        out.append_weights(content.n_steps, content.weights(content.n_steps))
    out.close(complete=complete, end_reason=None if complete else "stopped by the test")
    return open_trace(target)

"""Small traces written with the real writer, and the plain Python lists they were made from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import zarr

from lightning_gradtrace.store import ArraySpec, Trace, TraceWriter, open_trace
from tests.synthetic import params_table

SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "b.in_proj_weight": (6, 2), "b.conv": (2, 1, 2), "c.weight": (4, 3)}


@dataclass
class Raw:
    """What a trace holds, as lists: the ground truth of every brute-force comparison."""

    trace: Trace
    step: list[int]
    sample_id: list[int]
    selected: list[list[int]]  # per occurrence
    text: dict[int, list[int]]  # by sample id, without padding
    offset: dict[str, int]


def write_trace(
    shapes: dict[str, tuple[int, ...]],
    sample_id: np.ndarray,  # (step, slot)
    index: np.ndarray,  # (occurrence, k), ascending rows
    *,
    shift: np.ndarray | None = None,
    text: dict[int, list[int]] | None = None,
    vocab: list[str] | None = None,
    per: str = "sample",
    steps_per_epoch: int = 4,
    record: bool = True,
    weights: dict[int, dict[str, np.ndarray]] | None = None,  # before which step
    to: Path | None = None,
) -> Trace:
    store = zarr.storage.MemoryStore() if to is None else to
    n_steps, batch = sample_id.shape
    k = index.shape[1]
    shift = np.ones(index.shape, np.float32) if shift is None else shift.astype(np.float32)
    if per == "sample":
        dims, tail, group = ("occurrence", "k"), (k,), "topk"
    else:
        dims, tail, group = ("step", "k"), (k * batch + 3,), "topk_step"  # with room for padding
    specs = [
        ArraySpec(f"{group}/index", dims, tail, "uint32", "entry", codec="index"),
        ArraySpec(f"{group}/shift", dims, tail, "float32", "shift"),
    ]
    if per == "step":
        specs.append(ArraySpec(f"{group}/occurrence", dims, tail, "int64", "occurrence"))
    specs = specs if record else []
    writer = TraceWriter(store, params=params_table(shapes), specs=specs, attrs={}, vocab=vocab)
    if text is not None:
        width = max(len(tokens) for tokens in text.values())
        padded = np.array([tokens + [-1] * (width - len(tokens)) for tokens in text.values()])
        writer.append_samples(np.array(list(text)), padded, np.array([len(tokens) for tokens in text.values()]))
    for number in range(n_steps):
        rows = slice(number * batch, (number + 1) * batch)
        if per == "sample":
            records = {"topk/index": index[rows].astype(np.uint32), "topk/shift": shift[rows]}
        else:
            pad = [(0, 0), (0, 3)]
            records = {
                "topk_step/index": np.pad(index[rows].reshape(1, -1), pad).astype(np.uint32),
                "topk_step/shift": np.pad(shift[rows].reshape(1, -1), pad),
                "topk_step/occurrence": np.pad(
                    np.repeat(np.arange(rows.start, rows.stop), k)[None], pad, constant_values=-1
                ),
            }
        slot = np.arange(batch)
        occurrences = {"micro_batch": slot * 0, "slot": slot, "rank": slot * 0, "sample_id": sample_id[number]}
        step = {"step": number, "epoch": number // steps_per_epoch, "lr": [0.1]}
        if weights and number in weights:
            writer.append_weights(number, weights[number])
        writer.append_step(step, occurrences, records if record else {})
    if weights and n_steps in weights:
        writer.append_weights(n_steps, weights[n_steps])
    writer.close(complete=True)
    return open_trace(store)


@cache
def random_trace(
    seed: int = 0,
    *,
    n_steps: int = 12,
    batch: int = 5,
    k: int = 7,
    n_samples: int = 15,
    n_tokens: int = 9,
    per: str = "sample",
    vocab: bool = True,
) -> Raw:
    """Uneven selections (low entries more often), texts of different lengths, ids that are no row numbers."""
    rng = np.random.default_rng(seed)
    n_entries = sum(int(np.prod(shape)) for shape in SHAPES.values())
    ids = rng.permutation(100)[:n_samples]
    sample_id = np.stack([rng.permutation(ids)[:batch] for _ in range(n_steps)])
    weight = 1.0 / np.arange(1, n_entries + 1)
    rows = [
        np.sort(rng.choice(n_entries, size=k, replace=False, p=weight / weight.sum())) for _ in range(sample_id.size)
    ]
    index = np.stack(rows)
    shift = rng.normal(size=index.shape)
    shift[rng.random(index.shape) < 0.05] = 0.0
    shift[3, 2] = np.nan
    shift[4, 1] = np.inf
    popularity = 1.0 / np.arange(1, n_tokens + 1)
    text = {
        int(i): (3 + rng.choice(n_tokens, size=rng.integers(4, 9), p=popularity / popularity.sum())).tolist()
        for i in ids
    }
    names = [f"w{token}" for token in range(3 + n_tokens)] if vocab else None
    trace = write_trace(SHAPES, sample_id, index, shift=shift, text=text, vocab=names, per=per)
    chosen = [
        [int(e) for e, s in zip(row, moves, strict=True) if s != 0 and np.isfinite(s)]
        for row, moves in zip(index, shift, strict=True)
    ]
    offset = dict(zip(SHAPES, params_table(SHAPES)["offset"].tolist(), strict=True))
    step = [number for number in range(n_steps) for _ in range(batch)]
    return Raw(trace, step, [int(i) for i in sample_id.reshape(-1)], chosen, text, offset)


def entry_name(raw: Raw, entry: int) -> tuple[str, int]:
    for name, shape in SHAPES.items():
        if entry < raw.offset[name] + int(np.prod(shape)):
            return name, entry - raw.offset[name]
    raise AssertionError(entry)

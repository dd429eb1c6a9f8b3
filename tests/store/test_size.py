"""Bytes per kept entry, on rows like those of the reference experiment."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_gradtrace.store import ArraySpec, TraceWriter
from tests.synthetic import params_table

K, SIDE, N_MATRICES = 1000, 200, 18


def kept_rows(n: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The K largest of 720,000 shifts, n times, sorted by index.

    "gaussian" entries are independent, which is the worst case for the indices; "outer" ones are products of 35
    cotangents and inputs per matrix, with rows and matrices of different size, as gradients are.
    """
    rng = np.random.default_rng(0)
    index, shift = np.empty((n, K), np.uint32), np.empty((n, K), np.float32)
    for i in range(n):
        if kind == "gaussian":
            dense = rng.standard_normal(N_MATRICES * SIDE * SIDE, np.float32)
        else:
            scale = np.exp(rng.standard_normal((N_MATRICES, SIDE, 1), np.float32))
            left = rng.standard_normal((N_MATRICES, SIDE, 35), np.float32) * scale
            dense = (left @ rng.standard_normal((N_MATRICES, 35, SIDE), np.float32)).ravel()
        chosen = np.sort(np.argpartition(-np.abs(dense), K)[:K])
        index[i], shift[i] = chosen, dense[chosen] * np.float32(1e-4)
    return index, shift


def reference_writer(target) -> TraceWriter:
    dims = ("occurrence", "k")
    specs = [
        ArraySpec("topk/index", dims, (K,), "uint32", "entry", codec="index"),
        ArraySpec("topk/shift", dims, (K,), "float32", "shift", codec="float"),
    ]
    params = params_table({f"layers.{i}.weight": (SIDE, SIDE) for i in range(N_MATRICES)})
    return TraceWriter(target, params=params, specs=specs, attrs={})


def append(writer: TraceWriter, step: int, index: np.ndarray, shift: np.ndarray) -> None:
    n = len(index)
    columns = {
        "micro_batch": np.zeros(n, np.int32),
        "slot": np.arange(n, dtype=np.int32),
        "rank": np.zeros(n, np.int32),
    }
    columns["sample_id"] = np.arange(n, dtype=np.int64) * 7919 % 58560
    values = {"step": step, "epoch": 0, "loss": 6.1, "lr": [5.0], "grad_norm": 0.7, "clip_factor": 0.71}
    writer.append_step(values, columns, {"topk/index": index, "topk/shift": shift})


@pytest.mark.parametrize("kind", ["gaussian", "outer"])
def test_kept_entry_takes_less_than_five_and_a_half_bytes(tmp_path, kind):
    index, shift = kept_rows(40, kind)
    writer = reference_writer(tmp_path / "a.zarr")
    for step in range(2):
        append(writer, step, index[20 * step : 20 * step + 20], shift[20 * step : 20 * step + 20])
    writer.close(complete=True)
    rows = sum(file.stat().st_size for file in (tmp_path / "a.zarr" / "topk").rglob("*") if file.is_file())
    print(f"{kind}: {rows / index.size:.3f} bytes per kept entry")
    assert rows / index.size < 5.5

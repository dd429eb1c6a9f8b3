"""Time and memory of the analyses on a trace of the reference run's size and on larger ones.

    python -m benchmarks.analysis --scales 1 10                # 15 GB of disk
    python -m benchmarks.analysis --scales 1 10 --size 0.1     # the same comparison on a tenth of it

Writes synthetic traces (292,800 occurrences x 1000 entries of 720,000 at scale 1; 58,560 texts of 35 tokens,
vocabulary 28,782) through the store's writer into a temporary directory, measures "the notable tokens of 5000 entries
and their neurons" in a process of its own, and removes them. A trace at scale s has s times the epochs over the same
texts. Popular entries are selected more often: the 5000 most frequent ones get a sixth of all selections.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lightning_gradtrace import analysis, open_trace
from lightning_gradtrace.store import ArraySpec, TraceWriter

WIDTH, N_MATRICES, BATCH, K = 200, 18, 20, 1000
N_SAMPLES, CONTEXT, VOCABULARY, EPOCHS = 58_560, 35, 28_782, 5
N_ENTRIES = N_MATRICES * WIDTH * WIDTH
# Occurrences that are drawn together.
_AT_ONCE = 2000


def params() -> pd.DataFrame:
    """Eighteen matrices of 200 x 200."""
    names = [f"layers.{i // 6}.part{i % 6}.weight" for i in range(N_MATRICES)]
    return pd.DataFrame(
        {
            "name": names,
            "shape": [(WIDTH, WIDTH)] * N_MATRICES,
            "numel": np.full(N_MATRICES, WIDTH * WIDTH),
            "offset": np.arange(N_MATRICES) * WIDTH * WIDTH,
            "kind": ["linear"] * N_MATRICES,
            "module": [name.removesuffix(".weight") for name in names],
        }
    )


def write(path: Path, scale: int, size: float = 1.0) -> None:
    """Write a trace of `scale` times 5 epochs; `size` below 1 has fewer samples."""
    rng = np.random.default_rng(0)
    n_samples = max(BATCH, int(N_SAMPLES * size) // BATCH * BATCH)
    specs = [
        ArraySpec("topk/index", ("occurrence", "k"), (K,), "uint32", "global entry number", codec="index"),
        ArraySpec("topk/shift", ("occurrence", "k"), (K,), "float32", "shift", codec="float"),
    ]
    vocab = [f"w{i}" for i in range(VOCABULARY)]
    writer = TraceWriter(path, params=params(), specs=specs, attrs={"model": "synthetic"}, vocab=vocab)
    popularity = 1 / np.arange(1, VOCABULARY + 1)
    texts = rng.choice(VOCABULARY, size=(n_samples, CONTEXT), p=popularity / popularity.sum())
    writer.append_samples(np.arange(n_samples), texts, np.full(n_samples, CONTEXT))
    place = rng.permutation(N_ENTRIES).astype(np.uint32)
    zeros, slot = np.zeros(BATCH, np.int32), np.arange(BATCH)
    number = 0
    for epoch in range(EPOCHS * scale):
        order = rng.permutation(n_samples)
        for start in range(0, n_samples, _AT_ONCE):
            ids = order[start : start + _AT_ONCE]
            index = select(rng, place, len(ids))
            shift = rng.standard_normal(index.shape, np.float32) * np.float32(1e-3)
            for first in range(0, len(ids), BATCH):
                rows = slice(first, first + BATCH)
                occurrences = {"micro_batch": zeros, "slot": slot, "rank": zeros, "sample_id": ids[rows]}
                step = {"step": number, "epoch": epoch, "loss": 5.0, "lr": [5.0]}
                writer.append_step(step, occurrences, {"topk/index": index[rows], "topk/shift": shift[rows]})
                number += 1
    writer.close(complete=True)


def select(rng: np.random.Generator, place: np.ndarray, n: int) -> np.ndarray:
    """Draw K different entries for each of n occurrences, the popular ones more often; (n, K), each row ascending."""
    drawn = np.sort((N_ENTRIES * rng.random((n, 3 * K // 2), np.float32) ** 3).astype(np.uint32), axis=1)
    again = np.zeros(drawn.shape, bool)
    np.equal(drawn[:, 1:], drawn[:, :-1], out=again[:, 1:])
    # Of the different ones, K at random: those with the smallest lots.
    lots = rng.random(drawn.shape, np.float32)
    lots[again] = 2.0
    chosen = np.argpartition(lots, K, axis=1)[:, :K]
    if np.take_along_axis(again, chosen, axis=1).any():
        raise RuntimeError(f"fewer than {K} different entries were drawn")
    return np.sort(place[np.take_along_axis(drawn, chosen, axis=1)], axis=1)


def measure(path: Path, more: bool) -> dict[str, Any]:
    """Run the analyses on a trace and time them."""
    found: dict[str, Any] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        result = call()
        found[name] = round(time.perf_counter() - start, 1)
        found[f"{name}, CPU"] = round(time.process_time() - cpu, 1)
        found[f"{name}, peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        return result

    trace = open_trace(path)
    start = time.perf_counter()
    entries = timed("frequent entries", lambda: analysis.frequent_entries(trace, 5000))
    notable = timed("notable tokens", lambda: analysis.notable_tokens(trace, entries))
    table = timed("neurons", lambda: analysis.neurons(trace, entries, notable))
    found["all"] = round(time.perf_counter() - start, 1)
    found |= {"occurrences": trace.n_occurrences, "neurons found": len(table), "tokens found": len(notable)}
    if more:
        timed("outliers of neurons", lambda: analysis.outliers(trace, "neuron"))
        timed("movement of neurons", lambda: analysis.movement(trace))
        timed("log-odds, neurons", lambda: analysis.notable_tokens(trace, None, by="neuron", method="log_odds"))
        timed("bigrams of 5000 entries", lambda: analysis.notable_tokens(trace, entries, ngram=2))
    return found


def main() -> None:
    """Write, measure and remove one trace after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=int, nargs="+", default=[1], help="times 5 epochs")
    parser.add_argument("--size", type=float, default=1.0, help="share of the samples, to try it out")
    parser.add_argument("--more", action="store_true", help="measure further analyses too")
    parser.add_argument("--folder", type=Path, help="where the temporary directory is made")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.more)))
        return
    rows = []
    for scale in args.scales:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder) / "trace.zarr"
            start = time.perf_counter()
            write(path, scale, args.size)
            written = {"scale": scale, "writing": round(time.perf_counter() - start, 1)}
            written["trace MB"] = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) // 1_000_000
            command = [sys.executable, "-m", "benchmarks.analysis", "--measure", str(path)]
            done = subprocess.run(
                [*command, *(["--more"] if args.more else [])], check=True, capture_output=True, text=True
            )
            rows.append(written | json.loads(done.stdout))
            print(json.dumps(rows[-1]), flush=True)
    print(pd.DataFrame(rows).T.to_string())


if __name__ == "__main__":
    main()

"""Throughput into the store, and codecs on real shifts.

    python -m benchmarks.store --rounds 5 --megabytes 256 --trace runs/a.zarr

Dense rows go through `TraceWriter`, and beside it into a raw file, NumPy's memmap, zarr-python with its defaults and,
where it is installed, tensorstore. All of them end with their data on the disk (fsync). The ways take turns, so that
other load falls on all of them. With ``--trace``, codecs are compared on the TopK record of that trace.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pandas as pd
import zarr

from lightning_gradtrace.store import ArraySpec, TraceWriter, open_trace

BATCH, SIDE = 16, 256


def rows(n: int) -> np.ndarray:
    """Shifts of one step, shape (n, SIDE, SIDE): products of a few factors, as gradients are."""
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((n, SIDE, 8), np.float32), rng.standard_normal((n, 8, SIDE), np.float32)
    return left @ right * np.float32(1e-4)


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def write_raw(folder: Path, block: np.ndarray, n_steps: int) -> None:
    """Append to one file."""
    with (folder / "a.bin").open("wb") as file:
        for _ in range(n_steps):
            file.write(block.data)
        file.flush()
        os.fsync(file.fileno())


def write_memmap(folder: Path, block: np.ndarray, n_steps: int) -> None:
    """Fill a memmap."""
    out = np.lib.format.open_memmap(folder / "a.npy", "w+", block.dtype, (n_steps * len(block), *block.shape[1:]))
    for step in range(n_steps):
        out[step * len(block) : (step + 1) * len(block)] = block
    out.flush()
    _sync(folder)


def write_zarr(folder: Path, block: np.ndarray, n_steps: int) -> None:
    """Append with zarr-python's defaults, one chunk for each step."""
    array = zarr.create_array(folder / "a.zarr", shape=(0, *block.shape[1:]), chunks=block.shape, dtype=block.dtype)
    for _ in range(n_steps):
        array.append(block)
    _sync(folder)


def write_tensorstore(folder: Path, block: np.ndarray, n_steps: int) -> None:
    """Write one uncompressed chunk for each step with tensorstore."""
    import tensorstore

    grid = {"name": "regular", "configuration": {"chunk_shape": list(block.shape)}}
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "a.zarr")}}
    shape = [n_steps * len(block), *block.shape[1:]]
    spec["metadata"] = {"shape": shape, "chunk_grid": grid, "data_type": "float32"}
    array = tensorstore.open(spec, create=True).result()
    for step in range(n_steps):
        array[step * len(block) : (step + 1) * len(block)].write(block).result()
    _sync(folder)


def write_trace(folder: Path, block: np.ndarray, n_steps: int) -> None:
    """Append steps with `TraceWriter`."""
    columns = ["name", "shape", "numel", "offset", "kind", "module"]
    params = pd.DataFrame([("w", block.shape[1:], block[0].size, 0, "linear", "")], columns=columns)
    dims = ("occurrence", "w.0", "w.1")
    spec = ArraySpec("dense/w/shift", dims, block.shape[1:], "float32", "shift of w", codec="float")
    writer = TraceWriter(folder / "a.zarr", params=params, specs=[spec], attrs={}, queue_bytes=64 * 2**20)
    n = len(block)
    of_step = {name: np.zeros(n, np.int32) for name in ("micro_batch", "rank", "slot")}
    for step in range(n_steps):
        ids = {"sample_id": np.arange(n, dtype=np.int64)}
        writer.append_step({"step": step}, {**of_step, **ids}, {"dense/w/shift": block})
    writer.close(complete=True)


def throughput(rounds: int, megabytes: int, folder: Path) -> pd.DataFrame:
    """Measure seconds of every way, one row per round."""
    ways: dict[str, Callable[[Path, np.ndarray, int], None]] = {
        "raw file": write_raw,
        "GradTrace": write_trace,
        "numpy memmap": write_memmap,
        "zarr-python, defaults": write_zarr,
    }
    if importlib.util.find_spec("tensorstore") is not None:
        ways["tensorstore, uncompressed"] = write_tensorstore
    block = rows(BATCH)
    n_steps = max(1, megabytes * 10**6 // block.nbytes)
    taken = []
    for number in range(rounds + 1):
        seconds = {}
        names = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in names:
            place = folder / "out"
            place.mkdir()
            start = time.perf_counter()
            ways[name](place, block, n_steps)
            seconds[name] = time.perf_counter() - start
            shutil.rmtree(place)
        if number:  # the first round warms up
            taken.append({name: n_steps * block.nbytes / 1e6 / s for name, s in seconds.items()})
    return pd.DataFrame(taken)


def codecs() -> dict[str, Any]:
    """Return the codecs that are compared, by name."""
    made: dict[str, Any] = {
        f"blosc, {cname} {level}, {name}": numcodecs.Blosc(cname, level, shuffle, 2**20)
        for cname, level in (("zstd", 1), ("zstd", 5), ("lz4", 5))
        for name, shuffle in (("bytes", numcodecs.Blosc.SHUFFLE), ("bits", numcodecs.Blosc.BITSHUFFLE))
    }
    made["zstd 3"] = numcodecs.Zstd(3)
    if importlib.util.find_spec("pcodec") is not None:
        from numcodecs.pcodec import PCodec

        made["pcodec 8"] = PCodec(level=8)
    return made


def compare_codecs(trace: Path) -> pd.DataFrame:
    """Compress chunks of a trace's TopK record; bytes per number, and speeds in MB/s of raw numbers."""
    view = open_trace(trace)
    rounded = numcodecs.BitRound(keepbits=7)
    lines = []
    for path in ("topk/index", "topk/shift"):
        chunk = view.read(path, 0, min(1000, view.n_occurrences))
        variants = {"": chunk}
        if chunk.dtype.kind == "f":
            variants[", rounded to 7 bits"] = rounded.encode(chunk).view(chunk.dtype).reshape(chunk.shape)
        for how, values in variants.items():
            for name, codec in codecs().items():
                start = time.perf_counter()
                packed = codec.encode(np.ascontiguousarray(values.ravel()))
                middle = time.perf_counter()
                codec.decode(packed)
                end = time.perf_counter()
                size = values.nbytes / 1e6
                lines.append(
                    {
                        "array": path + how,
                        "codec": name,
                        "bytes per number": len(bytes(packed)) / values.size,
                        "write MB/s": size / (middle - start),
                        "read MB/s": size / (end - middle),
                    }
                )
    return pd.DataFrame(lines)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256, help="raw size that every way writes")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--trace", type=Path, help="a trace with TopK(per='sample'), for the codecs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rates = throughput(arguments.rounds, arguments.megabytes, Path(folder))
    ratios = rates.div(rates["raw file"], axis=0)
    table = pd.DataFrame({"MB/s": rates.median(), "x raw": ratios.median(), "lowest": ratios.min()})
    print(table.assign(highest=ratios.max()).round(3).to_string())
    if arguments.trace is not None:
        print(compare_codecs(arguments.trace).round(3).to_string(index=False))


if __name__ == "__main__":
    main()

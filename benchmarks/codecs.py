"""Codecs on real shifts: bytes per number, and how fast a chunk is written and read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pandas as pd
from numcodecs.pcodec import PCodec

from lightning_gradtrace import Trace
from lightning_gradtrace.record.dense import round_bits

DENSE_BYTES, TOPK_BYTES = 256_000, 4_000_000
"""Raw size of what is compressed at once, as in the store: inner chunks of Dense, chunks of TopK."""


def codecs() -> dict[str, Any]:
    """Return what is compared, by name; None stands for no compression."""
    shuffles = (("bytes", numcodecs.Blosc.SHUFFLE), ("bits", numcodecs.Blosc.BITSHUFFLE))
    made: dict[str, Any] = {"none": None}
    for cname, level in (("lz4", 1), ("lz4", 5), ("zstd", 1), ("zstd", 5)):
        for name, shuffle in shuffles:
            made[f"blosc {cname} {level}, {name}"] = numcodecs.Blosc(cname, level, shuffle, 2**20)
    made["zstd 3"] = numcodecs.Zstd(3)
    made["pcodec 8"] = PCodec(level=8)
    return made


def numbers(trace: Trace) -> dict[str, np.ndarray]:
    """Return the numbers that are compressed, by name: whole records, as they follow each other in the store."""
    dense = np.concatenate([trace.dense[name][:].ravel() for name in trace.dense])
    found = {"Dense": dense, "Dense(keep_bits=7)": round_bits(dense, 7)}
    return found | {f"TopK, {name}": trace.read(f"topk/{name}").ravel() for name in ("shift", "index")}


def compare(trace: Trace, rounds: int = 3) -> pd.DataFrame:
    """Compress and decompress the numbers of a trace chunk by chunk, checksums included.

    Args:
        trace: a trace with Dense and TopK.
        rounds: how often; the fastest one counts, because everything else is other load.

    Returns:
        One row per kind of numbers and codec: bytes per number, and MB of numbers per second of CPU.
    """
    lines = []
    for what, values in numbers(trace).items():
        chunks = list(_chunks(values, DENSE_BYTES if what.startswith("Dense") else TOPK_BYTES))
        for name, codec in codecs().items():
            packed, back, seconds = _round_trip(codec, chunks, rounds)
            same = all(bytes(a) == b.tobytes() for a, b in zip(back, chunks, strict=True))
            assert same, f"{name} does not return the numbers of {what}"
            size = sum(map(len, packed)) / values.size
            lines.append((what, name, size, values.itemsize / size, *(values.nbytes / 1e6 / seconds)))
    columns = ["numbers", "codec", "bytes per number", "ratio", "write MB/s", "read MB/s"]
    return pd.DataFrame(lines, columns=columns)


def _round_trip(codec: Any, chunks: list[np.ndarray], rounds: int) -> tuple[list[bytes], list[Any], np.ndarray]:
    """Return encoded and decoded chunks, and the seconds that each direction took."""
    seconds = np.full(2, np.inf)
    for _ in range(rounds):
        start = time.process_time()
        packed = [_encode(codec, chunk) for chunk in chunks]
        middle = time.process_time()
        back = [_decode(codec, data) for data in packed]
        seconds = np.minimum(seconds, [middle - start, time.process_time() - middle])
    return packed, back, seconds


def _chunks(values: np.ndarray, n_bytes: int) -> Iterator[np.ndarray]:
    size = n_bytes // values.itemsize
    return (values[start : start + size] for start in range(0, len(values), size))


def _encode(codec: Any, chunk: np.ndarray) -> bytes:
    data = chunk.tobytes() if codec is None else bytes(codec.encode(chunk))
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


def _decode(codec: Any, data: bytes) -> Any:
    content = data[:-4]
    if int(google_crc32c.value(content)) != int.from_bytes(data[-4:], "little"):
        raise ValueError("the checksum does not match")
    return content if codec is None else codec.decode(content)

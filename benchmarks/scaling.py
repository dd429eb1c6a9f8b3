"""Overhead against batch size, sequence length, width, depth and the number of entries kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from benchmarks.timing import interleaved, table
from benchmarks.workloads import Setting, Workload

AXES = ("batch", "length", "width", "depth", "k")
FACTORS = (0.25, 0.5, 1.0, 2.0)


def scaled(workload: Workload, k: int, axis: str, factor: float) -> tuple[Workload, int]:
    """Return the workload and k with one size times a factor; the MLP and the heads follow the width."""
    if axis == "k":
        return workload, max(1, int(k * factor))
    size = max(1, int(getattr(workload, axis) * factor))
    if axis != "width":
        return replace(workload, **{axis: size}), k
    heads = max(1, int(workload.n_heads * factor))
    size = size // heads * heads
    return replace(workload, width=size, n_heads=heads, hidden=max(1, int(workload.hidden * factor))), k


def scaling(setting: Setting, rounds: int, axes: Sequence[str]) -> pd.DataFrame:
    """Measure GradTrace beside plain training for several sizes along each axis.

    Args:
        setting: the sizes to begin with.
        rounds: rounds per size.
        axes: which sizes to vary.

    Returns:
        A row per size: axis, size, seconds per step of plain training, ratio with its lowest and highest value.
    """
    rows = []
    for axis in axes:
        for factor in FACTORS:
            workload, k = scaled(setting.workload, setting.k, axis, factor)
            changed = replace(setting, workload=workload, k=k)
            found = table(interleaved(changed, rounds, changed.ours)[0])
            size = k if axis == "k" else getattr(workload, axis)
            row = {"axis": axis, "size": size, "plain, s": found.loc["plain", "seconds per step"]}
            rows.append({**row, **found.loc[changed.ours, ["x plain", "lowest", "highest"]].to_dict()})
    return pd.DataFrame(rows)

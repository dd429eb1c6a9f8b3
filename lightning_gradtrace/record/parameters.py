"""The tracked parameters as a trace lists them: one row each, and a global number for every entry."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lightning_gradtrace.capture.parameters import TrackedParameter
from lightning_gradtrace.capture.shares import accumulation_dtype
from lightning_gradtrace.record._base import ParameterInfo


def parameter_infos(tracked: Sequence[TrackedParameter]) -> list[ParameterInfo]:
    """Number the entries of the tracked parameters: the rows of the params table."""
    infos, offset = [], 0
    for p in tracked:
        dtype = str(accumulation_dtype(p.tensor.dtype)).removeprefix("torch.")
        infos.append(ParameterInfo(p.name, tuple(p.tensor.shape), offset, p.kind, p.module, dtype))
        offset += infos[-1].numel
    return infos


def parameter_table(infos: Sequence[ParameterInfo]) -> pd.DataFrame:
    """Return the params table as the store keeps it: name, shape, numel, offset, kind, module."""
    columns = ("name", "shape", "numel", "offset", "kind", "module")
    return pd.DataFrame([{column: getattr(info, column) for column in columns} for info in infos], columns=columns)

"""The params table: which weight a global entry number stands for."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np
import pandas as pd

COLUMNS = ("name", "shape", "numel", "offset", "kind", "module")


def params_arrays(params: pd.DataFrame) -> dict[str, np.ndarray]:
    """Turn a params table into the arrays of ``params/``.

    Args:
        params: one row per tracked parameter with the columns name, shape, numel, offset, kind, module.

    Returns:
        Arrays by path; strings as objects, shapes as JSON.

    Raises:
        ValueError: if a column is missing or offsets don't number the entries without gaps.
    """
    missing = [name for name in COLUMNS if name not in params.columns]
    if missing:
        raise ValueError(
            f"`params` has the columns {list(params.columns)}; {missing} missing, expected {list(COLUMNS)}"
        )
    check_numbering(params)
    shapes = [tuple(int(n) for n in shape) for shape in params["shape"]]
    strings = {
        "name": list(params["name"]),
        "shape": [json.dumps(shape) for shape in shapes],
        "kind": list(params["kind"]),
        "module": list(params["module"]),
    }
    arrays = {f"params/{name}": np.array([str(v) for v in values], object) for name, values in strings.items()}
    return {**arrays, **{f"params/{name}": np.asarray(params[name], np.int64) for name in ("numel", "offset")}}


def check_numbering(params: pd.DataFrame) -> None:
    """Check that the entries are numbered through the parameters, without gaps.

    Args:
        params: one row per tracked parameter with the columns param or name, shape, numel, offset.

    Raises:
        ValueError: if they are not; the message names the parameter.
    """
    expected, names = 0, params["param" if "param" in params else "name"]
    for name, shape, n, at in zip(names, params["shape"], params["numel"], params["offset"], strict=True):
        size = math.prod(int(length) for length in shape)
        if (size, expected) != (n, at) or expected + size >= 2**63:
            raise ValueError(
                f"`{name}` of shape {tuple(shape)} has numel={n} and offset={at}; expected numel={size} "
                f"and offset={expected}: entries are numbered through the parameters in the order of the table"
            )
        expected += size


def params_digest(arrays: dict[str, np.ndarray]) -> str:
    """Hash a params table with SHA-256; two runs that share it number their entries alike.

    Args:
        arrays: the table in the form of `params_arrays`.

    Returns:
        Hexadecimal digest.
    """
    rows: list[list[Any]] = [arrays[f"params/{name}"].tolist() for name in COLUMNS]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

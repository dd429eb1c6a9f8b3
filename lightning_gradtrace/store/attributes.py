"""Root attributes: plain JSON, whatever numbers and containers come in."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def plain_attributes(value: Any, path: str = "attrs") -> Any:
    """Turn attributes into what JSON can hold without loss of meaning.

    NumPy scalars and arrays become numbers and lists, paths become strings, and NaN and infinities become the strings
    that Zarr uses for them.

    Example:
        >>> plain_attributes({"lr": np.float32(0.5), "shape": (2, 3), "clip": float("inf")})
        {'lr': 0.5, 'shape': [2, 3], 'clip': 'Infinity'}

    Args:
        value: the attributes.
        path: where they stand, for messages.

    Returns:
        The same out of dicts, lists, strings, numbers, booleans and None.

    Raises:
        ValueError: if a value can't be held.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain_attributes(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray):
        return [plain_attributes(item, f"{path}[{i}]") for i, item in enumerate(value)]
    raise ValueError(
        f"`{path}` is a {type(value).__name__}; expected what JSON can hold: convert it to text or numbers"
    )

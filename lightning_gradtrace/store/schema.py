"""Every array of a trace, declared once: path, axes, type, meaning. This is the store format in code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

ENCODING_TYPE = "gradtrace"
ENCODING_VERSION = "1.3"

AXES = ("step", "occurrence", "sample", "snapshot")
"""Axes that grow while a run is recorded; the first axis of every recorded array is one of them."""

ON_OPEN = -1
"""Length in `ArraySpec.shape_tail` that is only known when the trace is opened or that grows."""

CHUNK_BYTES = 4_000_000
"""Raw size of a chunk where a spec doesn't fix the number of rows."""

COLUMN_ROWS = 16_384
"""Rows per chunk of columns of single numbers: every commit writes their last chunk anew."""

MAX_CHUNK_BYTES = 64_000_000
"""Raw size over which one row is split into several chunks."""

Scalar = float | int | bool | str
Codec = Literal["index", "float", "fast", "small", "none", "plain"]


@dataclass(frozen=True)
class ArraySpec:
    """Declaration of one array of a trace.

    Example:
        >>> spec = ArraySpec("topk/index", ("occurrence", "k"), (1000,), "uint32", "global entry number", codec="index")
        >>> spec.axis, spec.group, spec.name, spec.chunk_shape
        ('occurrence', 'topk', 'index', (1000, 1000))

    Attributes:
        path: place in the Zarr hierarchy, ``group/name`` or deeper.
        dims: names of the axes; becomes ``dimension_names``.
        shape_tail: lengths of all axes but the first; `ON_OPEN` where not known in advance.
        dtype: name of a NumPy dtype, or "str".
        long_name: what the numbers mean.
        units: their unit; empty where there is none.
        codec: "index" for row-wise ascending integers, "float" for many floats; "fast" and "small" take less time or
            less room than it, "none" doesn't compress; else "plain".
        chunk_rows: rows per chunk; None chooses chunks of about `CHUNK_BYTES`.
        own_rows: whether not every step or occurrence has a row; then the array ``<group>/<axis>`` beside it lists the
            steps or occurrences that have one (docs/store-format.md, "Rows of a record").
        grows: whether the second axis grows with the widest row; its length in ``shape_tail`` is the chunk's width.
        fill: padding, where it is not `fill_value`'s default.
        inner_rows: rows of the inner chunks of a sharded array; None for an array that isn't sharded.
        attrs: further attributes of the array, as JSON holds them.
    """

    path: str
    dims: tuple[str, ...]
    shape_tail: tuple[int, ...]
    dtype: str
    long_name: str
    units: str = ""
    codec: Codec = "plain"
    chunk_rows: int | None = None
    own_rows: bool = False
    grows: bool = False
    fill: Scalar | None = None
    inner_rows: int | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check that axes and lengths fit together."""
        if len(self.dims) != 1 + len(self.shape_tail):
            raise ValueError(
                f"`{self.path}` has {len(self.dims)} dims {self.dims} but a shape_tail of {len(self.shape_tail)} axes; "
                "expected one dim more than shape_tail has lengths"
            )
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise ValueError(f"`{self.path}` has chunk_rows={self.chunk_rows}; expected at least 1, or None")
        if self.grows and (not self.shape_tail or self.inner_rows is not None):
            raise ValueError(f"`{self.path}` grows; expected a second axis, and no shards")

    @property
    def axis(self) -> str:
        """Name of the first axis, along which rows are appended."""
        return self.dims[0]

    @property
    def counter(self) -> str:
        """Name in ``committed`` of the number of rows: the axis, or the group where it has rows of its own."""
        return self.group if self.own_rows else self.axis

    @property
    def group(self) -> str:
        """Path of the group that holds the array."""
        return self.path.rpartition("/")[0]

    @property
    def name(self) -> str:
        """Name of the array inside its group."""
        return self.path.rpartition("/")[2]

    @property
    def fill_value(self) -> Scalar:
        """Value of padding: NaN, -1, the largest unsigned number, False or the empty string, or `fill`."""
        if self.fill is not None:
            return self.fill
        if self.dtype == "str":
            return ""
        dtype = np.dtype(self.dtype)
        if dtype.kind == "u":
            return int(np.iinfo(dtype).max)
        return {"f": math.nan, "i": -1, "b": False}[dtype.kind]

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of a chunk: whole rows, unless one row is larger than `MAX_CHUNK_BYTES`."""
        itemsize = 8 if self.dtype == "str" else np.dtype(self.dtype).itemsize
        tail = [max(1, n) for n in self.shape_tail]
        row = itemsize * math.prod(tail)
        for axis in range(len(tail)):
            while row > MAX_CHUNK_BYTES and tail[axis] > 1:
                tail[axis] = (tail[axis] + 1) // 2
                row = itemsize * math.prod(tail)
        rows = self.chunk_rows or max(1, CHUNK_BYTES // row)
        if self.inner_rows is not None:
            rows = -(-rows // self.inner_rows) * self.inner_rows
        return (rows, *tail)

    @property
    def inner_shape(self) -> tuple[int, ...] | None:
        """Shape of the inner chunks of a shard, None for an array that isn't sharded."""
        return None if self.inner_rows is None else (self.inner_rows, *self.chunk_shape[1:])


def _step(name: str, dtype: str, long_name: str, units: str = "") -> ArraySpec:
    return ArraySpec(f"steps/{name}", ("step",), (), dtype, long_name, units, chunk_rows=4096)


def _occurrence(name: str, dtype: str, long_name: str) -> ArraySpec:
    return ArraySpec(f"occurrences/{name}", ("occurrence",), (), dtype, long_name, chunk_rows=COLUMN_ROWS)


def _param(name: str, dtype: str, long_name: str) -> ArraySpec:
    return ArraySpec(f"params/{name}", ("param",), (), dtype, long_name, chunk_rows=4096)


STEP_SPECS = (
    _step("step", "int64", "number of the optimizer step, from 0"),
    _step("epoch", "int32", "epoch of the step"),
    _step("optimizer", "int32", "number of the optimizer that made the step, in the order of `configure_optimizers`"),
    _step("loss", "float64", "loss that was back-propagated, mean over the micro-batches"),
    ArraySpec(
        "steps/lr", ("step", "group"), (ON_OPEN,), "float64", "learning rate of each parameter group", "", "plain", 4096
    ),
    ArraySpec(
        "steps/momentum",
        ("step", "group"),
        (ON_OPEN,),
        "float64",
        "momentum, or first beta, of each parameter group; 0 for none",
        "",
        "plain",
        4096,
    ),
    _step("grad_norm", "float64", "norm of the gradient over all parameters, before clipping"),
    _step("clip_factor", "float64", "factor by which norm clipping scaled the gradient; 1 where it did nothing"),
    _step("residual", "float64", "relative residual of the ledger; NaN where it was not computed"),
    _step("rounding", "float64", "residual that rounding of the weights alone can leave; NaN where not computed"),
    _step("sum_error", "float64", "relative error of the sum of shares against .grad; NaN where it was not computed"),
    _step("half_precision", "bool", "whether gradients of tracked parameters were computed in half precision"),
    _step("nonfinite", "int64", "number of kept entries that are NaN or infinite"),
    _step("skipped", "bool", "whether the optimizer skipped the step (overflow under fp16 AMP)"),
    _step("n_occurrences", "int32", "number of occurrences of the step"),
)

OCCURRENCE_SPECS = (
    _occurrence("step", "int64", "optimizer step at which the sample was seen"),
    _occurrence("micro_batch", "int32", "micro-batch inside the step"),
    _occurrence("slot", "int32", "position of the sample in its micro-batch"),
    _occurrence("rank", "int32", "rank of the process that saw the sample"),
    _occurrence("sample_id", "int64", "item of the training data set"),
)

INPUT_SPECS = (
    ArraySpec("inputs/sample_id", ("sample",), (), "int64", "item of the training data set", chunk_rows=COLUMN_ROWS),
    ArraySpec("inputs/length", ("sample",), (), "int32", "number of tokens of the sample", chunk_rows=COLUMN_ROWS),
    ArraySpec(
        "inputs/tokens",
        ("sample", "position"),
        (ON_OPEN,),
        "int32",
        "token ids, padded with -1",
        chunk_rows=4096,
        grows=True,
    ),
)

VOCAB_SPEC = ArraySpec("inputs/vocab", ("token",), (), "str", "text of each token id", chunk_rows=65536)

PARAM_SPECS = (
    _param("name", "str", "name in named_parameters()"),
    _param("shape", "str", "shape of the parameter, as JSON"),
    _param("numel", "int64", "number of weights of the parameter"),
    _param("offset", "int64", "global entry number of the parameter's first weight"),
    _param("kind", "str", "what the parameter belongs to"),
    _param("module", "str", "dotted name of the module that owns the parameter"),
)

FACTORED_GROUPS = ("factored", "factored_rows", "factored_dense", "factored_scale", "factored_gain", "factored_steps")
"""Root groups of a Factored record. They stand side by side because each has rows of its own, and xarray wants the rows
of a group inside another one to be those of the outer one."""

WEIGHT_STEP_SPEC = ArraySpec(
    "weights/step", ("snapshot",), (), "int64", "step before which the snapshot was taken", chunk_rows=4096
)

RANK_SPEC = ArraySpec("ranks/rank", ("rank",), (), "int32", "rank that wrote the part `ranks/<rank>`", chunk_rows=4096)
"""Only at the root of a trace that several ranks wrote (docs/store-format.md, "Several ranks")."""

CORE_SPECS = (*PARAM_SPECS, *STEP_SPECS, *OCCURRENCE_SPECS, *INPUT_SPECS, VOCAB_SPEC, WEIGHT_STEP_SPEC, RANK_SPEC)
"""The fixed arrays of a trace. Records add theirs; `weight_spec` declares those of the weight snapshots."""


def coordinate_spec(group: str, axis: str) -> ArraySpec:
    """Declare the array that says which steps or occurrences the rows of a group belong to.

    Example:
        >>> coordinate_spec("topk", "occurrence").path
        'topk/occurrence'

    Args:
        group: a group whose arrays have rows of their own.
        axis: "occurrence" or "step".

    Returns:
        The declaration.
    """
    meaning = {"occurrence": "occurrence that the row belongs to", "step": "optimizer step that the row belongs to"}
    path = f"{group}/{axis}"
    return ArraySpec(path, (axis,), (), "int64", meaning[axis], chunk_rows=COLUMN_ROWS, own_rows=True)


def weight_spec(param: str, shape: tuple[int, ...], dtype: str) -> ArraySpec:
    """Declare the snapshots of one parameter, array ``weights/values/<param>`` of shape (snapshot, *shape).

    Example:
        >>> weight_spec("fc.weight", (3, 2), "float32").dims
        ('snapshot', 'fc.weight.0', 'fc.weight.1')

    Args:
        param: name of the parameter.
        shape: its shape.
        dtype: its dtype.

    Returns:
        The declaration; axes carry the parameter's name, so that snapshots of many parameters fit into one dataset.
    """
    dims = ("snapshot", *(f"{param}.{axis}" for axis in range(len(shape))))
    path = f"weights/values/{escape(param)}"
    return ArraySpec(path, dims, tuple(shape), dtype, f"weights of {param}", "", "float", chunk_rows=1)


def with_own_rows(specs: Iterable[ArraySpec]) -> list[ArraySpec]:
    """Give the arrays of a record rows of their own, and add the array that lists them to every group.

    Args:
        specs: arrays of one or more groups; those of one group share their first axis.

    Returns:
        The coordinates and the arrays.
    """
    own = [replace(spec, own_rows=True) for spec in specs]
    coordinates = {spec.group: coordinate_spec(spec.group, spec.axis) for spec in own}
    return [*coordinates.values(), *own]


def escape(param: str) -> str:
    """Turn a parameter's name into a Zarr node name: only ``%`` and ``/`` change, to ``%25`` and ``%2F``.

    Example:
        >>> escape("layers.0.weight"), escape("a/b")
        ('layers.0.weight', 'a%2Fb')
    """
    return param.replace("%", "%25").replace("/", "%2F")


def unescape(node: str) -> str:
    """Turn a Zarr node name back into the parameter's name.

    Example:
        >>> unescape(escape("a%2F/b"))
        'a%2F/b'
    """
    return node.replace("%2F", "/").replace("%25", "%")

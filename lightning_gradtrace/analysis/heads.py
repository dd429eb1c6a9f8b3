"""Which entries of which weights make up an attention head?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import IntArray

if TYPE_CHECKING:
    from torch import nn

    from lightning_gradtrace.store import Trace

QUERY, KEY, VALUE, OUTPUT = "query", "key", "value", "output"
COLUMNS = ["module", "head", "part", "param", "axis", "start", "stop"]

# Last parts of a parameter's name -> its parts, in the order of its rows or columns, and the axis of the heads.
_PACKED = ((QUERY, KEY, VALUE), 0)
_LAYOUTS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    (r"in_proj_weight", *_PACKED),
    (r"q_proj_weight", (QUERY,), 0),
    (r"k_proj_weight", (KEY,), 0),
    (r"v_proj_weight", (VALUE,), 0),
    (r"(q_proj|query|q_lin|wq)\.weight", (QUERY,), 0),
    (r"(k_proj|key|k_lin|wk)\.weight", (KEY,), 0),
    (r"(v_proj|value|v_lin|wv)\.weight", (VALUE,), 0),
    (r"(out_proj|o_proj|out_lin|wo)\.weight", (OUTPUT,), 1),
    # Conv1D of GPT-2: weights of shape (in, out)
    (r"c_attn\.weight", (QUERY, KEY, VALUE), 1),
    (r"(?<=attn\.)c_proj\.weight", (OUTPUT,), 0),
)
# Weights with the heads as an axis of their own: (heads, d, d_head) and (heads, d_head, d).
_EINSUM = {"q": QUERY, "k": KEY, "v": VALUE, "o": OUTPUT}
_EINSUM_NAME = re.compile(r"(?:^|[._])w_?([qkvo])(?:[._]weight)?$", re.IGNORECASE)


def attention_heads(
    trace: Trace | pd.DataFrame, n_heads: int | Mapping[str, int] | None = None, *, model: nn.Module | None = None
) -> pd.DataFrame:
    """Find the attention heads among tracked weights.

    Known layouts: `torch.nn.MultiheadAttention` (packed `in_proj_weight` of shape (3 E, E): blocks of rows for queries,
    keys and values, in each of them E / heads rows per head; separate `q_proj_weight` ...; columns of
    `out_proj.weight`), separate linear layers (`q_proj`, `query`, `wq` and so on; fewer key and value heads than
    query heads are told from the shapes), the packed Conv1D of GPT-2, and einsum style (`W_Q` (heads, d, d_head), ...,
    `W_O` (heads, d_head, d)). Other layouts: make the table by hand, it is only read by its columns.

    Source: the layouts of torch.nn, Hugging Face transformers and TransformerLens.

    Args:
        trace: an open trace, or its table `trace.params`.
        n_heads: number of (query) heads of all modules, or by glob on the module's name, e.g. `{"encoder.*": 4}`.
            Einsum-style weights need none.
        model: asked for the number of heads where `n_heads` says nothing: attributes `num_heads`,
            `num_attention_heads` or `n_heads` of a module, or of its `config`.

    Returns:
        One row per block, in the order of the model: `module`, `head`, `part` ("query", "key", "value", "output"),
        `param`, `axis` (of the parameter), `start`, `stop`: the weights of this part of the head have coordinates
        `start` to `stop` - 1 along this axis. With fewer key and value heads, `head` of their blocks counts these.

    Raises:
        ValueError: the number of heads is unknown, or does not divide the axis.

    Example:
        >>> params = pd.DataFrame({"param": ["a.in_proj_weight"], "shape": [(12, 4)]})
        >>> print(attention_heads(params, 2)[["head", "part", "start", "stop"]].to_string(index=False))
         head  part  start  stop
            0 query      0     2
            0   key      4     6
            0 value      8    10
            1 query      2     4
            1   key      6     8
            1 value     10    12
    """
    params = trace if isinstance(trace, pd.DataFrame) else trace.params
    shapes = {str(p): tuple(s) for p, s in zip(params["param"], params["shape"], strict=True)}
    sizes = {} if model is None else _sizes_of(model)
    rows: list[tuple[Any, ...]] = []
    for name, shape in shapes.items():
        einsum = _EINSUM_NAME.search(name)
        if einsum and len(shape) == 3:
            part = _EINSUM[einsum.group(1).lower()]
            rows += [(name[: einsum.start()], h, part, name, 0, h, h + 1) for h in range(shape[0])]
            continue
        found = _layout(name) if len(shape) == 2 else None
        if found is None:
            continue
        module, parts, axis = found
        if not _is_attention(module, shapes):
            continue
        heads = _number(module, n_heads, sizes)
        query = _query_size(module, shapes)
        block, remainder = divmod(shape[axis], len(parts))
        width = query // heads if query else block // heads
        if remainder or not width or (query or block) % heads or block % width:
            raise ValueError(
                f"`{name}` has shape {shape}, and axis {axis} can't be split into {len(parts)} x {heads} equal heads; "
                f"give the right `n_heads` for the module `{module}`"
            )
        for head in range(block // width):
            for number, part in enumerate(parts):
                start = number * block + head * width
                rows.append((module, head, part, name, axis, start, start + width))
    return pd.DataFrame(rows, columns=COLUMNS)


def head_rows(trace: Trace, heads: pd.DataFrame, numbers: IntArray) -> IntArray:
    """Find the block that each entry lies in.

    Args:
        trace: an open trace.
        heads: table of `attention_heads`.
        numbers: (e,) global entry numbers.

    Returns:
        (e,) row number in `heads`, -1 outside all heads.

    Raises:
        ValueError: a column is missing, a parameter is not tracked, or blocks overlap.
    """
    missing = set(COLUMNS) - set(heads.columns)
    if missing:
        raise ValueError(f"`heads` lacks the columns {sorted(missing)}; pass the table of `attention_heads`")
    known = {p.param: p for p in _access.shapes(trace)}
    found = np.full(len(numbers), -1, dtype=np.int64)
    for place, one in enumerate(heads.to_dict("records")):
        name, axis = str(one["param"]), int(one["axis"])
        if name not in known:
            raise ValueError(f"`heads` names `{name}`, which this trace doesn't track; make it from the same trace")
        shape = known[name].shape
        index = numbers - known[name].offset
        inside = np.flatnonzero((index >= 0) & (index < int(np.prod(shape))))
        stride = int(np.prod(shape[axis + 1 :]))
        at = index[inside] // stride % shape[axis]
        inside = inside[(at >= int(one["start"])) & (at < int(one["stop"]))]
        if (found[inside] >= 0).any():
            raise ValueError(f"`heads` holds blocks of `{name}` that overlap, row {place} with an earlier one")
        found[inside] = place
    return found


def _layout(name: str) -> tuple[str, tuple[str, ...], int] | None:
    for pattern, parts, axis in _LAYOUTS:
        match = re.search(rf"(?:^|\.)?(?:{pattern})$", name)
        if match and (match.start() == 0 or name[match.start()] == "." or name[match.start() - 1] == "."):
            return name[: match.start()].rstrip("."), parts, axis
    return None


def _is_attention(module: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Say whether more than a single output projection of this name is tracked: `out_proj` alone may be anything."""
    parts = [found[1] for name in shapes if (found := _layout(name)) and found[0] == module]
    return any(OUTPUT not in one for one in parts)


def _query_size(module: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the rows that the query heads of a module share, None where the query weight is not tracked."""
    for name, shape in shapes.items():
        found = _layout(name)
        if found and found[0] == module and QUERY in found[1] and len(shape) == 2:
            return shape[found[2]] // len(found[1])
    return None


def _number(module: str, n_heads: int | Mapping[str, int] | None, sizes: Mapping[str, int]) -> int:
    if isinstance(n_heads, Mapping):
        found = [n for glob, n in n_heads.items() if fnmatchcase(module, glob)]
        number = found[0] if found else sizes.get(module)
    else:
        number = n_heads if n_heads is not None else sizes.get(module)
    if number is None or number < 1:
        raise ValueError(
            f"the number of heads of `{module}` is {number}, expected 1 or more; give `n_heads=4`, or "
            f"`n_heads={{{module!r}: 4}}`, or the `model` if its modules say `num_heads`"
        )
    return int(number)


def _sizes_of(model: nn.Module) -> dict[str, int]:
    sizes = {}
    for name, module in model.named_modules():
        for owner in (module, getattr(module, "config", None)):
            values = (getattr(owner, key, None) for key in ("num_heads", "num_attention_heads", "n_heads", "n_head"))
            number = next((v for v in values if isinstance(v, int)), None)
            if number is not None:
                sizes[name] = number
                break
    return sizes

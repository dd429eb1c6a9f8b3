"""How do shifts, carry and decay divide the change of the weights: who moves them, who holds against it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Steps

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

# The order of `lightning_gradtrace.record.division.PARTS` behind the weights.
PARTS = ("shifts", "carry", "decay", "rest")


def division(trace: Trace, *, components_of: str | None = None, steps: Steps = None) -> pd.DataFrame:
    """Tabulate the parts of every step's change of every parameter, or of every component of one parameter.

    The parts are the sum of the shifts, carry, decay, and the rest that the ledger can't explain; together they are the
    whole change dW. Two columns add up over parts, parameters and components. `product`, ``<part, dW>``, adds up to
    |dW|^2: divided by it, it is the share of a part in the change, negative if it worked against it. `growth`,
    ``<part, W_before + W_after>``, adds up to |W_after|^2 - |W_before|^2, exactly, and over steps as well.

    Args:
        trace: an open trace with a `Division` record.
        components_of: name of a parameter that the record has a basis for; None for all parameters as wholes.
        steps: step numbers to look at; None for all.

    Returns:
        One row per step, parameter and part: `step`, `param` (or `component`, the row of the basis), `part`, `norm`
        (of the part), `product`, `growth`. Parameters that a step did not move are left out.

    Raises:
        ValueError: the trace holds no such record, or no basis for the parameter.

    Source:
        docs/concepts.md, 3, "Ledger and residual".
    """
    from lightning_gradtrace.store.schema import escape

    path = "division/gram" if components_of is None else f"division/along/{escape(components_of)}/gram"
    if "division" not in trace.records:
        raise ValueError(
            "this analysis reads a `Division` record, and the trace holds none; record with "
            "`GradTrace(..., record=[..., Division()])`"
        )
    if components_of is not None and path not in trace.group:
        raise ValueError(
            f"the trace's `Division` record has no basis for `{components_of}`; record with "
            f"`Division(bases={{{components_of!r}: basis}})`"
        )
    label = trace.row_labels(path.rpartition("/")[0], "step")
    gram = trace.read(path)
    mask = _access.occurrences_in(trace, steps)
    if mask is not None:
        chosen = np.isin(label, trace.occurrences["step"].to_numpy()[mask])
        label, gram = label[chosen], gram[chosen]
    moves = gram[:, :, 1:, 1:].sum(axis=3)  # <part, dW>
    columns = {
        "norm": np.sqrt(np.diagonal(gram, axis1=2, axis2=3)[:, :, 1:].clip(min=0)),
        "product": moves,
        "growth": 2 * gram[:, :, 1:, 0] + moves,
    }
    names = trace.params["param"].to_numpy() if components_of is None else np.arange(gram.shape[1])
    what = "param" if components_of is None else "component"
    index = pd.MultiIndex.from_product([label, names, PARTS], names=["step", what, "part"])
    table = pd.DataFrame({name: values.reshape(-1) for name, values in columns.items()}, index)
    return table.dropna().reset_index()


def divided(table: pd.DataFrame, by: str | Sequence[str] = ()) -> pd.DataFrame:
    """Add up a table of `division` over steps, parameters or components, and give each part its share.

    Args:
        table: from `division`; further columns may name phases, groups of parameters or of components.
        by: columns that stay apart besides `part`.

    Returns:
        One row per group and part: the columns `by`, `part`, `product`, `growth`, `share` (of the group's change: its
        `product` over the sum of all products).

    Raises:
        ValueError: a column is missing.
    """
    by = [by] if isinstance(by, str) else list(by)
    missing = {*by, "part", "product", "growth"} - set(table.columns)
    if missing:
        raise ValueError(f"`table` lacks the columns {sorted(missing)}; pass the table of `division`")
    sums = table.groupby([*by, "part"], sort=False, observed=True)[["product", "growth"]].sum().reset_index()
    whole = sums.groupby(by, sort=False, observed=True)["product"].transform("sum") if by else sums["product"].sum()
    return sums.assign(share=sums["product"] / whole)

"""How a trace shows itself in a notebook: a few rows of HTML, from the small tables alone."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_gradtrace.store.reader import Trace

_MOST_PARAMS = 12


def trace_html(trace: Trace) -> str:
    """Return what a notebook shows of a trace: summary, steps, records, tracked parameters.

    Nothing but the params and steps tables is read. Names and texts are escaped.

    Args:
        trace: the trace.
    """
    steps, params = trace.steps, trace.params
    model = trace.attrs.get("model")
    model = model.get("class", "") if isinstance(model, dict) else model or ""
    state = "complete" if trace.attrs.get("complete") else f"incomplete: {trace.attrs.get('end_reason') or 'no end'}"
    residual = steps["residual"].dropna()
    rows = {
        "state": state,
        "model": str(model).rpartition(".")[2] or "unknown",
        "steps": f"{trace.n_steps:,}" + (f" ({steps.index[0]} to {steps.index[-1]})" if len(steps) else ""),
        "occurrences": f"{trace.n_occurrences:,}",
        "records": ", ".join(trace.records) or "none",
        "tracked weights": f"{trace.n_entries:,} in {len(params)} parameters",
        "samples with inputs": f"{trace.committed['sample']:,}",
        "weight snapshots": f"{trace.committed['snapshot']:,}",
        "ledger": f"largest residual {residual.max():.1e}, {len(residual)} steps checked"
        if len(residual)
        else "unknown",
    }
    loss = steps["loss"].dropna()
    if len(loss):
        rows["loss"] = f"{loss.iloc[0]:.4g} at first, {loss.iloc[-1]:.4g} at last"
    listed = [(str(p), " x ".join(map(str, s))) for p, s in zip(params["param"], params["shape"], strict=True)]
    more = (
        f"<p>and {len(listed) - _MOST_PARAMS} more in <code>trace.params</code></p>"
        if len(listed) > _MOST_PARAMS
        else ""
    )
    return (
        f"<div><strong>Trace</strong> <code>{html.escape(trace.name)}</code>{_table(rows.items())}"
        f"<details><summary>Tracked parameters</summary>{_table(listed[:_MOST_PARAMS])}{more}</details></div>"
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(
        f'<tr><th scope="row" style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table>{cells}</table>"

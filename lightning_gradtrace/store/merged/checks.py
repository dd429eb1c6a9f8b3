"""Checks of a trace of several ranks: of every part, and of what the parts must agree on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lightning_gradtrace.store.target import StoreError
from lightning_gradtrace.store.verify import VerifyReport, verify

if TYPE_CHECKING:
    from lightning_gradtrace.store.merged.trace import MergedTrace

# What every rank computes of a step from the same gradients and weights.
_SHARED = ("epoch", "optimizer", "lr", "grad_norm", "clip_factor", "residual", "sum_error", "skipped")
_ROUNDING = 1e-3


def verify_parts(trace: MergedTrace, *, residual_tolerance: float | None = None) -> VerifyReport:
    """Check the parts of all ranks, see `lightning_gradtrace.store.verify.verify`, and that they belong together.

    Args:
        trace: the trace.
        residual_tolerance: see `verify`.

    Returns:
        One report; problems and notes name the rank.
    """
    report = VerifyReport(repr(trace), n_steps=trace.n_steps)
    for rank, part in enumerate(trace.parts):
        found = verify(part, residual_tolerance=residual_tolerance)
        report.problems += [f"rank {rank}: {problem}" for problem in found.problems]
        report.notes += [f"rank {rank}: {note}" for note in found.notes]
        report.n_chunks += found.n_chunks
    n_ranks = int(trace._attrs["ranks"])
    if len(trace.parts) != n_ranks:
        report.notes.append(f"the run ended while the parts of its {n_ranks} ranks were being created")
        return report
    if report.ok:
        try:
            report.problems += _disagreements(trace)
        except StoreError as error:
            report.problems.append(str(error))
    ends = [part.n_steps for part in trace.parts]
    if len(set(ends)) > 1:
        listed = ", ".join(f"rank {rank} {n}" for rank, n in enumerate(ends))
        report.notes.append(f"ranks committed different numbers of steps ({listed}); the first {min(ends)} are visible")
    return report


def _disagreements(trace: MergedTrace) -> Iterator[str]:
    first = trace.parts[0]
    for rank, part in enumerate(trace.parts):
        for name in ("run_id", "params_digest", "quantity"):
            found, expected = part.attrs.get(name), trace._attrs.get(name)
            if found != expected:
                yield f"rank {rank}: `{name}` is {found!r}, that of the trace is {expected!r}: it is of another run"
        foreign = np.flatnonzero(part.occurrences["rank"].to_numpy() != rank)
        if len(foreign):
            yield f"rank {rank}: occurrence {foreign[0]} names another rank"
        table, expected_table = (one.steps.iloc[: trace.n_steps] for one in (part, first))
        if not table.index.equals(expected_table.index):
            yield f"rank {rank}: its steps are not those of rank 0"
            continue
        for name in _SHARED:
            a, b = table[name].to_numpy(np.float64), expected_table[name].to_numpy(np.float64)
            wrong = np.flatnonzero(~np.isclose(a, b, rtol=_ROUNDING, atol=1e-6, equal_nan=True))
            if len(wrong):
                yield (
                    f"rank {rank}: `{name}` of step {table.index[wrong[0]]} is {a[wrong[0]]:g}, that of rank 0 is "
                    f"{b[wrong[0]]:g}: their gradients were not the same"
                )

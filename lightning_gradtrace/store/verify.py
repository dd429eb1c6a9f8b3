"""Checks of a whole trace: every chunk is read, every number that must fit another one is compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import zarr

from lightning_gradtrace.store.ledger import check_ledger
from lightning_gradtrace.store.params import params_arrays, params_digest
from lightning_gradtrace.store.reading import chunk_shape, decode_chunk, most_bytes, name_chunk, places
from lightning_gradtrace.store.schema import AXES
from lightning_gradtrace.store.target import ROOT, StoreError, fetch, key_exists

if TYPE_CHECKING:
    from lightning_gradtrace.store.reader import Trace


MOST_PROBLEMS = 100
"""Bad chunks of one array after which the rest of it is not looked at."""


@dataclass
class VerifyReport:
    """Outcome of `verify`.

    Attributes:
        name: the trace.
        problems: what is wrong; one sentence each, which names array, chunk and steps.
        notes: what is worth knowing and not wrong.
        n_steps: steps that were checked.
        n_chunks: chunks that were read.
    """

    name: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    n_steps: int = 0
    n_chunks: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        """List the problems and notes."""
        verdict = "no problems" if self.ok else f"{len(self.problems)} problems"
        lines = [f"{self.name}: {self.n_steps} steps, {self.n_chunks} chunks read, {verdict}"]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def verify(trace: Trace, *, residual_tolerance: float | None = None) -> VerifyReport:
    """Read a whole trace and check it.

    Checked are: lengths of all arrays against the commit mark; that every array has its own metadata; that every chunk
    is there and matches its checksum; the digest of the params table; that steps rise and every occurrence belongs to
    one; that kept entries are in range, in order and not repeated; that the ledger closes.

    Args:
        trace: the trace.
        residual_tolerance: largest relative residual of the ledger that is no problem. Default: what the optimizer's
            rule and the precision of the run let expect, mostly 1e-3; see `lightning_gradtrace.store.ledger`.

    Returns:
        The report.
    """
    report = VerifyReport(repr(trace), n_steps=trace.n_steps)
    arrays = {path: node for path, node in trace.group.members(max_depth=None) if isinstance(node, zarr.Array)}
    damaged = set()
    for path, array in sorted(arrays.items()):
        promised = trace.committed_rows(path)
        if promised is not None and array.shape[0] < promised:
            axis = array.metadata.dimension_names[0]  # type: ignore[union-attr,index]
            report.problems.append(
                f"`{path}` has {array.shape[0]} rows, the commit mark promises {promised} along `{axis}`"
            )
            damaged.add(path)
        if array.shape[0] and not key_exists(trace.store, f"{path}/{ROOT}"):
            report.problems.append(f"`{path}/{ROOT}` is missing: other readers can't open the array by itself")
        problems = list(_check_chunks(trace, path, array, report))
        report.problems += problems
        if problems:
            damaged.add(path)
    checks: list[tuple[Callable[[Trace, VerifyReport], None], str]] = [
        (_check_params, "params"),
        (_check_steps, "steps"),
        (_check_occurrences, "occurrences"),
        (_check_own_rows, "steps"),
        (_check_topk, "topk"),
        (_check_topk_step, "topk_step"),
    ]
    broken = {path.partition("/")[0] for path in damaged}
    for check, group in checks:
        if group in trace.group and not broken & {group, "params", "steps", "occurrences"}:
            try:
                check(trace, report)
            except StoreError as error:
                report.problems.append(str(error))
            except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
                # Checks rely on one another's numbers; where these were tampered with, the outcome is a problem too.
                report.problems.append(
                    f"`{group}` can't be checked, its numbers don't fit together: {type(error).__name__}: {error}"
                )
    if not broken & {"steps"}:
        problems, notes = check_ledger(trace, residual_tolerance)
        report.problems += problems
        report.notes += notes
        _check_nonfinite(trace, report)
    if not trace.attrs.get("complete"):
        report.notes.append(
            f"the run did not end normally: {trace.attrs.get('end_reason') or 'it was killed or still runs'}"
        )
    return report


def _check_chunks(trace: Trace, path: str, array: zarr.Array, report: VerifyReport) -> Iterator[str]:
    promised = trace.committed_rows(path)
    rows = array.shape[0] if promised is None else min(array.shape[0], promised)
    shape, chunks = (rows, *array.shape[1:]), chunk_shape(array)
    counts = [-(-n // chunk) for n, chunk in zip(shape, chunks, strict=True)]
    n_problems = 0
    for place in places(counts):
        region = tuple(
            slice(i * chunk, min((i + 1) * chunk, n)) for i, chunk, n in zip(place, chunks, shape, strict=True)
        )
        report.n_chunks += 1
        try:
            (data,) = fetch(trace.store, [f"{path}/{array.metadata.encode_chunk_key(place)}"], most_bytes(array))
            if data is not None:
                decode_chunk(trace.group, path, array, place, data)
            if data is not None or _may_be_absent(trace, path, region, rows):
                continue
            problem = f"{name_chunk(trace.group, path, array, place, rows)} is missing"
        except StoreError as error:
            problem = str(error)
        yield problem
        n_problems += 1
        if n_problems == MOST_PROBLEMS:
            # The metadata may promise more chunks than could be counted in a lifetime.
            yield f"`{path}` has {n_problems} bad chunks so far; the rest of its {math.prod(counts)} was not looked at"
            return


def _may_be_absent(trace: Trace, path: str, region: tuple[slice, ...], n_rows: int) -> bool:
    """Short rows of an array that grows have no chunk in columns that a wider row added later."""
    lengths = f"{path.rpartition('/')[0]}/length"
    if len(region) < 2 or not region[1].start or lengths not in trace.group:
        return False
    try:
        length = trace.read(lengths, region[0].start, min(region[0].stop, n_rows))
    except StoreError:
        return False
    return bool((length <= region[1].start).all())


def _check_params(trace: Trace, report: VerifyReport) -> None:
    table = trace.params.rename(columns={"param": "name"})
    if table.empty and not trace.n_steps:
        report.notes.append("the run ended while the trace was being created")
        return
    if params_digest(params_arrays(pd.DataFrame(table))) != trace.attrs.get("params_digest"):
        report.problems.append("the params table does not match `params_digest`: it was changed after it was written")


def _check_steps(trace: Trace, report: VerifyReport) -> None:
    number = trace.steps.index.to_numpy()
    wrong = np.flatnonzero(np.diff(number) <= 0)
    if len(wrong):
        report.problems.append(f"`steps/step` does not rise after row {wrong[0]} (step {number[wrong[0]]})")
    total = int(trace.steps["n_occurrences"].sum())
    if total != trace.n_occurrences:
        report.problems.append(f"steps count {total} occurrences, the trace has {trace.n_occurrences}")


def _check_occurrences(trace: Trace, report: VerifyReport) -> None:
    steps, of_row = trace.steps, trace.occurrences["step"].to_numpy()
    expected = np.repeat(steps.index.to_numpy(), steps["n_occurrences"].to_numpy().clip(0))
    if len(expected) == len(of_row) and not np.array_equal(expected, of_row):
        first = int(np.flatnonzero(expected != of_row)[0])
        report.problems.append(f"occurrence {first} names step {of_row[first]}, its place is in step {expected[first]}")


def _check_own_rows(trace: Trace, report: VerifyReport) -> None:
    """Rows of groups that don't have every step or occurrence rise and name what the trace holds."""
    for group in sorted(trace.committed.keys() - set(AXES)):
        if group not in trace.group:
            report.problems.append(f"the commit mark promises rows of `{group}`, which the trace doesn't hold")
            continue
        for axis, known in (("step", trace.steps.index.to_numpy()), ("occurrence", np.arange(trace.n_occurrences))):
            if f"{group}/{axis}" not in trace.group or trace.array(f"{group}/{axis}").ndim != 1:
                continue
            listed = trace.row_labels(group, axis)
            if (np.diff(listed) <= 0).any():
                report.problems.append(f"`{group}/{axis}` does not rise")
            if not np.isin(listed, known).all():
                report.problems.append(f"`{group}/{axis}` names rows that the trace doesn't hold")


def _check_topk(trace: Trace, report: VerifyReport) -> None:
    index, occurrence = trace.checked("topk/index"), trace.row_labels("topk", "occurrence")
    for start, stop in _row_ranges(len(occurrence), int(index.chunks[0])):
        rows = np.asarray(index[start:stop])
        _check_range(rows, start, trace.n_entries, "topk/index", report)
        wrong = np.flatnonzero((rows[:, 1:] <= rows[:, :-1]).any(1))
        if len(wrong):
            report.problems.append(f"`topk/index` of occurrence {occurrence[start + wrong[0]]} is not in rising order")


def _check_topk_step(trace: Trace, report: VerifyReport) -> None:
    index, occurrence = trace.checked("topk_step/index"), trace.checked("topk_step/occurrence")
    last = np.cumsum(trace.steps["n_occurrences"].to_numpy())
    first = last - trace.steps["n_occurrences"].to_numpy()
    number = trace.row_labels("topk_step", "step")
    step_row = np.searchsorted(trace.steps.index.to_numpy(), number)
    for start, stop in _row_ranges(len(number), int(index.chunks[0])):
        rows, owner = np.asarray(index[start:stop]), np.asarray(occurrence[start:stop])
        kept = owner >= 0
        _check_range(np.where(kept, rows, 0), start, trace.n_entries, "topk_step/index", report)
        for row in range(len(rows)):
            who, entry = owner[row][kept[row]], rows[row][kept[row]].astype(np.int64)
            place, own = f"of step {number[start + row]}", step_row[start + row]
            if kept[row][len(who) :].any():
                report.problems.append(f"`topk_step/occurrence` {place} has padding before kept entries")
            if len(who) and not (first[own] <= who.min() and who.max() < last[own]):
                report.problems.append(f"`topk_step/occurrence` {place} names occurrences of other steps")
            rising = (np.diff(who) > 0) | ((np.diff(who) == 0) & (np.diff(entry) > 0))
            if not rising.all():
                report.problems.append(f"`topk_step/index` {place} is not in rising order of occurrence and entry")


def _check_range(rows: np.ndarray, start: int, n_entries: int, path: str, report: VerifyReport) -> None:
    wrong = np.flatnonzero((rows >= n_entries).any(1))
    if len(wrong):
        report.problems.append(f"`{path}` row {start + wrong[0]} has entries beyond the last one, {n_entries - 1}")


def _check_nonfinite(trace: Trace, report: VerifyReport) -> None:
    flagged = trace.steps["nonfinite"]
    if (flagged > 0).any():
        steps = flagged.index[flagged > 0]
        report.notes.append(
            f"{int(flagged.clip(0).sum())} kept entries in {len(steps)} steps are NaN or infinite, "
            f"first step {steps[0]}"
        )


def _row_ranges(n: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, n)) for start in range(0, n, size)]

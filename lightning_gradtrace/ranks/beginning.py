"""A run begins: what can be recorded by several processes, and where each of them writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_gradtrace.capture.sharded import bring_to_rest
from lightning_gradtrace.ranks.meeting import Ranks
from lightning_gradtrace.record import Record
from lightning_gradtrace.store.cursor import Cursor
from lightning_gradtrace.store.parts import PartWriter, check_shared, part_target
from lightning_gradtrace.store.writer import TraceWriter
from lightning_gradtrace.update.sharding import check_sharding, is_sharded


def _kinds(strategy: Any) -> set[str]:
    return {kind.__name__ for kind in type(strategy).__mro__}


def check_strategy(strategy: Any, n_processes: int, records: Sequence[Record] = ()) -> None:
    """Refuse what several processes can't record: strategies other than DDP and FSDP2, and records of whole steps.

    Args:
        strategy: Lightning's strategy.
        n_processes: number of processes.
        records: what is going to be kept.

    Raises:
        ValueError: names the strategy, and those that can be recorded; or the record.
    """
    kinds = _kinds(strategy)
    averages = "DDPStrategy" in kinds and getattr(strategy, "_model_averager", None) is None
    if n_processes > 1 and not averages and "ModelParallelStrategy" not in kinds:
        raise ValueError(
            f"GradTrace: the strategy `{type(strategy).__name__}` with {n_processes} processes can't be recorded: "
            "expected one that averages the gradients of all processes in every step, which is `ddp` (also "
            "`ddp_spawn`, `ddp_fork`, `ddp_notebook`) without a model averager, or `ModelParallelStrategy` with "
            "`fully_shard` (FSDP2). Use one of these, or `devices=1`."
        )
    whole = [record for record in records if record.wants_ledger]
    if n_processes > 1 and whole:
        raise ValueError(
            f"GradTrace: `{whole[0]!r}` divides the whole change of a step, and each of {n_processes} processes knows "
            "the shifts of its own samples only. Leave this record out, or use `devices=1`."
        )


def check_parameters(module: nn.Module, strategy: Any, n_processes: int, engine: str) -> None:
    """Refuse a model of which several processes hold pieces that can't be put together; else bring it to rest.

    Args:
        module: the model, set up by the strategy.
        strategy: Lightning's strategy.
        n_processes: number of processes.
        engine: of GradTrace.

    Raises:
        ValueError: says what was found and what to do.
    """
    bring_to_rest(module)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not any(is_sharded(p) for p in parameters.values()) and "DDPStrategy" in _kinds(strategy):
        return
    check_sharding(parameters, n_processes)
    if engine != "tape":
        raise ValueError(
            f'GradTrace: `engine="{engine}"` needs whole parameters, and those of `{type(module).__name__}` are '
            'sharded over processes. Use `engine="tape"`, or `strategy="ddp"`.'
        )


def open_writer(
    ranks: Ranks, target: Any, attrs: dict[str, Any], overwrite: bool, resume: Mapping[str, Any], **options: Any
) -> TraceWriter:
    """Open the writer of this process, all ranks together: if one can't write, none begins.

    With several ranks, rank 0 makes the root first, so that the place is known to be free; then every rank makes its
    part.

    Args:
        ranks: the processes that record.
        target: where the trace goes, the same on all ranks.
        attrs: root attributes.
        overwrite: whether a trace that is there may be replaced.
        resume: what the checkpoint holds of this rank; empty for a new trace.
        options: further arguments of `TraceWriter`.

    Raises:
        StoreError: the target can't be written.
        RankError: another rank can't begin.
    """
    cursor = Cursor.from_state(resume) if resume else None
    if ranks.size == 1:
        return TraceWriter(target, attrs=attrs, overwrite=overwrite, resume=cursor, **options)
    attrs = attrs | {"run_id": ranks.together(lambda: attrs["run_id"])[0]}
    opened: list[TraceWriter] = []

    def open_root() -> None:
        if ranks.rank == 0:
            at = None if cursor is None else cursor.of_root()
            root = TraceWriter(target, attrs=attrs, overwrite=overwrite, resume=at, n_ranks=ranks.size, **options)
            opened.append(root)

    def open_part() -> None:
        check_shared(target, attrs["run_id"] if cursor is None else cursor.run_id)
        part = PartWriter(part_target(target, ranks.rank), attrs=attrs | {"rank": ranks.rank}, resume=cursor, **options)
        part.root = opened[0] if opened else None
        opened.append(part)

    try:
        ranks.together(open_root)
        ranks.together(open_part)
    except BaseException as error:
        if opened:
            opened[-1].close(complete=False, end_reason=f"{type(error).__name__}: {error}")
        raise
    return opened[-1]

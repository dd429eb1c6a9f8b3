"""`gradtrace plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightning_gradtrace.cli._options import Json, Model, ModelArguments, Output, Rows
from lightning_gradtrace.cli._output import check_output, emit, plain
from lightning_gradtrace.cli._trace import open_for, working

if TYPE_CHECKING:
    from lightning_gradtrace.record import Record

_KINDS = "topk=1000, topk_step=1000, dense, factored, sketch=1024, norms"


def plan(
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps of the run.")],
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples of one step, all micro-batches together.")],
    record: Annotated[
        list[str] | None, typer.Option("--record", help=f"What is kept; may be given several times: {_KINDS}.")
    ] = None,
    model: Model = None,
    model_arg: ModelArguments = None,
    like: Annotated[
        str | None, typer.Option("--like", metavar="TRACE", help="Instead of a model: parameters of this trace.")
    ] = None,
    params: Annotated[
        list[str] | None, typer.Option("--params", help="Glob on names of parameters to track; several times.")
    ] = None,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 0,
) -> None:
    """Say how much a run is going to write, record by record, without training.

    \b
    Examples:
      gradtrace plan --like runs/a.zarr --steps 14640 --samples 20 --record topk=1000
      gradtrace plan --model my_project.train:build --steps 1000 --samples 32 --record dense --record norms

    Rows that stand for those of the run are made up and encoded as the store does it. Inputs and weight snapshots come
    on top.

    Next: train with `GradTrace(path, record=...)`; then `gradtrace info`.
    """
    import pandas as pd

    from lightning_gradtrace.cli._model import load_model
    from lightning_gradtrace.record import ParameterInfo
    from lightning_gradtrace.record.plan import plan as predict

    check_output(output)
    if (model is None) == (like is None):
        raise typer.BadParameter("give one of --model and --like")
    if like is not None and params:
        raise typer.BadParameter("--params selects parameters of a --model; --like takes those of the trace")
    records = [parse_record(text) for text in record or ["topk=1000"]]
    tracked: Any
    if like is not None:
        rows_of = open_for(like).params.to_dict("records")
        tracked = [ParameterInfo(str(one["param"]), tuple(one["shape"]), int(one["offset"])) for one in rows_of]
    else:
        tracked = load_model(model, model_arg)[0]
    with working("encoding made-up rows"):
        table = predict(tracked, records, steps, samples, params=params or None)
    total = pd.DataFrame([("all", "", 0, table["raw_bytes"].sum(), table["bytes"].sum())], columns=table.columns)
    emit("plan", pd.concat([table, total], ignore_index=True), as_json, output, rows)


def parse_record(text: str) -> Record:
    """Make a record from its short form.

    Example:
        >>> parse_record("topk_step=9").k, parse_record("norms").group
        (9, 'norms')
    """
    from lightning_gradtrace.record import Dense, Factored, Norms, Sketch, TopK

    name, equals, value = text.partition("=")
    makers: dict[str, Any] = {
        "topk": lambda n: TopK(n or 1000),
        "topk_step": lambda n: TopK(n or 1000, per="step"),
        "sketch": lambda n: Sketch(n or 1024),
    }
    plain_ones: dict[str, Any] = {"dense": Dense, "factored": Factored, "norms": Norms}
    if name in plain_ones and not equals:
        return plain_ones[name]()
    if name in makers and (not equals or (value.isascii() and value.isdigit() and int(value) > 0)):
        return makers[name](int(value) if equals else None)
    raise typer.BadParameter(f"`{plain(text)}` is no record; write one of {_KINDS}", param_hint="--record")

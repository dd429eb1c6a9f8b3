"""`gradtrace ablate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightning_gradtrace.cli._chain import Chain
from lightning_gradtrace.cli._model import load_model
from lightning_gradtrace.cli._options import (
    Axis,
    BatchSize,
    Entries,
    HeadCount,
    Json,
    MaxShare,
    MinCount,
    MinRelative,
    Model,
    ModelArguments,
    NNotable,
    NRelative,
    Output,
    Rows,
    Samples,
    Seed,
    TracePath,
)
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import heads_for, open_for, parse_heads, working

if TYPE_CHECKING:
    import pandas as pd

SHOW = ("neurons", "controls", "pooled", "layers", "effects", "flips", "losses")
BY = ("neuron", "head", "head_part", "entry")


def ablate(
    trace: TracePath,
    model: Model = None,
    model_arg: ModelArguments = None,
    show: Annotated[str, typer.Option("--show", help=f"Which table: {', '.join(SHOW)}.")] = "neurons",
    how: Annotated[str, typer.Option("--how", help="zero, mean or resample; for effects, flips and losses.")] = "zero",
    by: Annotated[str, typer.Option("--by", help=f"What is switched off: {', '.join(BY)}.")] = "neuron",
    number: HeadCount = None,
    n_neurons: Annotated[
        int, typer.Option("--neurons", min=1, help="So many neurons (or heads, entries) with notable tokens.")
    ] = 10,
    entries: Entries = 5000,
    min_count: MinCount = 20,
    n_relative: NRelative = 200,
    n_notable: NNotable = 5,
    min_relative: MinRelative = 0.0,
    axis: Axis = "in",
    max_share: MaxShare = 0.9,
    samples: Samples = 500,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Switch neurons, heads or entries off: are just the words affected that their samples share?

    \b
    Examples:
      gradtrace ablate runs/a.zarr --model my_project.model:load
      gradtrace ablate runs/a.zarr --model load.py:model --model-arg last.ckpt --show controls
      gradtrace ablate runs/planted/trace.zarr --model examples.analyze:model_of_run --model-arg runs/planted
      gradtrace ablate runs/a.zarr --model load.py:model --by head --heads 4 --max-share 1 --show controls

    The model comes from a function of yours, given as module:function or file.py:function. It returns the trained
    model, or (model, forward) where forward(model, tokens) returns logits (sample, position, vocabulary).

    \b
    Tables (--show):
      neurons   flipped predictions of each (neuron, head, ...), on the samples attributed to it
      controls  the same against random samples, others of its kind, other tokens, and the null, with intervals
      pooled    controls averaged over neurons
      layers    averages by parameter, as in the 2023 post
      effects   change of the loss, on samples drawn at random from all
      flips     flips and count of every token, likewise
      losses    change of every token's loss, likewise

    A number without `controls` says nothing: frequent words are both notable and flipped more often.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    if show not in SHOW:
        raise typer.BadParameter(f"`{show}` is none of {', '.join(SHOW)}", param_hint="--show")
    if by not in BY:
        raise typer.BadParameter(f"`{by}` is none of {', '.join(BY)}", param_hint="--by")
    opened = open_for(trace)
    heads = heads_for(opened, by, parse_heads(number))
    network, forward = load_model(model, model_arg)
    chain = Chain(entries, min_count, n_relative, n_notable, min_relative, axis, by=by, heads=heads)
    with working("switching neurons off", opened) as watched:
        kept = chain.entries(watched)
        found = _chosen(chain.components(watched, kept), max_share * watched.occurrences["sample_id"].nunique(), by)
        found = found.head(n_neurons)
        if show in ("effects", "flips", "losses"):
            switches = analysis.component_switches(watched, found, heads)
            table = _on_all(watched, network, forward, switches, show, how, samples, batch_size, seed)
        else:
            predictor = analysis.Predictor(network, watched.tokens()[1], batch_size=batch_size, forward=forward)
            common: dict[str, Any] = {"heads": heads, "n_samples": samples, "seed": seed}
            table = _on_own(watched, predictor, found, kept, show, chain.find_tokens, common)
    emit("ablate", table, as_json, output, rows)


def _chosen(found: pd.DataFrame, most_samples: float, by: str) -> pd.DataFrame:
    """Return those with notable tokens, and samples left to compare with."""
    found = found[(found["n_notable"] > 0) & (found["n_samples"] <= most_samples)]
    if found.empty:
        raise ValueError(
            f"no {by.replace('_', ' ')} has notable tokens under these thresholds and few enough samples, so there "
            "is nothing to switch off; lower --min-count or --min-relative, or raise --max-share"
        )
    return found


def _on_own(
    trace: Any, predictor: Any, found: Any, kept: Any, show: str, find_tokens: Any, common: dict[str, Any]
) -> pd.DataFrame:
    """Switch each off on the samples attributed to it."""
    from lightning_gradtrace import analysis

    if show in ("neurons", "layers"):
        table = analysis.neuron_ablation(trace, predictor, found, kept, **common)
        return analysis.layer_table(table, "param" if "param" in table else "module") if show == "layers" else table
    table = all_controls(trace, predictor, found, kept, find_tokens, **common)
    return analysis.pool_controls(table, seed=common["seed"]) if show == "pooled" else table


def all_controls(trace: Any, predictor: Any, found: Any, kept: Any, find_tokens: Any, **common: Any) -> Any:
    """Return the tables of the four controls as one."""
    import pandas as pd

    from lightning_gradtrace import analysis

    parts = [
        analysis.random_control(trace, predictor, found, kept, **common),
        analysis.peer_control(trace, predictor, found, kept, **common),
        analysis.frequency_control(trace, predictor, found, kept, **common),
        analysis.null_control(trace, predictor, found, kept, find_tokens=find_tokens, **common),
    ]
    return pd.concat(parts, ignore_index=True)


def _on_all(
    trace: Any, network: Any, forward: Any, found: Any, show: str, how: str, samples: int, batch_size: int, seed: int
) -> pd.DataFrame:
    """Switch each off on samples drawn from all."""
    import numpy as np

    from lightning_gradtrace import analysis

    texts = trace.tokens()[1]
    drawn = np.random.default_rng(seed).permutation(len(texts))[:samples]
    ran = analysis.ablate(network, texts[np.sort(drawn)], found, how, batch_size=batch_size, forward=forward, seed=seed)
    if show == "effects":
        return analysis.ablation_effects(ran, seed=seed)
    return (analysis.flip_tables if show == "flips" else analysis.token_losses)(ran, vocab=trace.vocab)

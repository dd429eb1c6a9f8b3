"""What the studies of attention heads share: switching heads off, and whose samples moved a head when it formed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pandas as pd
import torch
from omegaconf import OmegaConf

from examples.mechanisms.study import Claim, Run
from examples.models import CircuitModel
from examples.models.circuits import Attention
from lightning_gradtrace.analysis import (
    change_points,
    head_shifts,
    loss_token_enrichment,
    pattern_enrichment,
    weight_change,
)

PARTS = ["query", "key", "value", "output", "all"]
Head = tuple[int, int]
"""Layer and head."""


def all_heads(model: CircuitModel) -> list[Head]:
    """Return every head of a model."""
    layers = [layer for layer in model.network.attention if isinstance(layer, Attention)]
    return [(number, head) for number, layer in enumerate(layers) for head in range(len(layer.head_scale))]


def best_head(measures: pd.DataFrame, name: str) -> Head:
    """Return the head with the largest value of a measure ``name.<layer>.<head>`` at the end."""
    last = measures.filter(like=f"{name}.").iloc[-1]
    _, layer, head = str(last.idxmax()).rsplit(".", 2)
    return int(layer), int(head)


@contextmanager
def switched_off(model: CircuitModel, head: Head) -> Iterator[None]:
    """Switch a head off: what it adds to the residual stream is zero."""
    attention = model.network.attention[head[0]]
    assert isinstance(attention, Attention)
    scale = attention.head_scale
    attention.head_scale = torch.where(torch.arange(len(scale)) == head[1], 0.0, 1.0)
    try:
        yield
    finally:
        attention.head_scale = scale


def ablations(run: Run, *measures: str) -> list[dict[Head | None, float]]:
    """Return measures of the trained model with each head switched off in turn, by head; None: with none.

    They are also written to ``ablations.csv``.
    """
    model = run.model()
    with torch.no_grad():
        found: dict[Head | None, dict[str, float]] = {None: run.task.measure(model.network)}
        for head in all_heads(model):
            with switched_off(model, head):
                found[head] = run.task.measure(model.network)
    rows = [["none" if head is None else label(head), *map(values.get, measures)] for head, values in found.items()]
    pd.DataFrame(rows, columns=["head", *measures]).to_csv(run.path / "ablations.csv", index=False)
    return [{head: values[measure] for head, values in found.items()} for measure in measures]


def rise(series: pd.Series, low: float = 0.02, high: float = 0.5) -> slice:
    """Return the steps between which a series goes from `low` to `high` of the way from its start to its end.

    The slow last part is left out: there the mechanism is there already, and what moves it are details.
    """
    way = (series - series.iloc[0]) / (series.iloc[-1] - series.iloc[0])
    return slice(int((way >= low).idxmax()), int((way >= high).idxmax()))


def main_change(measures: pd.DataFrame, name: str) -> int:
    """Return the step of the largest change point of a measure, the first step if there is none.

    `change_points` with its defaults: on a series with little noise, the largest jump lies where three measurements in
    a row rose most: the bump. A slow tail, which all series have, doesn't move it.
    """
    table = measures[[name]].rename_axis("step").reset_index()
    found = change_points(table, name).sort_values("jump", key=abs)
    return int(found["step"].iloc[-1]) if len(found) else int(measures.index[0])


def who_moved(run: Run, head: Head, pattern: pd.Series, steps: slice, name: str = "who_moved") -> pd.DataFrame:
    """Say by part of a head how enriched the samples with a pattern are in what moved it within some steps.

    Counted is by how much samples pushed along the change that the head's weights made in these steps (`toward` of
    `head_shifts`). The table in ``<name>.csv`` has the same for the net sum along the change, whose shares have no
    bounds where most of it is undone again, and for the absolute size of the shifts.

    Args:
        run: a finished run.
        head: layer and head.
        pattern: whether each sample has it, by sample id; samples that it doesn't name are left out.
        steps: first and last step.
        name: of the file.

    Returns:
        Rows of `pattern_enrichment` for what pushed along the change, by part ("query", "key", "value", "output", and
        "all" for the head as a whole).
    """
    trace, steps = run.trace, recorded(run, steps)
    moved = head_shifts(trace, steps=steps, along=weight_change(trace, steps))
    mine = moved[(moved["module"] == module(head)) & (moved["head"] == head[1])]
    mine = pd.concat([mine, mine.assign(part="all")])
    seen = trace.occurrences[trace.occurrences["step"].between(steps.start, steps.stop)]
    mine, seen = (table[table["sample_id"].isin(pattern.index)] for table in (mine, seen))
    tables = {
        amount: pattern_enrichment(mine, pattern, amount=amount, by=["part"], occurrences=seen, n_resamples=999)
        for amount in ("toward", "along", "size")
    }
    pd.concat(tables, names=["amount"]).droplevel(1).to_csv(run.path / f"{name}.csv")
    return tables["toward"].set_index("part").reindex(PARTS)


def moved_by_loss_tokens(
    run: Run, tokens: list[int], steps: slice, without: Mapping[Head | None, float]
) -> pd.DataFrame:
    """Say by head how much the loss of some tokens moved it along its change, beside what switching it off costs.

    Written to ``heads.csv``.

    Args:
        run: a finished run whose trace has a `TokenGrads` record.
        tokens: the tokens whose loss is asked about; the others of the record are compared with them.
        steps: first and last step.
        without: from `ablations`, of a measure that is larger where the model is worse.

    Returns:
        One row per head, by "layer.head", with the columns of `loss_token_enrichment` (NaN if none was recorded in
        these steps), `moved` (net along the change by the loss of `tokens`, of the sum over all heads), and `ablation`
        (what switching it off adds to the measure).
    """
    trace, steps = run.trace, recorded(run, steps)
    moved = head_shifts(trace, steps=steps, along=weight_change(trace, steps), record="token_grads")
    kept = trace.token_grads.tokens(steps)
    chosen = kept["token"].isin(tokens)
    table = loss_token_enrichment(moved, kept, chosen, amount="toward", by=["module", "head"])
    amounts = moved[moved["token"].isin(tokens)].groupby(["module", "head"])["along"].sum()
    table["moved"] = amounts.to_numpy() / amounts.clip(lower=0).sum()
    names = {(module(head), head[1]): label(head) for head in without if head is not None}
    table.index = pd.Index([names[key] for key in zip(table["module"], table["head"], strict=True)])
    table = table.reindex(list(names.values()))
    table["ablation"] = pd.Series({label(head): value - without[None] for head, value in without.items() if head})
    table.to_csv(run.path / "heads.csv", index_label="name")
    return table


def loss_token_claims(heads: pd.DataFrame, name: str) -> list[Claim]:
    """Return what is claimed of the head that matches brackets and the loss of closing ones.

    Args:
        heads: from `moved_by_loss_tokens`.
        name: of the head.
    """
    mine = heads.to_dict("index")[name]
    return [
        Claim(
            "place of this head among those that the loss of closing brackets moved",
            float(heads["moved"].rank(ascending=False)[name]),
            "<",
            2,
        ),
        Claim(
            "closing brackets among the loss tokens that moved it: times their share, lower end", mine["low"], ">=", 1.0
        ),
        Claim("p-value of the null that permutes loss tokens", mine["p_value"], "<", 0.01),
    ]


def write_choice(run: Run, head: Head, steps: slice, **more: int) -> None:
    """Write down which head and which steps a study looked at, into ``choice.yaml``.

    Args:
        run: a finished run.
        head: layer and head.
        steps: first and last step of the window in which shifts were counted.
        **more: other steps by what happened there.
    """
    choice = {"head": label(head), "first_step": steps.start, "last_step": steps.stop, **more}
    OmegaConf.save(OmegaConf.create(choice), run.path / "choice.yaml")


def recorded(run: Run, steps: slice) -> slice:
    """Return the first and the last recorded step within some steps."""
    return slice(*run.trace.steps.loc[steps].index[[0, -1]])


def module(head: Head) -> str:
    """Return the name of the module that a head belongs to."""
    return f"network.attention.{head[0]}"


def label(head: Head) -> str:
    """Return a head's short name: layer.head."""
    return f"{head[0]}.{head[1]}"

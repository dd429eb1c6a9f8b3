"""What builds and what cleans up: how shifts, carry and decay divide the change, and how coherent the shifts are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.mechanisms.addition import ModularAddition
from examples.mechanisms.addition_samples import KINDS, TABLES, components
from examples.mechanisms.phases import label_steps
from examples.mechanisms.study import Run
from examples.models import CircuitModel
from lightning_gradtrace.analysis import coherence, divided, division, sign_null
from lightning_gradtrace.measures import local_learning_coefficient


def parts_by_step(run: Run, frequencies: Sequence[int]) -> pd.DataFrame:
    """Return the division of every recorded step's change.

    Returns:
        Columns step, of ("all weights", each parameter, and e.g. "embedding, key": the waves of a table by kind of
        frequency), part, product, growth, as in `division`.
    """
    assert isinstance(run.task, ModularAddition)
    whole = division(run.trace)
    tables = [whole.assign(of="all weights"), whole.assign(of=whole["param"])]
    for table, param in TABLES.items():
        waves = division(run.trace, components_of=param)
        for kind in KINDS:
            mine = waves[waves["component"].isin(components(run.task.p, frequencies, kind))]
            tables.append(mine.assign(of=f"{table}, {kind}"))
    keys = ["step", "of", "part"]
    return pd.concat(tables).groupby(keys, sort=False, as_index=False)[["product", "growth"]].sum()


def parts_by_phase(parts: pd.DataFrame, phases: pd.DataFrame, every: int) -> pd.DataFrame:
    """Add the parts up by phase.

    Args:
        parts: from `parts_by_step`.
        phases: from `find_phases`.
        every: steps that a recorded one stands for.

    Returns:
        Columns phase, of, part, share (of the steps' change) and growth (of the squared norm over the whole phase,
        estimated from the recorded steps).
    """
    labelled = parts.assign(phase=label_steps(parts["step"], phases))
    table = divided(labelled, ["phase", "of"])
    return table.assign(growth=table["growth"] * every)[["phase", "of", "part", "share", "growth"]]


def growth_check(run: Run, by_phase: pd.DataFrame, phases: pd.DataFrame) -> pd.DataFrame:
    """Compare the growth of the squared norm of all weights that the recorded steps lead to with what it was.

    Returns:
        Columns phase, estimated, measured.
    """
    estimated = by_phase[by_phase["of"] == "all weights"].groupby("phase", observed=True)["growth"].sum()
    norm = run.measures()["weight_norm"] ** 2
    measured = phases.set_index("phase").apply(lambda row: norm[row["stop"]] - norm[row["start"]], axis=1)
    return pd.DataFrame({"estimated": estimated, "measured": measured}).reindex(phases["phase"]).reset_index()


def coherence_by_step(run: Run, phases: pd.DataFrame) -> pd.DataFrame:
    """Return the coherence of the shifts at the recorded steps, by parameter: columns of `coherence`, and phase."""
    table = coherence(run.trace)
    return table.assign(phase=label_steps(table["step"], phases))


def coherence_null(run: Run, phases: pd.DataFrame, per_phase: int = 4) -> pd.DataFrame:
    """Compare the coherence of both tables' shifts with random signs at some steps of every phase.

    Args:
        run: a finished run.
        phases: from `find_phases`.
        per_phase: number of steps, evenly spaced.
    """
    trace = run.open("tables.zarr")
    steps = pd.Series(trace.steps.index)
    groups = steps.groupby(label_steps(steps, phases), observed=True)
    chosen = [part.iloc[np.unique(np.linspace(0, len(part) - 1, per_phase).round().astype(int))] for _, part in groups]
    found = [sign_null(trace, param, pd.concat(chosen)) for param in TABLES.values()]
    table = pd.concat(found, ignore_index=True)
    return table.assign(phase=label_steps(table["step"], phases))


def learning_coefficients(run: Run, n_snapshots: int, batch_size: int, **settings: float) -> pd.DataFrame:
    """Estimate the local learning coefficient at some of the trace's snapshots, evenly spaced, the first left out.

    Args:
        run: a finished run.
        n_snapshots: how many.
        batch_size: random training pairs of every draw.
        **settings: see `local_learning_coefficient`.

    Returns:
        Columns step, chain, coefficient.
    """
    data, model, random = run.sequences, run.model(), torch.Generator().manual_seed(run.cfg.seed)
    tokens, answers = data.tokens, data.targets[:, -1]

    def loss_of(model: CircuitModel, rows: Tensor | slice) -> Tensor:
        return F.cross_entropy(model(tokens[rows])[:, -1], answers[rows])

    def loss(model: CircuitModel) -> Tensor:
        return loss_of(model, torch.randint(len(tokens), (batch_size,), generator=random))

    places = np.unique(np.linspace(1, len(run.trace.weight_steps) - 1, n_snapshots).round().astype(int))
    parts = []
    for step in run.trace.weight_steps[places]:
        weights = {name: torch.from_numpy(run.trace.weights(name, int(step))) for name, _ in model.named_parameters()}
        model.load_state_dict(weights)
        with torch.no_grad():
            centre = float(loss_of(model, slice(None)))
        found = local_learning_coefficient(model, loss, len(tokens), centre=centre, **settings)  # type: ignore[arg-type]
        rows = {"step": int(step), "chain": range(len(found)), "coefficient": found.numpy()}
        parts.append(pd.DataFrame(rows))
    return pd.concat(parts, ignore_index=True)

"""What builds and what cleans up in grokking?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from examples.mechanisms import addition_figures as figures
from examples.mechanisms import addition_parts as parts_of
from examples.mechanisms import addition_samples as samples_of
from examples.mechanisms.addition import ModularAddition, number_waves
from examples.mechanisms.phases import changes, find_phases
from examples.mechanisms.study import Claim, Run


def progress(run: Run, frequencies: Sequence[int]) -> pd.DataFrame:
    """Return by step what needs the key frequencies, which only the trained network shows, from the trace's snapshots.

    Returns:
        Columns restricted_loss, excluded_loss, and the squared norm of the waves of both tables by kind of frequency.
    """
    assert isinstance(run.task, ModularAddition)
    model, rows = run.model(), []
    for step in run.trace.weight_steps:
        weights = {name: torch.from_numpy(run.trace.weights(name, int(step))) for name, _ in model.named_parameters()}
        model.load_state_dict(weights)
        with torch.no_grad():
            row = {"step": int(step), **run.task.progress(run.task.logits(model.network), list(frequencies))}
        for table, param in samples_of.TABLES.items():
            waves = number_waves(run.task.p, len(weights[param]) - run.task.p)
            power = (waves @ weights[param].double()).pow(2).sum(1).numpy()
            for kind in samples_of.KINDS:
                row[f"{table}, {kind}"] = power[samples_of.components(run.task.p, frequencies, kind)].sum()
        rows.append(row)
    return pd.DataFrame(rows).set_index("step")


def half_way(series: pd.Series) -> float:
    """Return the first step after the extreme at which a series has gone half of the way to its end."""
    start = series.abs().idxmax() if abs(series.iloc[-1]) < series.abs().max() / 2 else series.index[0]
    after = series.loc[start:]
    middle = (after.iloc[0] + after.iloc[-1]) / 2
    passed = after <= middle if after.iloc[-1] < after.iloc[0] else after >= middle
    return float(passed.idxmax())


def study(run: Run) -> list[Claim]:
    """Check that the network memorises first and generalises later, and say what its trace adds to that.

    Writes tables (phases, progress, changes, parts, coherence, samples, and what they come to) and figures into the
    run directory.
    """
    assert isinstance(run.task, ModularAddition)
    measures, control = run.measures(), run.measures("no_decay")
    frequencies = run.task.final_frequencies(run.model().network)
    inner, phases = progress(run, frequencies), find_phases(measures)
    series = {name: measures[name] for name in ("train_loss", "test_loss", "test_accuracy", "weight_norm")}
    series |= {str(name): inner[name] for name in inner}
    save(run, phases=phases, progress=inner.reset_index(), changes=changes(series))
    pd.Series(frequencies, name="frequency").to_csv(run.path / "frequencies.csv", index=False)
    figures.draw_formation(run.path, measures, inner, phases)
    if run.cfg.learning_coefficient.n_snapshots:
        save(run, learning_coefficient=parts_of.learning_coefficients(run, **run.cfg.learning_coefficient))
    return [*grokked(measures, control, inner, phases), *built(run, frequencies, phases)]


def grokked(measures: pd.DataFrame, control: pd.DataFrame, inner: pd.DataFrame, phases: pd.DataFrame) -> list[Claim]:
    """Claims about the measures."""
    formed = inner.loc[phases["start"][1] : phases["stop"][1]]
    first, last = (formed.iloc[0], formed.iloc[-1]) if len(formed) else (inner.iloc[-1], inner.iloc[-1])
    memorised = int(np.argmax(measures["train_accuracy"] >= 0.999))
    falls = half_way(measures["test_loss"])
    restricted, excluded = half_way(inner["restricted_loss"]), half_way(inner["excluded_loss"])
    return [
        Claim("training accuracy when it has memorised", measures["train_accuracy"].iloc[memorised], ">=", 0.999),
        Claim("test accuracy then", measures["test_accuracy"].iloc[memorised], "<", 0.1),
        Claim("test accuracy at the end", measures["test_accuracy"].iloc[-1], ">=", 0.99),
        Claim("steps from the fall of restricted loss to that of test loss", falls - restricted, ">=", 1),
        Claim("steps from the rise of excluded loss to the fall of test loss", falls - excluded, ">=", 1),
        Claim(
            "restricted loss when the test loss begins to fall, of that when it has memorised",
            last["restricted_loss"] / first["restricted_loss"],
            "<",
            0.5,
        ),
        Claim(
            "excluded loss when the test loss begins to fall, of that when it has memorised",
            last["excluded_loss"] / first["excluded_loss"],
            ">=",
            2,
        ),
        Claim("test accuracy at the end without decay", control["test_accuracy"].iloc[-1], "<", 0.5),
    ]


def built(run: Run, frequencies: Sequence[int], phases: pd.DataFrame) -> list[Claim]:
    """Write down what the trace says: the parts of the change, coherence, samples; return claims about them."""
    parts = parts_of.parts_by_step(run, frequencies)
    by_phase = parts_of.parts_by_phase(parts, phases, run.cfg.callbacks.gradtrace.every_n_steps)
    check = parts_of.growth_check(run, by_phase, phases)
    together, null = parts_of.coherence_by_step(run, phases), parts_of.coherence_null(run, phases)
    by_param = together.groupby(["phase", "param"], observed=True)["coherence"].describe(percentiles=[0.25, 0.5, 0.75])
    by_step = parts[~parts["of"].isin(run.trace.params["param"])]
    save(run, parts=by_step, parts_by_phase=by_phase, growth_check=check, coherence=together, coherence_null=null)
    save(run, coherence_by_phase=by_param.reset_index())

    growth, known = samples_of.growth_by_sample(run, frequencies, phases), samples_of.patterns(run)
    groups, spread = samples_of.by_group(growth, known), samples_of.spread(growth)
    wide = growth.pivot_table(index="sample_id", columns=["phase", "table", "kind"], values="growth", observed=True)
    wide.columns = [", ".join(map(str, column)) for column in wide.columns]
    save(run, samples=known.join(wide).rename_axis("sample_id").reset_index())
    mirrored = samples_of.mirrored(growth, known)
    save(run, groups=groups, spread=spread, mirrored=mirrored)
    figures.draw_parts(run.path, parts, phases)
    figures.draw_coherence(run.path, together, null, phases)
    figures.draw_samples(run.path, growth, mirrored, groups)

    net = by_phase.pivot_table(index=["phase", "of"], columns="part", values="growth", observed=True)
    net = net.assign(data=net["shifts"] + net["carry"]).assign(net=net.sum(axis=1))
    rest = float(np.sqrt(parts[parts["part"] == "rest"]["product"].abs().sum() / parts["product"].abs().sum()))
    pairs = mirrored[(mirrored["phase"] == "circuit formation") & (mirrored["kind"] == "key")].set_index("table")
    return [
        Claim("what the ledger leaves of all changes", rest, "<", 1e-2),
        *(
            Claim(
                f"what the data adds to the key frequencies over what decay takes, circuit formation, {table}",
                _over(net, "circuit formation", f"{table}, key", "data", "decay"),
                ">=",
                1.0,
            )
            for table in samples_of.TABLES
        ),
        *(
            Claim(
                f"what the data adds to the other frequencies over what decay takes, clean-up, {table}",
                _over(net, "clean-up", f"{table}, other", "data", "decay"),
                "<",
                1.0,
            )
            for table in samples_of.TABLES
        ),
        Claim(
            "pairs whose mirror is trained on, in the growth of the embedding's key frequencies, circuit formation: "
            "times their share, upper end",
            float(pairs["high"].get("embedding", np.nan)),
            "<",
            1.0,
        ),
    ]


def save(run: Run, **tables: pd.DataFrame) -> None:
    """Write tables into the run directory, by name, with six digits."""
    for name, table in tables.items():
        table.to_csv(run.path / f"{name}.csv", index=False, float_format="%.6g")


def _over(net: pd.DataFrame, phase: str, of: str, part: str, other: str) -> float:
    """Return one part's growth over what another takes; NaN if the phase did not come."""
    if (phase, of) not in net.index:
        return float("nan")
    row = net.loc[[(phase, of)]]
    return float((row[part] / -row[other]).iloc[0])

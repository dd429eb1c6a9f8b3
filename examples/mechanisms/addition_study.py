"""What builds and what cleans up in grokking?"""

from __future__ import annotations

import pandas as pd
import torch

from examples.mechanisms.addition import ModularAddition
from examples.mechanisms.study import Claim, Run


def progress(run: Run) -> pd.DataFrame:
    """Return restricted and excluded loss by step, for the key frequencies of the trained network.

    They need the frequencies, which only the end shows, so they are computed from the trace's snapshots.
    """
    assert isinstance(run.task, ModularAddition)
    model = run.model()
    frequencies = run.task.final_frequencies(model.network)
    rows = []
    for step in run.trace.weight_steps:
        weights = {name: torch.from_numpy(run.trace.weights(name, int(step))) for name, _ in model.named_parameters()}
        model.load_state_dict(weights)
        with torch.no_grad():
            rows.append({"step": int(step), **run.task.progress(run.task.logits(model.network), frequencies)})
    return pd.DataFrame(rows).set_index("step")


def half_way(series: pd.Series) -> float:
    """Return the first step after the extreme at which a series has gone half of the way to its end."""
    start = series.abs().idxmax() if abs(series.iloc[-1]) < series.abs().max() / 2 else series.index[0]
    after = series.loc[start:]
    middle = (after.iloc[0] + after.iloc[-1]) / 2
    passed = after <= middle if after.iloc[-1] < after.iloc[0] else after >= middle
    return float(passed.idxmax())


def study(run: Run) -> list[Claim]:
    """Check that the network memorises first and generalises later, and that it needs decay for that."""
    measures, control, inner = run.measures(), run.measures("no_decay"), progress(run)
    memorised = (measures["train_accuracy"] >= 0.999).idxmax()
    falls = half_way(measures["test_loss"])
    return [
        Claim("training accuracy when it has memorised", measures["train_accuracy"].loc[memorised], ">=", 0.999),
        Claim(f"test accuracy then (step {memorised})", measures["test_accuracy"].loc[memorised], "<", 0.1),
        Claim("test accuracy at the end", measures["test_accuracy"].iloc[-1], ">=", 0.99),
        Claim(
            "steps by which restricted loss falls before test loss", falls - half_way(inner["restricted_loss"]), ">=", 0
        ),
        Claim(
            "steps by which excluded loss rises before test loss falls",
            falls - half_way(inner["excluded_loss"]),
            ">=",
            0,
        ),
        Claim("test accuracy at the end without decay", control["test_accuracy"].iloc[-1], "<", 0.5),
    ]

"""What builds and what cleans up in grokking?"""

from __future__ import annotations

import numpy as np
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
    memorised = int(np.argmax(measures["train_accuracy"] >= 0.999))
    falls = half_way(measures["test_loss"])
    restricted, excluded = half_way(inner["restricted_loss"]), half_way(inner["excluded_loss"])
    step = measures.index[memorised]
    return [
        Claim("training accuracy when it has memorised", measures["train_accuracy"].iloc[memorised], ">=", 0.999),
        Claim(f"test accuracy then (step {step})", measures["test_accuracy"].iloc[memorised], "<", 0.1),
        Claim("test accuracy at the end", measures["test_accuracy"].iloc[-1], ">=", 0.99),
        Claim("steps from the fall of restricted loss to that of test loss", falls - restricted, ">=", 1),
        Claim("steps from the rise of excluded loss to the fall of test loss", falls - excluded, ">=", 1),
        Claim("test accuracy at the end without decay", control["test_accuracy"].iloc[-1], "<", 0.5),
    ]

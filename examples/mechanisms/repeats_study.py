"""Who built the induction head?"""

from __future__ import annotations

import torch

from examples.mechanisms.repeats import Repeats
from examples.mechanisms.study import Claim, Run
from examples.models import CircuitModel
from examples.models.circuits import Attention


def best_head(run: Run) -> tuple[int, int]:
    """Return layer and head with the largest prefix-matching score at the end."""
    last = run.measures().filter(like="prefix_matching.").iloc[-1]
    _, layer, head = str(last.idxmax()).split(".")
    return int(layer), int(head)


def without_head(run: Run, model: CircuitModel, layer: int, head: int) -> float:
    """Return the second-half accuracy of a model with one head switched off."""
    attention = model.network.attention[layer]
    assert isinstance(attention, Attention)
    scale = attention.head_scale
    attention.head_scale = torch.where(torch.arange(len(scale)) == head, 0.0, 1.0)
    try:
        with torch.no_grad():
            return run.task.measure(model.network)["second_half_accuracy"]
    finally:
        attention.head_scale = scale


def study(run: Run) -> list[Claim]:
    """Check that an induction head formed, and that it does the work."""
    assert isinstance(run.task, Repeats)
    measures, control = run.measures(), run.measures("one_layer")
    layer, head = best_head(run)
    score = measures[f"prefix_matching.{layer}.{head}"].iloc[-1]
    accuracy = measures["second_half_accuracy"].iloc[-1]
    ablated = without_head(run, run.model(), layer, head)
    return [
        Claim("second-half accuracy", accuracy, ">=", 0.9),
        Claim(f"prefix matching of head {layer}.{head}", score, ">=", 0.4),
        Claim("second-half accuracy of one layer", control["second_half_accuracy"].iloc[-1], "<", 0.2),
        Claim(f"accuracy without head {layer}.{head}, of that with it", ablated / accuracy, "<", 0.5),
    ]

"""The ledger closes for every optimizer, its settings, every clipping, accumulation and precision, over 20 steps."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from tests.update.cases import SETTINGS, Gradients, ledger, parameters_like, record_gradients, setting_name

PRECISIONS = {"float64": (torch.float64, 1e-12), "float32": (torch.float32, 1e-5), "bf16-mixed": (torch.float32, 0.1)}
# In bfloat16 layers round their gradients. What follows the gradient's length is off by no more than that; what lifts
# small entries lifts their rounding too, up to the sign alone, which may be wrong (docs/concepts.md, 3).
BF16 = {torch.optim.SGD: 1e-2, torch.optim.ASGD: 1e-2, torch.optim.Rprop: 0.5}


@functools.cache
def recorded(precision: str, micro_batches: int) -> list[Gradients]:
    return record_gradients(PRECISIONS[precision][0], precision == "bf16-mixed", micro_batches, n_steps=20)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("micro_batches", [1, 2], ids=["one", "accumulated"])
@pytest.mark.parametrize("how", [None, "norm", "value"])
@pytest.mark.parametrize("setting", SETTINGS, ids=setting_name)
def test_the_ledger_closes(
    setting: tuple[type[Optimizer], dict[str, Any]], how: str | None, micro_batches: int, precision: str
) -> None:
    steps = recorded(precision, micro_batches)
    parameters = parameters_like(steps[0])
    first, *rest = parameters.values()
    cls, options = setting
    rate = options.get("lr", 0.1)
    optimizer = cls([{"params": [first], "lr": 3 * rate}, {"params": rest}], **{"lr": rate, **options})  # type: ignore[call-arg]
    outcomes = ledger(optimizer, parameters, steps, how)
    bound = PRECISIONS[precision][1]
    bound = BF16.get(cls, bound) if precision == "bf16-mixed" else bound
    assert len(outcomes) == 20
    assert max(outcome.residual for outcome in outcomes) < bound

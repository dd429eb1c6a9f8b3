"""With FSDP2, too, the union of the traces of two ranks is the trace of one process on the same global batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_gradtrace import open_trace
from lightning_gradtrace.update.division import explain
from tests.ranks.launch import Job, Outcome, launch, values
from tests.ranks.test_ddp import close_to, in_order_of
from tests.ranks.training import (
    Joint,
    JointAdam,
    JointSquare,
    Sharded,
    ShardedAdam,
    ShardedSquare,
    Whole,
    fsdp,
    refused,
    single,
)

EVERYTHING = {"trace": {"params": "*"}}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (Sharded, Joint, {}),
    "accumulated": (ShardedAdam, JointAdam, {"trainer": {"accumulate_grad_batches": 2}, "trace": {"params": "*"}}),
    "unequal": (
        ShardedSquare,
        JointSquare,
        {
            "batches": [[[0, 1, 2, 3, 4, 5], [6, 7, 8]], [[9, 10, 11, 12], [13, 14, 15, 16, 17, 18]]],
            "trainer": {"use_distributed_sampler": False},
            "trace": {"params": "*"},
        },
    ),
    "by value": (Sharded, Joint, {"trainer": {"gradient_clip_algorithm": "value", "gradient_clip_val": 0.01}}),
}
"""Sharded model, the same as one process, options. Of unequal batches only one at a time leaves doubt: T = B."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, list[Outcome]]:
    jobs = {name: Job(fsdp, (name, kind, options)) for name, (kind, _, options) in CASES.items()}
    jobs |= {
        f"{name} alone": Job(single, (name, joint, options, True), 1) for name, (_, joint, options) in CASES.items()
    }
    jobs["whole"] = Job(refused, (Whole, {}))
    jobs["functional"] = Job(refused, (Sharded, {"engine": "functional", "per_sample_loss": print}))
    jobs["tokens"] = Job(refused, (Sharded, {"tokens": True}))
    return dict(zip(jobs, launch(folder, list(jobs.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_same_training_with_the_same_shifts(name, folder, outcomes):
    ranks, alone = values(outcomes[name]), values(outcomes[f"{name} alone"])[0]
    for traced, plain in ranks:
        assert all(np.array_equal(weight, traced[param]) for param, weight in plain.items())
    for param, weight in alone.items():
        np.testing.assert_allclose(ranks[0][0][param], weight, err_msg=param, **close_to(weight))
    trace, expected = open_trace(folder / f"{name}.zarr"), open_trace(folder / f"{name}-single.zarr")
    assert trace.attrs["complete"] and trace.verify().ok, str(trace.verify())
    order = in_order_of(trace, expected)
    columns = ["step", "micro_batch", "sample_id"]
    found = trace.occurrences.iloc[order].reset_index(drop=True)
    assert found[columns].equals(expected.occurrences[columns].reset_index(drop=True))
    assert trace.params.equals(expected.params)
    for param in expected.params["param"]:
        ours, theirs = trace.dense[param][:], expected.dense[param][:]
        np.testing.assert_allclose(ours[order], theirs, err_msg=param, **close_to(theirs))
        np.testing.assert_allclose(trace.weights(param), expected.weights(param), **close_to(expected.weights(param)))
    assert np.array_equal(trace.weight_steps, expected.weight_steps)
    assert trace.steps["residual"].max() < 1e-9 and trace.steps["sum_error"].max() < 1e-9
    assert trace.steps["residual"].notna().equals(expected.steps["residual"].notna())
    for column in ("loss", "grad_norm", "clip_factor", "lr"):
        np.testing.assert_allclose(trace.steps[column], expected.steps[column], rtol=1e-6, err_msg=column)


def test_what_mixes_weights_of_which_a_process_holds_a_piece_is_refused():
    optimizer = torch.optim.Adafactor([torch.nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="the step of `Adafactor` mixes the weights of a parameter"):
        explain(optimizer, sharded=True)


def test_what_is_not_sharded_or_needs_whole_parameters_is_refused(outcomes):
    for error in values(outcomes["whole"]):
        assert error.startswith("ValueError: GradTrace: `embedding.weight` is not sharded, so that its gradients are")
        assert 'call `fully_shard(self, mesh=self.device_mesh["data_parallel"])` in `configure_model`' in error
    for error in values(outcomes["functional"]):
        assert error.startswith('ValueError: GradTrace: `engine="functional"` needs whole parameters')
    for error in values(outcomes["tokens"]):
        assert error.startswith("ValueError: GradTrace: `TokenGrads(") and "needs backward passes of its own" in error

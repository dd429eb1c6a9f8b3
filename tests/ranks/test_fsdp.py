"""With FSDP2, too, the union of the traces of two ranks is the trace of one process on the same global batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_gradtrace import open_trace
from lightning_gradtrace.update.division import explain
from tests.ranks.apart import accumulated
from tests.ranks.launch import Job, Outcome, launch, values
from tests.ranks.test_ddp import close_to, in_order_of
from tests.ranks.training import (
    Halved,
    HalvedCollecting,
    Joint,
    JointAdam,
    JointBranchesAdam,
    JointCollecting,
    JointDrawn,
    JointSquare,
    JointSquareCollecting,
    Kept,
    KeptCollecting,
    PartlyCollecting,
    Reentrant,
    Resharded,
    Sharded,
    ShardedAdam,
    ShardedBranches,
    ShardedCollecting,
    ShardedDrawn,
    ShardedSquare,
    SquareCollecting,
    Whole,
    fsdp,
    refused,
    single,
)
from tests.test_callback import LENGTH

N_ENTRIES = 896
ALL_TOKENS = {"tokens": {"tokens": None, "slots": LENGTH, "k": N_ENTRIES}}
UNEQUAL = [[[0, 1, 2, 3, 4, 5], [6, 7, 8]], [[9, 10, 11, 12], [13, 14, 15, 16, 17, 18]]]
COLLECTED = {"trainer": {"gradient_clip_val": None}, "trace": {"params": "*"}}
COLLECTED_UNEQUAL = {
    "batches": UNEQUAL,
    "trainer": {"use_distributed_sampler": False, "gradient_clip_val": None},
    "trace": {"params": "*", "tokens": {"by": "input"}},
}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (Sharded, Joint, {"trace": {"tokens": {}}}),
    "accumulated": (ShardedAdam, JointAdam, {"trainer": {"accumulate_grad_batches": 2}, "trace": {"params": "*"}}),
    "unequal": (
        ShardedSquare,
        JointSquare,
        {
            "batches": UNEQUAL,
            "trainer": {"use_distributed_sampler": False},
            "trace": {"params": "*", "tokens": {"by": "input"}},
        },
    ),
    "by value": (
        Sharded,
        Joint,
        {
            "trainer": {"gradient_clip_algorithm": "value", "gradient_clip_val": 0.01},
            "trace": ALL_TOKENS,
        },
    ),
    "resharded": (
        Resharded,
        JointAdam,
        {"trainer": {"accumulate_grad_batches": 2}, "trace": {"params": "*", "tokens": {}}},
    ),
    "branches": (
        ShardedBranches,
        JointBranchesAdam,
        {"trace": {"params": "branches.0.weight", "tokens": {}}},
    ),
    "collected": (ShardedCollecting, JointCollecting, COLLECTED),
    "collected, unequal": (SquareCollecting, JointSquareCollecting, COLLECTED_UNEQUAL),
    "collected, asked": (SquareCollecting, JointSquareCollecting, {**COLLECTED_UNEQUAL, "asks": True}),
    "collected, kept": (KeptCollecting, JointCollecting, COLLECTED),
    "collected in part": (PartlyCollecting, JointCollecting, COLLECTED),
    "kept": (Kept, Joint, {"trace": {"tokens": {"tokens": [3], "slots": LENGTH}}}),
    "drawn": (ShardedDrawn, JointDrawn, {"trace": {"params": "*"}}),
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
    jobs |= {f"apart {dtype}": Job(accumulated, (dtype,)) for dtype in (None, torch.bfloat16)}
    jobs["autocast"] = Job(fsdp, ("autocast", Sharded, {"trainer": {"precision": "bf16-mixed"}, "trace": ALL_TOKENS}))
    jobs["halved"] = Job(fsdp, ("halved", Halved, {"trace": ALL_TOKENS}))
    jobs["halved, collected"] = Job(fsdp, ("halved, collected", HalvedCollecting, COLLECTED))
    jobs["reentrant"] = Job(refused, (Reentrant, {"tokens": {}}))
    jobs["one process"] = Job(fsdp, ("one process", Sharded, {"trace": ALL_TOKENS, "ranks": 1}), 1)
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


def test_gradients_that_wait_in_another_precision(folder, outcomes):
    for traced, plain in values(outcomes["halved, collected"]):
        assert all(np.array_equal(weight, traced[param]) for param, weight in plain.items())
    trace = open_trace(folder / "halved, collected.zarr")
    assert trace.attrs["complete"] and trace.verify().ok and trace.steps["half_precision"].all()
    assert 1e-6 < trace.steps["sum_error"].max() < 0.05
    assert trace.occurrences.groupby("step")["micro_batch"].nunique().tolist() == [2, 1, 2, 1]


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
    for error in values(outcomes["reentrant"]):
        assert error.startswith("UnattributableError: `TokenGrads`: the model checkpoints activations with")


def with_tokens(name: str) -> bool:
    return "tokens" in CASES[name][2].get("trace", {})


@pytest.mark.parametrize("name", [name for name in CASES if with_tokens(name)])
def test_the_same_loss_tokens_with_the_same_shifts(name, folder, outcomes):
    values(outcomes[name])
    trace, expected = open_trace(folder / f"{name}.zarr"), open_trace(folder / f"{name}-single.zarr")
    order = in_order_of(trace, expected)
    found = {n: trace.array(f"token_grads/{n}")[:][order] for n in ("n_chosen", "position", "token", "index", "shift")}
    wanted = {n: expected.array(f"token_grads/{n}")[:] for n in found}
    assert wanted["n_chosen"].sum() > 5
    for array in ("n_chosen", "position", "token", "index"):
        np.testing.assert_array_equal(found[array], wanted[array], err_msg=array)
    np.testing.assert_allclose(found["shift"], wanted["shift"], rtol=1e-6, atol=1e-12 * np.abs(wanted["shift"]).max())
    moves = np.abs(found["shift"][found["position"] >= 0]).max(-1) > 0
    assert moves.any() and moves.all() == (name != "branches")


def test_ranks_that_choose_unlike_numbers_of_tokens_wait_for_each_other(folder, outcomes):
    values(outcomes["kept"])
    trace = open_trace(folder / "kept.zarr")
    chosen = trace.occurrences.assign(n=trace.array("token_grads/n_chosen")[:])
    passes = chosen.pivot_table("n", ["step", "micro_batch"], "rank", "max")
    assert (passes[0] > passes[1]).any() and (passes[1] > passes[0]).any()
    assert ((passes.min(axis=1) == 0) & (passes.max(axis=1) > 0)).any()


@pytest.mark.parametrize(
    ("name", "most"), [("by value", 1e-6), ("one process", 1e-4), ("autocast", 0.05), ("halved", 0.05)]
)
def test_shifts_of_all_loss_tokens_add_up_to_those_of_the_sample(name, most, folder, outcomes):
    for traced, plain in values(outcomes[name]):
        assert all(np.array_equal(weight, traced[param]) for param, weight in plain.items())
    trace = open_trace(folder / f"{name}.zarr")
    assert trace.params["numel"].sum() == N_ENTRIES and trace.verify().ok
    index, shift = trace.array("token_grads/index")[:], trace.array("token_grads/shift")[:].astype(np.float64)
    total = np.zeros((trace.n_occurrences, N_ENTRIES))
    for i in range(trace.n_occurrences):
        np.add.at(total[i], index[i].astype(np.int64), shift[i])
    assert trace.steps["half_precision"].eq(name in ("autocast", "halved")).all()
    whole = np.concatenate([trace.dense[p][:].reshape(len(total), -1) for p in trace.params["param"]], axis=1)
    assert np.linalg.norm(total - whole, axis=1).max() < most * np.linalg.norm(whole, axis=1).min()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_passes_leave_alone_what_was_not_reduced_yet(dtype, outcomes):
    ranks = values(outcomes[f"apart {dtype}"])
    for without, with_passes, _ in ranks:
        for name, gradient in without[0].items():
            assert gradient.any() and np.array_equal(gradient, with_passes[0][name]), name
        assert without[1] == with_passes[1]
        assert {gathered for state in without[1] for gathered, *_ in state} == {True, False}
        assert [{reduces for _, reduces, _ in state} for state in without[1]] == [{False}, {False}, {True}]
        assert all(order for state in without[1] for *_, order in state)
    assert [n_passes for *_, n_passes in ranks] == [[0, 1, 2], [0, 0, 0]]

"""The union of the traces of two DDP ranks is the trace of one process on the same global batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_gradtrace import Trace, open_trace
from lightning_gradtrace.store.schema import escape
from tests.ranks.launch import Job, launch, values
from tests.ranks.training import (
    Adam,
    Branches,
    HalfBranches,
    Joint,
    JointAdam,
    JointBranches,
    SingleBranches,
    ddp,
    single,
)
from tests.test_callback import Model

UNEQUAL = [[[0, 1, 2], [3, 4], [5, 6, 7, 8]], [[9, 10, 11], [12, 13, 14, 15, 16], [17]]]
"""Batches of two ranks, of different sizes."""

DOUBLE = {"precision": "64-true"}
CASES: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "sgd": (Model, Joint, {}, {"trainer": DOUBLE, "trace": {"tokens": {}}}),
    "accumulated": (
        Adam,
        JointAdam,
        {"gradient_as_bucket_view": True},
        {"trainer": {"accumulate_grad_batches": 2, **DOUBLE}},
    ),
    "unequal": (
        Model,
        Joint,
        {"static_graph": True},
        {"batches": UNEQUAL, "trainer": {"use_distributed_sampler": False}},
    ),
    "unused": (
        Branches,
        JointBranches,
        {"find_unused_parameters": True},
        {"trainer": {"accumulate_grad_batches": 2, **DOUBLE}, "model": {"momentum": 0.0}},
    ),
}
"""Model, the same as one process, options of DDP, options of the training."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    jobs = []
    for name, (kind, joint, ddp_options, options) in CASES.items():
        jobs.append(Job(ddp, (name, kind, ddp_options, options)))
        jobs.append(Job(single, (name, joint, options), size=1))
    of_branches = {"trace": {"params": "branches.*"}}
    jobs.append(Job(ddp, ("half", HalfBranches, {"find_unused_parameters": True}, of_branches)))
    of_branches = of_branches | {"trainer": DOUBLE}
    jobs.append(Job(ddp, ("mixed", SingleBranches, {"find_unused_parameters": True}, of_branches)))
    found = launch(folder, jobs)
    values(found[-2])
    values(found[-1])
    return folder, {name: (found[2 * i], found[2 * i + 1]) for i, name in enumerate(CASES)}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, outcomes: tuple[Path, dict[str, Any]]) -> tuple[str, Path, Any, Any]:
    folder, found = outcomes
    ranks, alone = found[request.param]
    return request.param, folder, values(ranks), values(alone)[0]


def traces(name: str, folder: Path) -> tuple[Trace, Trace]:
    return open_trace(folder / f"{name}.zarr"), open_trace(folder / f"{name}-single.zarr")


def close_to(expected: np.ndarray) -> dict[str, float]:
    """Tolerances for numbers that were added up in another order, in one training after the other."""
    small = 1e-9 if expected.dtype == np.float64 else 1e-3
    return {"rtol": small, "atol": small * float(np.abs(expected).max())}


def in_order_of(trace: Trace, expected: Trace) -> np.ndarray:
    """Occurrence of `trace` for every occurrence of `expected`: the same step, micro-batch and sample, in order."""
    keys = ["step", "micro_batch", "sample_id", "rank", "slot"]
    order = [t.occurrences.sort_values(keys).index.to_numpy() for t in (trace, expected)]
    found = np.empty(len(order[0]), np.int64)
    found[order[1]] = order[0]
    return found


def test_training_is_the_same_bit_for_bit_on_all_ranks(case):
    _, _, ranks, _ = case
    for traced, plain in ranks:
        for name, weight in plain.items():
            assert np.array_equal(weight, traced[name]) and np.array_equal(weight, ranks[0][0][name]), name


def test_one_process_trains_the_same(case):
    _, _, ranks, alone = case
    for name, weight in alone.items():
        np.testing.assert_allclose(ranks[0][0][name], weight, err_msg=name, **close_to(weight))


def test_the_same_occurrences_with_the_same_shifts(case):
    name, folder, _, _ = case
    trace, expected = traces(name, folder)
    assert trace.attrs["complete"] and trace.n_steps == expected.n_steps > 2
    order = in_order_of(trace, expected)
    columns = ["step", "micro_batch", "sample_id"]
    found = trace.occurrences.iloc[order].reset_index(drop=True)
    assert found[columns].equals(expected.occurrences[columns].reset_index(drop=True))
    assert set(trace.occurrences["rank"]) == {0, 1}
    for param in expected.params["param"]:
        ours, theirs = trace.dense[param][:], expected.dense[param][:]
        np.testing.assert_allclose(ours[order], theirs, err_msg=param, **close_to(theirs))
    np.testing.assert_allclose(trace.norms.frame().to_numpy()[order], expected.norms.frame(), rtol=1e-3, atol=1e-7)


def test_slots_and_ranks_are_those_of_the_ranks_own_batches(case):
    name, folder, _, _ = case
    trace, expected = traces(name, folder)
    of_step = trace.occurrences.groupby(["step", "micro_batch", "rank"], sort=False)["slot"]
    assert all(slots.tolist() == list(range(len(slots))) for _, slots in of_step)
    # The one process sees rank 0's samples first.
    columns = ["step", "micro_batch", "rank", "slot"]
    by_rank = trace.occurrences.sort_values(["step", "micro_batch", "rank", "slot"])[[*columns, "sample_id"]]
    assert by_rank["sample_id"].tolist() == expected.occurrences["sample_id"].tolist()
    steps = trace.occurrences["step"].to_numpy()
    ranks = trace.occurrences["rank"].to_numpy()
    assert (np.diff(steps) >= 0).all() and all((np.diff(ranks[steps == step]) >= 0).all() for step in set(steps))


@pytest.mark.parametrize("record", ["topk", "topk_step"])
def test_the_same_selection(record, case):
    name, folder, _, _ = case
    trace, expected = (t.using(record).topk.frame() for t in traces(name, folder))
    keys = ["step", "micro_batch", "sample_id", "param", "index"]
    # Values that nearly tie may be told apart otherwise: all that is clearly above the smallest kept one is the same.
    for found, other in ((trace, expected), (expected, trace)):
        by = "step" if record == "topk_step" else ["step", "micro_batch", "rank", "slot"]
        least = found["shift"].abs().groupby([found[c] for c in np.atleast_1d(by)]).transform("min")
        clear = found[found["shift"].abs() > 1.01 * least]
        assert len(clear) > 0.8 * len(found)
        merged = clear.merge(other, on=keys, how="left", suffixes=("", "_other"))
        assert merged["shift_other"].notna().all()
        np.testing.assert_allclose(merged["shift"], merged["shift_other"], rtol=1e-3)


def test_kept_entries_are_the_largest_of_the_dense_shifts(case):
    name, folder, _, _ = case
    trace, _ = traces(name, folder)
    dense = np.concatenate([trace.dense[p][:].reshape(trace.n_occurrences, -1) for p in trace.params["param"]], axis=1)
    for step in trace.steps.index:
        mine = trace.occurrences["step"].to_numpy() == step
        first = int(np.flatnonzero(mine)[0])
        flat = dense[mine].reshape(-1)
        kept = np.sort(np.argsort(-np.abs(flat), kind="stable")[:17])
        block = next(iter(trace.topk_step.blocks(steps=int(step))))
        found = (block.occurrence - first) * trace.n_entries + block.entry
        assert np.array_equal(found, kept)
        np.testing.assert_allclose(block.shift, flat[kept], rtol=1e-6)


def test_sums_over_all_ranks_are_checked_and_the_ledger_closes(case):
    name, folder, _, _ = case
    trace, expected = traces(name, folder)
    checked = expected.steps["residual"].notna()
    assert checked.sum() >= 2 and trace.steps["residual"].notna().equals(checked)
    assert trace.steps["residual"].max() < 1e-4 and trace.steps["sum_error"].max() < 1e-4
    report = trace.verify()
    assert report.ok and report.n_steps == expected.n_steps, str(report)
    for column in ("loss", "grad_norm", "clip_factor", "lr", "momentum"):
        np.testing.assert_allclose(trace.steps[column], expected.steps[column], rtol=1e-4, err_msg=column)
    assert trace.steps["n_occurrences"].equals(expected.steps["n_occurrences"])


def test_factors_texts_and_weights(case):
    name, folder, _, _ = case
    trace, expected = traces(name, folder)
    for param in expected.params["param"]:
        kept = trace.factored[param].occurrence
        shifts = trace.dense[param].shifts(kept)
        np.testing.assert_allclose(trace.factored[param].shifts(kept), shifts, err_msg=param, **close_to(shifts))
    ids = np.unique(expected.occurrences["sample_id"])
    assert np.array_equal(trace.inputs(ids), expected.inputs(ids))
    assert np.array_equal(trace.weight_steps, expected.weight_steps)
    for param in expected.params["param"]:
        np.testing.assert_allclose(trace.weights(param), expected.weights(param), **close_to(expected.weights(param)))


def test_sketches_and_gains(case):
    name, folder, _, _ = case
    trace, expected = traces(name, folder)
    order = in_order_of(trace, expected)
    for param in expected.params["param"]:
        ours, theirs = trace.array(f"sketch/{escape(param)}/shift"), expected.array(f"sketch/{escape(param)}/shift")
        np.testing.assert_allclose(ours[:][order], theirs[:], err_msg=param, **close_to(theirs[:]))
        gains = trace.array(f"gains/{escape(param)}/gain")[:], expected.array(f"gains/{escape(param)}/gain")[:]
        np.testing.assert_allclose(*gains, err_msg=param, rtol=1e-6)


def test_loss_tokens(outcomes):
    """The same tokens of the same samples, with the same shifts."""
    folder, _ = outcomes
    trace, expected = traces("sgd", folder)
    order = in_order_of(trace, expected)
    found = {n: trace.array(f"token_grads/{n}")[:][order] for n in ("n_chosen", "position", "token", "index", "shift")}
    wanted = {n: expected.array(f"token_grads/{n}")[:] for n in found}
    assert (wanted["position"] >= 0).sum() > trace.n_occurrences
    for name in ("n_chosen", "position", "token", "index"):
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    np.testing.assert_allclose(found["shift"], wanted["shift"], **close_to(wanted["shift"]))


def test_a_rank_whose_samples_do_not_reach_a_parameter_knows_of_its_half_precision(outcomes) -> None:
    trace = open_trace(outcomes[0] / "half.zarr")
    assert trace.attrs["complete"] and trace.steps["half_precision"].all() and trace.verify().ok
    assert trace.steps["sum_error"].max() > 1e-3


def test_a_rank_whose_samples_do_not_reach_a_parameter_knows_of_its_single_precision(outcomes) -> None:
    trace = open_trace(outcomes[0] / "mixed.zarr")
    assert trace.attrs["complete"] and not trace.steps["half_precision"].any() and trace.verify().ok
    assert 1e-9 < trace.steps["sum_error"].max() < 1e-5

"""TopK equals sorting the dense shifts, ties included, for every path of the selection."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradtrace.capture.shares import DenseShare, OuterShare, RowShare, Share
from lightning_gradtrace.capture.shares.contraction import OuterView
from lightning_gradtrace.record import ParameterInfo, ParameterShifts, StepShifts, TopK
from lightning_gradtrace.record.search import comparison, forming, gathering, queued
from lightning_gradtrace.record.search.candidates import Candidates
from tests.record.steps import searched

SHAPES = {"outer": (5, 4), "bias": (7,), "scaled": (6, 3), "embedding": (9, 2), "heads": (2, 3, 4), "kernel": (4, 2, 3)}


def make_infos() -> list[ParameterInfo]:
    infos, offset = [], 0
    for name, shape in SHAPES.items():
        infos.append(ParameterInfo(name, shape, offset))
        offset += infos[-1].numel
    return infos


N_ENTRIES = sum(info.numel for info in make_infos())


def make_step(seed: int, sizes: list[int], positions: int, whole: bool, rate: float) -> StepShifts:
    """Random shares of every form; whole numbers make ties, and most of them zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        if whole:
            return torch.randint(-1, 2, shape, generator=generator).float()
        return torch.randn(shape, generator=generator) * torch.rand(
            shape[0], *[1] * (len(shape) - 1), generator=generator
        )

    parameters = []
    for info in make_infos():
        shares: list[Share | None] = []
        for n in sizes:
            if info.name in ("outer", "scaled"):
                shares.append(OuterShare(draw(n, positions, info.shape[0]), draw(n, positions, info.shape[1])))
            elif info.name == "heads":  # (heads, features, width): the rows are heads and width
                matrix = OuterShare(draw(n, positions, 8), draw(n, positions, 3))
                shares.append(OuterView(matrix, (2, 4, 3), (0, 2, 1)))
            elif info.name == "kernel":
                shares.append(OuterView(OuterShare(draw(n, positions, 4), draw(n, positions, 6)), (4, 2, 3), (0, 1, 2)))
            elif info.name == "bias":
                shares.append(DenseShare(draw(n, *info.shape)))
            else:
                rows = torch.randint(info.shape[0], (n, positions), generator=generator)
                shares.append(RowShare(rows, draw(n, positions, info.shape[1]), info.shape[0]))
        scale = draw(*info.shape) if info.name in ("scaled", "heads") else -rate
        parameters.append(ParameterShifts(info, scale, shares))
    return StepShifts(sizes, parameters)


def dense(step: StepShifts) -> np.ndarray:
    rows = [torch.cat([p.shifts(m).flatten(1) for p in step.parameters], 1).numpy() for m in range(len(step.n_samples))]
    return np.concatenate(rows)


def sorted_per_sample(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.sort(np.argsort(-np.abs(values), axis=1, kind="stable")[:, :k], axis=1)
    return order, np.take_along_axis(values, order, 1)


def sorted_per_step(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    order = np.sort(np.argsort(-np.abs(values).ravel(), kind="stable")[:k])
    return order // values.shape[1], order % values.shape[1], values.ravel()[order]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, N_ENTRIES),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    whole=st.booleans(),
    prune=st.booleans(),
    per=st.sampled_from(["sample", "step"]),
    workspace=st.sampled_from([1, 50, 1 << 18]),
    parts=st.sampled_from([1, 3]),
    many=st.sampled_from([0, comparison.MANY]),
    on_device=st.booleans(),
    device_workspace=st.sampled_from([1, 50, 1 << 18]),
    room=st.sampled_from([0, 1, queued.ROOM]),
    leaders=st.sampled_from([0, 1, queued.LEADERS]),
    sieved=st.booleans(),
)
def test_selection_equals_sorting_over_consecutive_steps(
    seed, k, sizes, whole, prune, per, workspace, parts, many, on_device, device_workspace, room, leaders, sieved
) -> None:
    record = TopK(k, per=per, prune=prune)
    record.specs(make_infos())
    record._searcher.on_device, record._searcher.sieved = on_device, sieved
    there = [
        mock.patch.object(queued, "ROOM", room),
        mock.patch.object(queued, "LEADERS", leaders),
        mock.patch.object(forming, "DEVICE_WORKSPACE", device_workspace),
    ]
    with searched(workspace, parts, many), there[0], there[1], there[2]:
        for number, rate in enumerate((1.0, 0.5, 0.0, 2.0)):  # a rate of zero makes every shift a tie
            step = make_step(seed + number, sizes, 1 + number, whole, rate)
            rows = record.reduce(step, first_occurrence=100)
            values = dense(step)
            if per == "sample":
                index, shift = sorted_per_sample(values, k)
                np.testing.assert_array_equal(rows["topk/index"], index)
                np.testing.assert_allclose(rows["topk/shift"], shift, rtol=1e-5, atol=1e-30)
            else:
                occurrence, index, shift = sorted_per_step(values, k)
                m = len(shift)
                np.testing.assert_array_equal(rows["topk_step/occurrence"][0, :m], occurrence + 100)
                np.testing.assert_array_equal(rows["topk_step/index"][0, :m], index)
                np.testing.assert_allclose(rows["topk_step/shift"][0, :m], shift, rtol=1e-5, atol=1e-30)
                assert (rows["topk_step/occurrence"][0, m:] == -1).all()


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("trim", [1, 4])
def test_selection_equals_sorting_at_the_size_of_a_real_layer(
    prune: bool, trim: int, on_device: bool, monkeypatch
) -> None:
    monkeypatch.setattr(gathering, "TRIM", trim)
    infos = [ParameterInfo("a", (96, 64), 0), ParameterInfo("b", (64, 128), 96 * 64)]
    record = TopK(50, prune=prune)
    record.specs(infos)
    record._searcher.on_device = on_device
    torch.manual_seed(0)
    for _ in range(4):
        shares = [OuterShare(torch.randn(6, 9, i.shape[0]) ** 3, torch.randn(6, 9, i.shape[1]) ** 3) for i in infos]
        step = StepShifts([6], [ParameterShifts(i, -0.1, [s]) for i, s in zip(infos, shares, strict=True)])
        rows = record.reduce(step, 0)
        index, shift = sorted_per_sample(dense(step), 50)
        np.testing.assert_array_equal(rows["topk/index"], index)
        np.testing.assert_allclose(rows["topk/shift"], shift, rtol=1e-4)


def test_pruning_leaves_out_most_entries_when_few_rows_matter(monkeypatch) -> None:
    """The bound does its work: with one strong row per sample, almost nothing else is formed."""
    formed = []
    original = forming.at_least
    monkeypatch.setattr(forming, "at_least", lambda v, *a, **o: formed.append(v.numel()) or original(v, *a, **o))
    info = ParameterInfo("a", (100, 80), 0)
    record = TopK(20)
    record.specs([info])
    torch.manual_seed(0)
    for _ in range(3):
        left = torch.randn(4, 5, 100) * 1e-3
        left[:, :, 7] *= 1e4
        formed.clear()
        record.reduce(StepShifts([4], [ParameterShifts(info, 1.0, [OuterShare(left, torch.randn(4, 5, 80))])]), 0)
    assert sum(formed) < 0.1 * 4 * info.numel


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("per", ["sample", "step"])
@pytest.mark.parametrize("on_device", [True, False])
def test_shifts_that_are_not_finite_are_kept_first(bad: float, prune: bool, per: str, on_device: bool) -> None:
    record = TopK(6, per=per, prune=prune)
    record.specs(make_infos())
    record._searcher.on_device = on_device
    for number in range(2):
        step = make_step(number, [3], 2, whole=False, rate=1.0)
        step.parameters[0].shares[0].left[1, 0, 2] = bad
        rows = record.reduce(step, 0)
        shift = rows["topk/shift"][1] if per == "sample" else rows["topk_step/shift"][0]
        assert (~np.isfinite(shift)).sum() == 4  # row 2 of a (5, 4) matrix


@pytest.mark.parametrize("bad", [[0, 1, 2, 3, 4], [1, 3], [4]], ids=["all", "some", "one"])
@pytest.mark.parametrize("per", ["sample", "step"])
@pytest.mark.parametrize("on_device", [True, False])
def test_of_a_training_that_has_diverged_only_what_is_kept_is_collected(
    bad: list[int], per: str, on_device: bool, monkeypatch
) -> None:
    collected = []
    original = gathering.Gathering.add
    monkeypatch.setattr(gathering.Gathering, "add", lambda s, f: collected.append(len(f)) or original(s, f))
    record = TopK(30, per=per)
    record.specs(make_infos())
    record._searcher.on_device = on_device
    for number in range(3):
        step = make_step(number, [2, 3], 2, whole=False, rate=1.0)
        for parameter in step.parameters if number else ():  # the first step is a good one
            for i, share in enumerate(parameter.shares):
                own = [sample - 2 * i for sample in bad if sample // 2 == i or (i == 1 and sample == 4)]
                part = share.matrix if isinstance(share, OuterView) else share
                (part.left if isinstance(part, OuterShare) else part.values)[own] = torch.nan
        collected.clear()
        rows = record.reduce(step, 0)
        values = np.where(np.isfinite(dense(step)), dense(step), np.inf)
        if per == "sample":
            np.testing.assert_array_equal(rows["topk/index"], sorted_per_sample(values, 30)[0])
            assert not number or np.isnan(rows["topk/shift"][bad]).all()
        else:
            occurrence, index, _ = sorted_per_step(values, 30)
            np.testing.assert_array_equal(rows["topk_step/occurrence"][0], occurrence)
            np.testing.assert_array_equal(rows["topk_step/index"][0], index)
        if number and (per == "step" or len(bad) == 5):
            assert sum(collected) == 0


def test_ties_that_come_too_late_are_dropped_before_all_are_held() -> None:
    """Of equal shifts the lower entries are kept, in whatever order they are found."""
    found = gathering.Gathering(3, np.zeros(1), pool=False)
    order = np.random.default_rng(0).permutation(1000)
    for entries in np.split(order, 100):
        found.add(Candidates(np.zeros(10, int), entries, np.full(10, 0.5, np.float32), np.zeros(10)))
        assert found.counts()[0] <= gathering.TRIM * 3 + 10
    assert found.result().entry[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("on_device", [False, True])
def test_shifts_that_overflow_are_ties(on_device: bool) -> None:
    info = ParameterInfo("a", (4096,), 0)
    record = TopK(10)
    record.specs([info])
    record._searcher.on_device = on_device
    share = DenseShare(torch.linspace(1e30, 2e30, 4096)[None])
    with searched(many=0), np.errstate(all="ignore"):
        rows = record.reduce(StepShifts([1], [ParameterShifts(info, 1e10, [share])]), 0)
    assert rows["topk/index"].tolist() == [[*range(10)]] and np.isinf(rows["topk/shift"]).all()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_product_that_overflows_is_no_number_with_a_learning_rate_of_zero(on_device: bool) -> None:
    info = ParameterInfo("a", (2, 2), 0)
    record = TopK(2)
    record.specs([info])
    record._searcher.on_device = on_device
    share = OuterShare(torch.tensor([[[1e30, 1.0]]]), torch.tensor([[[1e30, 1.0]]]))
    with np.errstate(all="ignore"):
        rows = record.reduce(StepShifts([1], [ParameterShifts(info, 0.0, [share])]), 0)
    assert rows["topk/index"].tolist() == [[0, 1]] and np.isnan(rows["topk/shift"][0, 0])


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("per", ["sample", "step"])
def test_zeros_tie_where_a_limit_before_scaling_is_zero(per: str, on_device: bool) -> None:
    """Those of a parameter that was searched don't come before those of one that the loss didn't reach."""
    infos = [ParameterInfo("unused", (4,), 0), ParameterInfo("used", (4,), 4)]
    record = TopK(3, per=per)
    record.specs(infos)
    record._searcher.on_device = on_device
    shares = [DenseShare(torch.tensor([[0.0, 0.0, 1.0, 0.0]]))]
    step = StepShifts([1], [ParameterShifts(infos[0], 1e12, [None]), ParameterShifts(infos[1], 1e12, shares)])
    rows = record.reduce(step, 0)
    assert rows[f"{record.group}/index"].tolist() == [[0, 1, 6]]
    np.testing.assert_allclose(rows[f"{record.group}/shift"], [[0, 0, 1e12]])


def test_more_entries_than_there_are_keeps_all_with_a_warning() -> None:
    record = TopK(1000)
    with pytest.warns(
        UserWarning, match=rf"`TopK\(k=1000\)`: the tracked parameters have {N_ENTRIES} entries; all of them"
    ):
        record.specs(make_infos())
    rows = record.reduce(make_step(0, [2], 1, whole=False, rate=1.0), 0)
    np.testing.assert_array_equal(rows["topk/index"], np.tile(np.arange(N_ENTRIES), (2, 1)))


@pytest.mark.parametrize("on_device", [False, True])
def test_a_micro_batch_without_samples_has_no_occurrences(on_device: bool) -> None:
    record = TopK(5)
    record.specs(make_infos())
    record._searcher.on_device = on_device
    step = make_step(0, [2, 0, 1], 2, whole=False, rate=1.0)
    rows = record.reduce(step, 0)
    np.testing.assert_array_equal(rows["topk/index"], sorted_per_sample(dense(step), 5)[0])


def test_a_step_with_fewer_entries_than_k_is_padded() -> None:
    record = TopK(N_ENTRIES + 37, per="step")
    record.specs(make_infos())
    rows = record.reduce(make_step(0, [1], 1, whole=False, rate=1.0), 5)
    assert (rows["topk_step/occurrence"][0, :N_ENTRIES] == 5).all()
    assert (rows["topk_step/occurrence"][0, N_ENTRIES:] == -1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"`TopK\(k=0\)`: expected a whole number of entries, at least 1"),
        ({"k": 2.5}, r"`TopK\(k=2.5\)`"),
        ({"k": 5, "per": "epoch"}, r"`TopK\(per='epoch'\)`: expected one of `sample`, `step`"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopK(**arguments)


def test_an_outer_product_in_another_shape_is_pruned_as_its_matrix(monkeypatch) -> None:
    formed = []
    original = forming.at_least
    monkeypatch.setattr(forming, "at_least", lambda v, *a, **o: formed.append(v.numel()) or original(v, *a, **o))
    info = ParameterInfo("heads", (5, 80, 20), 0)
    record = TopK(20)
    record.specs([info])
    torch.manual_seed(0)
    for _ in range(3):
        left = torch.randn(4, 5, 100) * 1e-3
        left[:, :, 7] *= 1e4
        share = OuterView(OuterShare(left, torch.randn(4, 5, 80)), (5, 20, 80), (0, 2, 1))
        formed.clear()
        step = StepShifts([4], [ParameterShifts(info, 1.0, [share])])
        rows = record.reduce(step, 0)
        index, shift = sorted_per_sample(dense(step), 20)
        np.testing.assert_array_equal(rows["topk/index"], index)
        np.testing.assert_allclose(rows["topk/shift"], shift, rtol=1e-4)
    assert sum(formed) < 0.1 * 4 * info.numel

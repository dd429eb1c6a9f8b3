"""The sieve leaves out nothing that sorting would keep, whatever the numbers are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_gradtrace.capture.shares import OuterShare
from lightning_gradtrace.capture.shares.contraction import OuterView
from lightning_gradtrace.record import ParameterInfo, ParameterShifts, StepShifts, TopK
from lightning_gradtrace.record.search import comparison, forming, sieve
from lightning_gradtrace.record.search.bounds import OuterBounds
from lightning_gradtrace.record.search.sieve import UNIT, Block, Sieve, relative_error
from tests.record.steps import searched

KINDS = (
    "normal",
    "heavy tails",
    "cancelling",
    "far apart",
    "denormal",
    "ties",
    "equal",
    "one row",
    "not finite",
    "zero",
)
EXACT = ("ties", "equal", "zero")


def draw(kind: str, generator: torch.Generator, *shape: int) -> Tensor:
    """Factors that are hard on a bound, or on the order of entries."""
    values = torch.randn(shape, generator=generator)
    if kind == "heavy tails":
        return values**7
    if kind == "cancelling":  # the second half of the positions takes back what the first brings, nearly
        half = shape[1] // 2
        values[:, half : 2 * half] = -values[:, :half] * (1 + 1e-3 * values[:, half : 2 * half])
        return values
    if kind == "far apart":  # norms from 1e-12 to 1e12
        return values * 10 ** torch.empty(shape[0], 1, shape[2]).uniform_(-12, 12, generator=generator)
    if kind == "denormal":
        return values * 1e-22
    if kind == "ties":
        return values.round()
    if kind == "equal":
        return torch.ones(shape)
    if kind == "one row":
        values[:, :, 1:] *= 1e-4
        return values
    if kind == "not finite":
        values[0, 0, 0], values[-1, -1, -1] = torch.nan, torch.inf
        return values
    return torch.zeros(shape) if kind == "zero" else values


def sieve_of(left: Tensor, right: Tensor, threshold: float) -> Sieve | None:
    bounds = OuterBounds.of(OuterShare(left, right), 1.0)
    return Sieve.of(left, right, bounds.norms.numpy(), bounds.columns.numpy(), np.full(len(left), threshold))


def wrong_and_bound(left: Tensor, right: Tensor, threshold: float) -> tuple[np.ndarray, np.ndarray] | None:
    """By how much sizes in bfloat16 differ from those of exact entries of fit samples, and the sieve's bound of it."""
    found = sieve_of(left, right, threshold)
    if found is None:
        return None
    everything = slice(0, left.shape[2])
    formed = torch.bmm(found.left_of(everything).transpose(1, 2), found.right).double().abs().numpy()
    exact = torch.bmm(left.double().transpose(1, 2), right.double()).abs().numpy() / threshold
    norms = found.rows[:, :, None] * found.columns[:, None, :]
    bound = found.eta * norms + found.flushed[:, None, None] + 2 * UNIT * formed
    return np.abs(formed - exact)[found.fit], bound[found.fit]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    positions=st.sampled_from([1, 2, 9, 64, 300]),
    threshold=st.sampled_from([1.0, 0.3, 1e-12, 1e9, 3e-37, 1e38]),
)
@example(seed=0, kinds=("far apart", "far apart"), positions=9, threshold=1e-12)  # one sample is fit, one is not
def test_the_bound_of_the_error_holds(seed, kinds, positions, threshold) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = draw(kinds[0], generator, 2, positions, 17), draw(kinds[1], generator, 2, positions, 24)
    found = wrong_and_bound(left, right, threshold)
    if found is None:  # not fit: formed in float32
        assert threshold in (3e-37, 1e38) or {"not finite", "heavy tails", "far apart"} & {*kinds}
        return
    wrong, bound = found
    assert (wrong <= bound).all()


def test_a_sample_that_is_not_fit_is_formed_in_float32_beside_one_that_is() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 9, 17, generator=generator), torch.randn(2, 9, 24, generator=generator)
    left[0] *= 1e30
    right[0] *= 1e20
    found = sieve_of(left, right, 1.0)
    assert found is not None and found.fit.tolist() == [False, True]
    block = found.block(slice(0, 17), slice(0, 24), 1.0, np.full(2, 50.0))
    assert block.search(slice(0, 2)) is None and block.search(slice(0, 1)) is None
    assert block.search(slice(1, 2)) is not None


@pytest.mark.parametrize("positions", [1, 8, 64, 512])
def test_the_worst_rounding_comes_near_the_bound(positions: int) -> None:
    """All factors lie just below the middle of two bfloat16 numbers, so that every rounding loses as much as it can."""
    worst = torch.full((1, positions, 4), (1 + 2.0**-8) * (1 - 2.0**-23))
    wrong, bound = wrong_and_bound(worst, worst, 1.0)
    assert (wrong <= bound).all()
    norms = positions * (1 + 2.0**-8) ** 2
    assert (wrong > 0.95 * relative_error(positions) * norms).all()


def test_climbing_towards_larger_errors_stays_below_the_bound() -> None:
    """Factors are changed one by one, and a change is kept if the error of the first entry grows against its bound."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 8, 1, generator=generator), torch.randn(64, 8, 1, generator=generator)
    best = np.zeros(64)
    for _ in range(300):
        changed = [
            torch.where(
                torch.rand(f.shape, generator=generator) < 0.2,
                f * (1 + 0.02 * torch.randn(f.shape, generator=generator)),
                f,
            )
            for f in (left, right)
        ]
        wrong, bound = wrong_and_bound(*changed, 1.0)
        ratio = (wrong / bound).max((1, 2))
        assert (ratio <= 1).all()
        better = torch.from_numpy(ratio > best)[:, None, None]
        left, right = (torch.where(better, new, old) for new, old in zip(changed, (left, right), strict=True))
        best = np.maximum(best, ratio)
    assert best.max() > 0.5  # the search finds bad cases


def steps_of(kind: str, scaled: bool, seed: int, n_steps: int, sizes: list[int], positions: int) -> list[StepShifts]:
    """Steps of a plain matrix and of one in another arrangement, with one number or one per weight as a scale."""
    generator, steps = torch.Generator().manual_seed(seed), []
    other = "ties" if kind in EXACT else "normal"  # sums of whole numbers are the same in any order
    for number in range(n_steps):
        parameters = []
        for info, rows, columns in zip(INFOS, (30, 24), (20, 15), strict=True):
            shares = [
                OuterShare(draw(kind, generator, n, positions, rows), draw(other, generator, n, positions, columns))
                for n in sizes
            ]
            views = shares if info.name == "plain" else [OuterView(share, (4, 6, 15), (0, 2, 1)) for share in shares]
            scale = draw("heavy tails", generator, *info.shape) if scaled else -0.1 * (number + 1)
            parameters.append(ParameterShifts(info, scale, list(views)))
        steps.append(StepShifts(sizes, parameters, number))
    return steps


INFOS = [ParameterInfo("plain", (30, 20), 0), ParameterInfo("heads", (4, 15, 6), 600)]


def record_of(k: int, per: str = "sample", sieved: bool | None = True) -> TopK:
    record = TopK(k, per=per)
    record.specs(INFOS)
    record._searcher.sieved = sieved
    return record


def dense(step: StepShifts, dtype: torch.dtype) -> np.ndarray:
    """Write out all shifts of a step in some dtype, shape (occurrence, entry)."""
    rows = []
    for m in range(len(step.n_samples)):
        parts = []
        for p in step.parameters:
            share = p.shares[m]
            matrix = share.matrix if isinstance(share, OuterView) else share
            wide = OuterShare(matrix.left.to(dtype), matrix.right.to(dtype))
            share = OuterView(wide, share.sizes, share.order) if isinstance(share, OuterView) else wide
            scale = p.scale.to(dtype) if isinstance(p.scale, Tensor) else p.scale
            parts.append((share.dense() * scale).flatten(1))
        rows.append(torch.cat(parts, 1).numpy())
    return np.concatenate(rows)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    scaled=st.booleans(),
    seed=st.integers(0, 10_000),
    k=st.sampled_from([1, 5, 20, 400]),
    per=st.sampled_from(["sample", "step"]),
    sizes=st.sampled_from([[3], [1, 4]]),
    positions=st.sampled_from([2, 16, 70]),
    workspace=st.sampled_from([50, 700, 1 << 18]),
    parts=st.sampled_from([1, 3]),
    many=st.sampled_from([0, comparison.MANY]),
)
def test_selection_equals_sorting(kind, scaled, seed, k, per, sizes, positions, workspace, parts, many) -> None:
    record = record_of(k, per)
    with searched(workspace, parts, many):
        for step in steps_of(kind, scaled, seed, 4, sizes, positions):
            rows = record.reduce(step, 0)
            values = dense(step, torch.float32)
            if per == "step":
                values = values.reshape(1, -1)
                index = rows["topk_step/occurrence"] * 960 + rows["topk_step/index"].astype(np.int64)
            else:
                index = rows["topk/index"].astype(np.int64)
            size = np.where(np.isnan(values), np.inf, np.abs(values))
            kept, best = np.sort(np.take_along_axis(size, index, 1)), np.sort(size)[:, -k:]
            # Entries whose rounding decides between them may change places; nothing larger may be left out.
            typical = np.abs(dense(step, torch.float64)).max() if kind == "cancelling" else 0.0
            np.testing.assert_allclose(kept, best, rtol=1e-5, atol=1e-6 * typical + 1e-37)
            if kind in EXACT:
                order = np.sort(np.argsort(-size, axis=1, kind="stable")[:, :k], axis=1)
                np.testing.assert_array_equal(index, order)


@pytest.mark.parametrize("scaled", [False, True])
def test_most_entries_are_sieved_and_few_are_formed_again(scaled: bool, monkeypatch) -> None:
    sieved, formed, again = [], [], []
    search, at_least, entries = Block.search, forming.at_least, OuterShare.entries
    monkeypatch.setattr(Block, "search", lambda *a: (lambda f: sieved.append(f is not None) or f)(search(*a)))
    monkeypatch.setattr(forming, "at_least", lambda v, *a, **o: formed.append(v.numel()) or at_least(v, *a, **o))
    monkeypatch.setattr(OuterShare, "entries", lambda s, *a: again.append(len(a[0])) or entries(s, *a))
    monkeypatch.setattr(sieve, "AGAIN", 8)  # of so few entries, more than a 32nd are candidates
    record = record_of(2)
    first, *later = steps_of("normal", scaled, 0, 4, [6], 70)
    record.reduce(first, 0)
    for counts in (sieved, formed, again):
        counts.clear()
    for step in later:
        record.reduce(step, 0)
    assert all(sieved) and not formed
    assert 3 * 6 * 2 <= sum(again) < 3 * 3 * 6 * 2


@pytest.mark.parametrize("scaled", [False, True])
def test_a_resumed_record_goes_on_with_the_same_numbers(scaled: bool) -> None:
    steps = steps_of("normal", scaled, 0, 6, [6], 70)
    whole, resumed = record_of(2), record_of(2)
    rows = [whole.reduce(step, 0) for step in steps[:3]]
    resumed.restore(whole.state())
    for step in steps[3:]:
        rows = whole.reduce(step, 0)
        step.shared.clear()
        again = resumed.reduce(step, 0)
        for name in rows:
            np.testing.assert_array_equal(rows[name], again[name])


def test_only_long_shares_in_float32_are_sieved_and_only_where_the_processor_is_fast(monkeypatch) -> None:
    def sieved(positions: int, dtype: torch.dtype, **how: bool) -> bool:
        share = OuterShare(torch.ones(2, positions, 30, dtype=dtype), torch.ones(2, positions, 20, dtype=dtype))
        return forming.Task.of(ParameterShifts(INFOS[0], 1.0, [share]), share, slice(0, 2), **how).sieved

    monkeypatch.setattr(sieve, "is_fast", lambda: True)
    assert sieved(64, torch.float32) and sieved(64, torch.bfloat16)
    assert not sieved(63, torch.float32) and not sieved(64, torch.float64)
    assert not sieved(64, torch.float32, on_device=True)
    monkeypatch.setattr(sieve, "is_fast", lambda: False)
    assert not sieved(64, torch.float32) and sieved(64, torch.float32, sieved=True)


def test_sums_in_bfloat16_would_be_noticed(monkeypatch) -> None:
    assert sieve._adds_in_float32()
    monkeypatch.setattr(torch, "bmm", lambda left, right: torch.full((1, 64, 64), 256.0))
    assert not sieve._adds_in_float32()


@settings(max_examples=100, deadline=None)
@given(
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    scaled=st.booleans(),
    seed=st.integers(0, 10_000),
    risen=st.sampled_from([1.0, 1.3, 50.0]),
    rank=st.integers(1, 20),
)
def test_no_entry_at_the_threshold_is_lost_and_intervals_hold_the_exact_size(kinds, scaled, seed, risen, rank) -> None:
    """The threshold is the size of an entry, so that one entry lies exactly on it."""
    generator = torch.Generator().manual_seed(seed)
    left, right = draw(kinds[0], generator, 1, 64, 40), draw(kinds[1], generator, 1, 64, 50)
    scale = draw("heavy tails", generator, 40, 50) if scaled else -0.3
    exact = torch.bmm(left.double().transpose(1, 2), right.double())[0] * (scale.double() if scaled else scale)
    exact = exact.abs().numpy()
    if not np.isfinite(exact).all():
        return  # not fit, see `test_the_bound_of_the_error_holds`
    threshold = float(np.sort(exact.ravel())[-rank])
    found = sieve_of(left, right, threshold / risen) if threshold > 0 else None
    if found is None:
        return
    block = found.block(slice(3, 40), slice(5, 50), scale[3:40, 5:50] if scaled else scale, np.array([threshold]))
    entries = block.search(slice(0, 1))
    if entries is None:  # too many: formed in float32
        return
    size = exact[entries.row + 3, entries.column + 5]
    assert (np.abs(entries.shift - size) <= entries.error).all()
    assert set(zip(*np.nonzero(exact[3:, 5:] >= threshold), strict=True)) <= {
        *zip(entries.row, entries.column, strict=True)
    }

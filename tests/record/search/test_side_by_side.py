"""What is searched side by side finds what is searched in one go, and touches nothing of the training."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gradtrace import GradTrace, TopK, open_trace
from lightning_gradtrace.capture.engines.functional import ReplayedShare, _Source
from lightning_gradtrace.capture.shares import DenseShare, OuterShare, Share, SumShare
from lightning_gradtrace.record import ParameterInfo, ParameterShifts, StepShifts
from lightning_gradtrace.record.search import comparison, searcher, side_by_side
from lightning_gradtrace.record.search.side_by_side import call_all, n_threads
from lightning_gradtrace.update.preconditioned import MatrixShare
from tests.record.steps import make_infos, make_step, searched
from tests.test_callback import fit, make

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a thread is not kept to one thread")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_answers_are_in_order_and_without_gradients() -> None:
    weight = torch.ones(2, requires_grad=True)
    found = call_all([lambda i=i: (i, (weight * i).requires_grad) for i in range(5)])
    assert found == [(i, False) for i in range(5)]


def test_one_function_is_called_on_this_thread() -> None:
    assert call_all([threading.get_ident]) == [threading.get_ident()]


def test_an_error_is_raised_when_all_have_ended() -> None:
    ended = []

    def wrong() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        call_all([wrong, lambda: ended.append(torch.ones(300, 300) @ torch.ones(300, 300)), wrong])
    assert len(ended) == 1


@linux
def test_every_function_computes_on_one_thread_and_the_others_keep_theirs(two_threads) -> None:
    assert n_threads() == (2 if len(os.sched_getaffinity(0)) > 1 else 1)
    meet = threading.Barrier(2, timeout=30)  # both run at the same time, so on threads of their own

    def seen() -> tuple[list[str], int]:
        meet.wait()
        return numbers(), threading.get_ident()

    before = numbers()
    (first, one), (second, other) = call_all([seen, seen])
    assert {*first} == {*second} == {"1"} and one != other
    assert numbers() == before and torch.get_num_threads() == 2
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [2]


def numbers() -> list[str]:
    """Numbers of threads of torch, OpenMP and MKL that hold for this thread."""
    names = ("at::get_num_threads", "omp_get_max_threads", "mkl_get_max_threads")
    return re.findall(rf"(?:{'|'.join(names)})\(\) : (\d+)", torch.__config__.parallel_info())


@linux
@pytest.mark.parametrize(("samples", "parts"), [(5, 2), (1, 1)])
def test_a_step_is_cut_if_it_is_large_enough(samples: int, parts: int, two_threads, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(searcher, "call_all", lambda f: calls.append(len(f)) or call_all(f))
    monkeypatch.setattr(side_by_side.os, "sched_getaffinity", lambda thread: {0, 1})
    info, record = ParameterInfo("a", (1000, 1100), 0), TopK(5)
    record.specs([info])
    share = OuterShare(torch.randn(samples, 1, 1000), torch.randn(samples, 1, 1100))
    rows = record.reduce(StepShifts([samples], [ParameterShifts(info, 1.0, [share])]), 0)
    assert calls == [parts]
    for sample in range(samples):
        largest = share.dense(slice(sample, sample + 1)).flatten().abs().topk(5).values
        np.testing.assert_allclose(np.sort(np.abs(rows["topk/shift"][sample])), np.sort(largest), rtol=1e-6)


@pytest.mark.parametrize("wrapped", ["alone", "in a sum", "preconditioned"])
def test_a_share_that_runs_the_model_is_read_by_one_thread(wrapped: str) -> None:
    """It puts parameters and random numbers in the place of the model's own meanwhile."""
    threads = []

    def gradients(names: list[str], samples: slice) -> dict[str, torch.Tensor]:
        threads.append(threading.get_ident())
        return {"a": torch.arange(24.0).reshape(6, 2, 2)[samples]}

    share: Share = ReplayedShare("a", _Source(gradients, {"a": ["a"]}, {"a": 4}, 6, 8), torch.Size((2, 2)))
    if wrapped == "in a sum":
        share = SumShare([share, DenseShare(torch.zeros(6, 2, 2))])
    elif wrapped == "preconditioned":
        share = MatrixShare(share, 1.0, None, None)
    info, record = ParameterInfo("a", (2, 2), 0), TopK(1)
    record.specs([info])
    with searched(parts=3):
        rows = record.reduce(StepShifts([6], [ParameterShifts(info, 1.0, [share])]), 0)
    assert rows["topk/shift"].flatten().tolist() == [3.0, 7.0, 11.0, 15.0, 19.0, 23.0]
    assert {*threads} == {threading.get_ident()}


def test_another_openmp_in_the_place_of_that_of_torch_is_noticed(monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # whatever is set
    assert side_by_side._setters.__wrapped__() == ()


def test_where_a_thread_can_not_be_kept_to_one_nothing_is_cut(two_threads, monkeypatch) -> None:
    monkeypatch.setattr(side_by_side, "_setters", lambda: ())
    assert n_threads() == 1


@linux
def test_nothing_is_cut_where_this_thread_is_bound_to_one_core(two_threads, monkeypatch) -> None:
    monkeypatch.setattr(side_by_side.os, "sched_getaffinity", lambda thread: {3})
    assert n_threads() == 1


def test_memory_belongs_to_a_thread() -> None:
    meet = threading.Barrier(2, timeout=30)

    def address() -> int:
        meet.wait()
        return comparison.memory("a test", (3,), torch.float32).data_ptr()

    first, second = call_all([address, address])
    assert first != second


def _in_a_child(answers: multiprocessing.Queue) -> None:
    answers.put(call_all([lambda: 1, lambda: 2]))


@linux
def test_a_forked_process_has_threads_of_its_own() -> None:
    assert call_all([lambda: 1, lambda: 2]) == [1, 2]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what this is about
        child = context.Process(target=_in_a_child, args=(answers,), daemon=True)
        child.start()
    assert answers.get(timeout=60) == [1, 2]
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("parts", [2, 3, 50])  # more parts than occurrences are one for each
def test_a_step_in_parts_has_the_rows_of_a_whole_one(parts: int) -> None:
    whole, cut = TopK(40), TopK(40)
    for record in (whole, cut):
        record.specs(make_infos())
    for number in range(4):
        step = make_step(number, [5, 2], [4, 3])
        rows = whole.reduce(step, 0)
        step.shared.clear()
        with searched(parts=parts):
            others = cut.reduce(step, 0)
        np.testing.assert_array_equal(rows["topk/index"], others["topk/index"])
        np.testing.assert_allclose(rows["topk/shift"], others["topk/shift"], rtol=1e-5, atol=1e-30)
        assert whole.state()["guess"] == pytest.approx(cut.state()["guess"], rel=1e-5)


def test_a_training_is_the_same_bit_for_bit_and_so_is_its_trace_the_second_time(tmp_path: Path, two_threads) -> None:
    plain = make()
    torch.manual_seed(5)
    fit(plain)
    found = []
    for name in ("a", "b"):
        traced = make()
        torch.manual_seed(5)
        with searched(parts=2):
            fit(traced, GradTrace(tmp_path / name, [TopK(30), TopK(50, per="step")]))
        for key, value in plain.state_dict().items():
            assert torch.equal(value, traced.state_dict()[key]), key
        trace = open_trace(tmp_path / name)
        assert trace.verify().ok
        found.append([trace.array(f"{group}/shift")[:] for group in ("topk", "topk_step")])
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)

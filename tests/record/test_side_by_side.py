"""What is searched side by side finds what is searched in one go, and touches nothing of the training."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gradtrace import GradTrace, TopK, open_trace
from lightning_gradtrace.record import comparison, side_by_side
from lightning_gradtrace.record.side_by_side import call_all, n_threads
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
    assert n_threads() == min(2, len(os.sched_getaffinity(0)))
    meet = threading.Barrier(2, timeout=30)  # both run at the same time, so on threads of their own

    def seen() -> tuple[int, int]:
        meet.wait()
        return torch.get_num_threads(), threading.get_ident()

    (first, one), (second, other) = call_all([seen, seen])
    assert first == second == 1 and one != other
    assert torch.get_num_threads() == 2
    assert call_all([torch.get_num_threads]) == [2]


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

"""Calls functions side by side on the host, each on one of the threads that torch computes with.

Small products, comparisons in NumPy and Python in between don't fill two cores when torch divides every product among
its threads; samples are independent of each other, so each thread takes some of them instead.

Each thread is kept to itself by OpenMP's and MKL's own functions, which hold for the calling thread alone.
`torch.set_num_threads` also changes what the whole process has: how many threads a thread has that uses torch for the
first time later, and whether MKL chooses their number by itself. The training must not notice.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from threading import Thread
from typing import TypeVar

import torch

T = TypeVar("T")


def n_threads() -> int:
    """Return how many functions run side by side: torch's threads, or 1 where a thread can't be kept to one of them.

    New threads may use the cores that this one may. If those are fewer than torch's threads, OpenMP has bound this one
    to some of them (`OMP_PROC_BIND`), and its other threads have the rest.
    """
    n = torch.get_num_threads()
    return n if _setters() and len(os.sched_getaffinity(0)) >= n else 1


def call_all(functions: Sequence[Callable[[], T]]) -> list[T]:
    """Call functions and return what they return, in their order; one alone is called on this thread.

    Raises:
        Exception: what the first of them raised, after all have ended.
    """
    if len(functions) == 1:
        return [functions[0]()]
    running: list[Future[T]] = [_pool().submit(_without_gradients, function) for function in functions]
    try:
        wait(running)
        return [one.result() for one in running]
    finally:
        del running  # with an exception they hold this frame, and it them


def _without_gradients(function: Callable[[], T]) -> T:
    with torch.no_grad():  # belongs to a thread
        return function()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="gradtrace-search", initializer=_keep_to_one_thread)


if hasattr(os, "register_at_fork"):  # the threads of a parent are not there after a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _keep_to_one_thread() -> None:
    torch.get_num_threads()  # a thread's first use of torch sets its number of threads
    for setter in _setters():
        setter(1)


@cache
def _setters() -> tuple[Callable[[int], object], ...]:
    """Return the functions by which OpenMP and MKL are told the number of threads for the calling thread.

    There are none where they are not found, or torch uses others: a preloaded OpenMP comes before its own.
    """
    if not sys.platform.startswith("linux") or not torch.backends.openmp.is_available():
        return ()
    names = ["omp_set_num_threads", *(["MKL_Set_Num_Threads_Local"] if torch.backends.mkl.is_available() else [])]
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        setters = tuple(getattr(library, name) for name in names)
    except (OSError, AttributeError):
        return ()
    found: list[int] = []

    def attempt() -> None:
        torch.get_num_threads()
        for setter in setters:
            setter(1)
        found.append(torch.get_num_threads())

    thread = Thread(target=attempt)
    thread.start()
    thread.join()
    return setters if found == [1] else ()

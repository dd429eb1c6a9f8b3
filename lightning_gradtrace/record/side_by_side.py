"""Calls functions side by side on the host, each on one of the threads that torch computes with.

Small products, comparisons in NumPy and Python in between don't fill two cores when torch divides every product among
its threads; samples are independent of each other, so each thread takes some of them instead.

`torch.set_num_threads` is not for that: it changes the number of threads of MKL for the whole process, and with it the
last bits of the training. OpenMP and MKL can be told for one thread alone, which torch does not expose.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def n_threads() -> int:
    """Return how many functions run side by side: torch's threads, or 1 where a thread can't be kept to one of them.

    New threads may use the cores that this one may; OpenMP can have bound it to one (`OMP_PROC_BIND`).
    """
    return min(torch.get_num_threads(), len(os.sched_getaffinity(0))) if _setters() else 1


def call_all(functions: Sequence[Callable[[], T]]) -> list[T]:
    """Call functions and return what they return, in their order; one alone is called on this thread.

    Raises:
        Exception: what the first of them raised, after all have ended.
    """
    if len(functions) == 1:
        return [functions[0]()]
    running = [_pool(os.getpid()).submit(_without_gradients, function) for function in functions]
    wait(running)
    return [one.result() for one in running]


def _without_gradients(function: Callable[[], T]) -> T:
    with torch.no_grad():  # belongs to a thread
        return function()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return threads of this process: those of a parent are not there after a fork."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="gradtrace-search", initializer=_keep_to_one_thread)


def _keep_to_one_thread() -> None:
    torch.get_num_threads()  # a thread's first use of torch sets its number of threads
    for setter in _setters():
        setter(1)


@cache
def _setters() -> tuple[Callable[[int], object], ...]:
    """Return the functions by which OpenMP and MKL are told the number of threads for the calling thread."""
    if not sys.platform.startswith("linux") or not torch.backends.openmp.is_available():
        return ()
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        names = ["omp_set_num_threads", *(["MKL_Set_Num_Threads_Local"] if torch.backends.mkl.is_available() else [])]
        return tuple(getattr(library, name) for name in names)
    except (OSError, AttributeError):
        return ()

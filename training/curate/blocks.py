"""Divide work on large arrays into fixed blocks that threads compute.

A matrix product of BLAS depends in its last bits on the number of its threads and on the shape of its operands. The
modules that cluster and compare embeddings therefore divide their work into blocks whose shapes depend only on the
data. BLAS computes each block with one thread, several blocks run at once, and the results are used in the order of
the blocks. The result has the same bytes for any number of threads on machines with the same CPU and libraries.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np  # noqa: F401  # loads its BLAS library, which `_libraries` then finds
from threadpoolctl import ThreadpoolController

from model.cpus import available_cpus
from training.ordered import Item, Result, ordered


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()  # it takes milliseconds to find the libraries


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let each matrix product of numpy use one thread, in the whole process, for the duration of the block."""
    with _libraries().limit(limits=1, user_api="blas"):
        yield


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None) -> Iterator[Result]:
    """Yield the result of `work` for each item, in the order of the items.

    Up to `threads` items are computed at once; the default is one per CPU. At most twice as many results are in memory.

    Raises:
        ValueError: `threads` is less than 1.
    """
    threads = available_cpus() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    if threads == 1:
        yield from map(work, items)
        return
    yield from ordered(work, items, threads, ahead=2 * threads)

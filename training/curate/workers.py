"""Worker processes. Each makes its own worker object once, and then works on one item after the other.

An item's result does not depend on the process that computes it, so the number of processes changes only the time. The
computations of a process use one thread each. If this process is killed, its workers end.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item", contravariant=True)
Result = TypeVar("Result", covariant=True)
Work = Callable[[Item], Result]
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_work: Callable[[Any], Any] | None = None  # of this worker process


class RunAll(Protocol):
    """A way to compute many items, such as `Workers` of this machine or of a Ray cluster."""

    def __call__(self, make: Callable[[], Work[Any, Any]], items: Sequence[Any]) -> Iterator[Any]:
        """Yield the results of `make()(item)` for each item, in any order.

        Args:
            make: a function that returns a worker object, which is then called with items. Each process calls it once.
            items: the items. They, their results, and `make` can be pickled.

        Raises:
            Exception: an error that a worker raised, or an OSError if a worker was killed.
        """


class Workers:
    """A number of worker processes on this machine. If the number is 1, this process does the work."""

    def __init__(self, number: int) -> None:
        if number < 1:
            raise ValueError(f"workers={number} must be at least 1")
        self.number = number

    def __call__(self, make: Callable[[], Work[Any, Any]], items: Sequence[Any]) -> Iterator[Any]:
        """See `RunAll`."""
        if self.number == 1 or len(items) < 2:
            work = make() if items else None
            for item in items:
                assert work is not None
                yield work(item)
            return
        yield from self._in_processes(make, items)

    def _in_processes(self, make: Callable[[], Work[Any, Any]], items: Sequence[Any]) -> Iterator[Any]:
        number = min(self.number, len(items))
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of this process hold
        with ProcessPoolExecutor(number, context, _start, (make,)) as pool:
            left = iter(items)
            waiting: set[Future[Any]] = set()
            try:
                while True:
                    for item in left:
                        waiting.add(pool.submit(_do, item))
                        if len(waiting) >= 2 * number:
                            break
                    if not waiting:
                        return
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            except BrokenProcessPool as error:
                raise OSError(
                    "a worker process was killed, perhaps because the memory was used up; use fewer --workers"
                ) from error
            finally:
                for future in waiting:
                    future.cancel()


def _start(make: Callable[[], Work[Any, Any]]) -> None:
    """Prepare a worker process."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the parent ends the workers
    os.environ.update(dict.fromkeys(THREADS, "1"))
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    _work = make()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_end([parent.sentinel])
    os._exit(1)


def _do(item: Any) -> Any:
    assert _work is not None
    return _work(item)

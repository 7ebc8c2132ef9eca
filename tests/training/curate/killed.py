"""Processes that are killed in the middle of their work, for the tests of what a killed run leaves behind.

They are forked from a process that has imported the modules of curation and has no threads. A fork of the process that
runs the tests could wait forever for a lock that one of its threads held.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pytest
from _pytest.monkeypatch import derive_importpath

LIMIT_S: Final = 600


def exit_code_of(
    work: Callable[[], object], kill_in: Sequence[str] = (), call: int = 1, replaced: Mapping[str, object] | None = None
) -> int:
    """Do work in another process, and kill it when it calls a function. Return the process's exit code.

    The exit code is `-signal.SIGKILL` if the process was killed, 0 if the work was done before the call, and 1 if the
    work failed.

    Args:
        work: the work; it can be pickled.
        kill_in: the functions whose calls are counted, such as "training.curate.stages.publish". If there are none,
            the work kills its process itself.
        call: the number of the call, from 1, in which the process is killed.
        replaced: other functions and constants that the process replaces, by name.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "training.curate.run", "tests.training.curate.small_images"])
    process = context.Process(target=_work, args=(work, tuple(kill_in), call, dict(replaced or {})))
    process.start()
    process.join(LIMIT_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"the process did not end within {LIMIT_S} s")
    assert process.exitcode is not None
    return process.exitcode


def _work(work: Callable[[], object], kill_in: Sequence[str], call: int, replaced: dict[str, object]) -> None:
    calls = iter(range(1, call))

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: object, **kwargs: object) -> object:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for where, value in replaced.items():
            patch.setattr(where, value)
        for where in kill_in:
            name, target = derive_importpath(where, raising=True)
            patch.setattr(target, name, killing(getattr(target, name)))
        work()

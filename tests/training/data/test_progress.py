"""Progress: when lines are told, and that a failing or fast piece of work leaves no thread behind."""

import threading

import pytest

import training.data.progress
from training.data.progress import Tally, progress


@pytest.fixture
def waits(monkeypatch):
    """Replace the clock: waiting takes no time, and the work ends during the fourth wait."""
    waited = []

    class Clock(threading.Event):
        def wait(self, timeout=None):
            waited.append(timeout)
            return len(waited) > 3 and super().wait(60)

    monkeypatch.setattr(training.data.progress, "Event", Clock)
    return waited


@pytest.mark.parametrize(
    ("share", "expected", "n_lines"),
    [(None, [1, 1, 5, 5], 2), (lambda: 0.5, [1, 1, 5, 5], 2), (lambda: 0.49, [1, 5, 5, 5], 3)],
)
def test_the_first_line_comes_after_two_seconds_or_after_one_if_much_is_left(waits, share, expected, n_lines):
    told, enough = [], threading.Semaphore(0)

    def tell(line):
        told.append(line)
        enough.release()

    with progress(tell, lambda: f"line {len(told)}", share):
        for _ in range(n_lines):
            assert enough.acquire(timeout=60)
    assert told == [f"line {i}" for i in range(n_lines)]
    assert waits == expected


def test_fast_work_is_not_told():
    told = []
    with progress(told.append, lambda: "line"):
        pass
    with progress(None, lambda: "line"):
        pass
    assert told == []
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_work_that_fails_ends_the_thread():
    with pytest.raises(RuntimeError, match="mine"), progress(print, lambda: "line"):
        raise RuntimeError("mine")
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_tally_is_a_text():
    assert str(Tally(12_000)) == "12,000 so far"
    assert str(Tally(12_000, 3, 4_000)) == "12,000 so far (3 of 4,000 shards)"

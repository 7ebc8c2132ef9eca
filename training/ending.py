"""What ends a run before its last step: signals, and checks that detect a failing run.

A run that a check stopped has the file `stopped.json` in its folder, so that the same command does not repeat the same
steps only to be stopped again. The run resumes as soon as a setting of the checks has changed.
"""

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from model.files import write_text

STOPPED = "stopped.json"
STOPPED_STATUS = 3
"""The exit status of a run that a check stopped. The same command would be stopped again."""

WATCHING = (
    *("on_collapse", "on_measure", "on_not_finite", "sentinel_lines", "rollback_lr_factor", "max_rollbacks"),
    *("measure_margin", "min_rankme_share", "eval_every_epochs", "evaluations", "patience"),
)
"""The settings of the checks. They may change when a run is resumed."""

SECOND_AFTER_S = 2.0  # torchrun and the terminal may send the same Ctrl-C twice within moments


class RunStopped(RuntimeError):
    """An error that ends a training run because a check found a failure. The message states why."""


class Interrupted(RuntimeError):
    """An exception that ends the run because of a signal. No work is lost, and the same command resumes the run.

    `status` is the exit status of the process, 128 plus the number of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


@dataclass
class Signals:
    """The handler of SIGTERM and SIGINT (Ctrl-C) of a run. It stores the signal in `came` and raises `Interrupted`.

    While `deferred` is True, the handler only sets `came`. The training loop then reads `came`, saves a state and
    raises `Interrupted` itself. A second Ctrl-C ends the process at once.
    """

    came: int | None = None
    deferred: bool = False
    _at: float = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.came is not None and number == signal.SIGINT and time.monotonic() - self._at > SECOND_AFTER_S:
            raise KeyboardInterrupt
        if self.came is None:
            self.came, self._at = number, time.monotonic()
        if not self.deferred:
            raise self.interrupted("no work is lost")

    def interrupted(self, fate: str) -> Interrupted:
        """Return the exception for the signal that came. `fate` says what happened to the work."""
        assert self.came is not None
        name = "Ctrl-C" if self.came == signal.SIGINT else signal.Signals(self.came).name
        return Interrupted(f"stopped by {name}; {fate}: run the same command again to resume", self.came)


@contextmanager
def signals_noted() -> Iterator[Signals]:
    """Install a `Signals` as the handler of SIGTERM and SIGINT for the duration of the block, and yield it.

    Only the main thread can install a signal handler. In any other thread, the `Signals` is yielded but not installed.
    """
    handler = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def note_stop(out: Path, settings: Mapping[str, Any], reason: str) -> None:
    """Write `stopped.json`, which says why a check stopped the run, and with which settings of the checks."""
    watching = {name: settings[name] for name in WATCHING}
    write_text(out / STOPPED, json.dumps({"reason": reason, "watching": watching}, indent=1))


def why_stopped(out: Path, settings: Mapping[str, Any]) -> str | None:
    """Return why a check stopped the run in the folder `out`, if its settings of the checks are still the same.

    The result is None if no check stopped the run, or if a setting has changed.
    """
    path = out / STOPPED
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        same = all(record["watching"].get(name) == settings[name] for name in WATCHING)
        reason = str(record["reason"])
    except (ValueError, KeyError, AttributeError, TypeError):  # damaged: nothing is known about the stop
        same, reason = False, ""
    if not same:
        return None
    return (
        f"a check stopped this run, and would stop it again. {reason} To resume it, change a setting of the checks "
        f"(such as on_collapse=warn or on_measure=warn), or remove {path}."
    )

"""Decides whether failed forward passes mean that the engine is broken.

A forward pass can fail because of its images, for a moment (no free memory on a GPU that others use too), or for ever.
Clients must not be able to turn /livez red with images that the engine cannot process. So a failed pass is followed by
a *probe*: a pass with input that is known to work. Only a failed probe counts.
"""

import logging
from collections.abc import Callable
from typing import Final

from model.engines.broken import is_sticky

log = logging.getLogger(__name__)

MOST_FAILED: Final = 3
"""The number of probes in a row that must fail before the engine counts as broken. A single failure may be a lack of
memory that another process on the same GPU has caused for a moment."""
PROBE_S: Final = 5.0
"""The time between two probes in seconds, while the engine fails and no image waits."""


class EngineFaults:
    """Counts the failures of an engine. Only the thread that owns the engine may call the methods.

    Args:
        probe: runs a forward pass that is known to work. If it is None, only sticky errors count.
    """

    def __init__(self, probe: Callable[[], object] | None) -> None:
        self._probe = probe
        self._failed = 0
        self.is_final = False
        """True if the engine cannot work again in this process."""

    @property
    def fault(self) -> str | None:
        """A description of the fault for /livez, or None if the engine works. Any thread may read it."""
        if self.is_final:
            return "the GPU has failed in a way that only a new process can repair"
        if self._failed >= MOST_FAILED:
            return f"{self._failed} forward passes in a row have failed, although their input is known to work"
        return None

    @property
    def probe_in_s(self) -> float | None:
        """The time in seconds after which an idle engine is probed, or None if the engine works."""
        return PROBE_S if self._failed else None

    def passed(self) -> None:
        """Note that a forward pass succeeded."""
        self._failed = 0

    def failed(self, error: BaseException) -> None:
        """Note that a forward pass failed, and find out whether the engine still works."""
        if is_sticky(error):
            self.is_final = True
            log.critical("the engine is broken, and the process must be restarted: %s", error)
        else:
            self.probe()

    def probe(self) -> None:
        """Run a forward pass that is known to work, and note its result."""
        if self._probe is None:
            return
        try:
            self._probe()
        except Exception as error:
            self._failed += 1
            if is_sticky(error):
                self.is_final = True
            log.critical("the engine fails also with input that is known to work (%d)", self._failed, exc_info=True)
        else:
            self.passed()

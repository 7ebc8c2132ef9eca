"""Run long work in a thread, so that it does not delay other requests on the event loop."""

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from service.clients import current_sender
from service.fair import FairThreads

T = TypeVar("T")

BIG_BODY: Final = 2**18
"""Parsing a body (JSON or base64) of at least this many bytes noticeably delays the event loop."""

_THREADS: Final = FairThreads(2, "off-loop")
"""Parsing JSON and base64 holds the interpreter's lock. With a thread for each large body, one client could delay all
others by the time for all its bodies, so there are few threads, and clients take turns."""


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Call `work`, which processes `size` bytes, and return its result. If `size` is at least `BIG_BODY` bytes, call
    `work` in a thread."""
    return work() if size < BIG_BODY else await asyncio.wrap_future(_THREADS.submit(current_sender.get(), work))

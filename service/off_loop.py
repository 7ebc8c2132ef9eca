"""Run long work in a thread, so that it does not delay other requests on the event loop."""

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

BIG_BODY: Final = 2**18
"""Parsing a body (JSON or base64) of at least this many bytes noticeably delays the event loop."""


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Call `work`, which processes `size` bytes, and return its result. If `size` is at least `BIG_BODY` bytes, call
    `work` in a thread."""
    return work() if size < BIG_BODY else await asyncio.to_thread(work)

"""Run work in a thread if it would delay other requests on the event loop."""

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

BIG_BODY: Final = 2**18
"""Parsing a body of this many bytes or more (JSON or base64) noticeably delays the event loop."""


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Run `work` and return its result. It processes `size` bytes; if these are at least BIG_BODY, it runs in a
    thread."""
    return work() if size < BIG_BODY else await asyncio.to_thread(work)

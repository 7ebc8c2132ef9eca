"""Work that grows with a body's size, off the event loop when the others would notice."""

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

BIG_BODY: Final = 2**18
"""Bytes from which parsing JSON and base64 would hold up the event loop noticeably."""


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """The result of `work`, which goes over `size` bytes: on a thread if the event loop would notice."""
    return work() if size < BIG_BODY else await asyncio.to_thread(work)

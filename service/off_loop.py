"""Run work that grows with the body's size off the event loop if it would delay other requests."""

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

BIG_BODY: Final = 2**18
"""Size in bytes from which parsing JSON or base64 noticeably delays the event loop."""


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Return the result of `work`, which processes `size` bytes. A large size runs on a thread."""
    return work() if size < BIG_BODY else await asyncio.to_thread(work)

"""The cost of a request in pixels, on which the rate limits are based (service/limits.py).

`Border` (service/middleware.py) makes a `Cost` for each request that is limited. The pipeline
(service/features/pipeline.py) adds the cost of each image to the `Cost` of the current request when the image's header
has been read, before any pixel is decompressed. A context variable connects the two, so the functions between them do
not have to pass it on. A task inherits the context variable from the request that started it.
"""

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

from model.decode import DecodeError

current_cost: Final[ContextVar["Cost | None"]] = ContextVar("current_cost", default=None)
"""The cost of the request that the current task belongs to. None if the request is not limited."""


class TooCostly(DecodeError):
    """The error for an image that is not decoded, because the cost of its request would exceed the limit."""


class Cost:
    """The cost of the images of one request, in pixels. Any thread may use it. `most` is the highest cost that one
    request may have."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._pixels = 0
        self._refused = False
        self._add_late: Callable[[int], None] | None = None

    @property
    def pixels(self) -> int:
        return self._pixels

    @property
    def refused(self) -> bool:
        """Whether an image was refused."""
        return self._refused

    def add(self, pixels: int) -> None:
        """Add the cost of one image.

        Raises:
            TooCostly: the sum would exceed `most`. The cost was not added. After `settle`, this error is not raised.
        """
        with self._lock:
            fits = self._pixels + pixels <= self._most
            late = self._add_late
            if fits:
                self._pixels += pixels
            elif late is None:
                self._refused = True
                raise TooCostly(
                    f"the images of this request cost more than {self._most} pixels, the limit of one request: send "
                    "fewer or smaller images at a time"
                )
        if fits and late is not None:
            late(pixels)

    def settle(self, add_late: Callable[[int], None]) -> int:
        """Return the cost at the end of the request.

        A task that the request started may still run, for example because another request waits for its result. Each
        image that is added afterwards is passed to `add_late`, as long as the sum is at most `most`. More is not
        charged, because a task may outlive its request by hours.
        """
        with self._lock:
            self._add_late = add_late
            return self._pixels

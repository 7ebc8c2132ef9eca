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


_lock: Final = threading.Lock()  # for all costs, because making a lock for each request would take longer


class TooCostly(DecodeError):
    """The error for an image that is not decoded, because the cost of its request would exceed the limit."""


class Cost:
    """The cost of the images of one request, in pixels. Any thread may use it.

    A task that the request started may still run after its end, for example because another request waits for its
    result. Each image that is added then is passed to `charge_late`, as long as the sum is at most `most`. More is not
    charged, because a task may outlive its request by hours.

    Args:
        most: the highest cost that one request may have.
        charge_late: a function that charges pixels after the end of the request.
    """

    __slots__ = ("_charge_late", "_most", "_settled", "pixels", "refused")

    def __init__(self, most: int, charge_late: Callable[[int], object]) -> None:
        self.pixels = 0
        self.refused = False  # whether an image was refused
        self._most = most
        self._charge_late = charge_late
        self._settled = False

    def add(self, pixels: int) -> None:
        """Add the cost of one image.

        Raises:
            TooCostly: the sum would exceed `most`. The cost was not added. After `settle`, this error is not raised.
        """
        with _lock:
            fits = self.pixels + pixels <= self._most
            late = self._settled
            if fits:
                self.pixels += pixels
            elif not late:
                self.refused = True
                raise TooCostly(
                    f"the images of this request cost more than {self._most} pixels, the limit of one request: send "
                    "fewer or smaller images at a time"
                )
        if fits and late:
            self._charge_late(pixels)

    def settle(self) -> int:
        """Return the cost at the end of the request."""
        with _lock:
            self._settled = True
            return self.pixels

"""Limits the memory for request bodies, images that are fetched for requests, and answers that clients have not read.

All of them together occupy at most `limit` bytes. Each client has a share of it (service/fair.py), and the last eighth
is a reserve for requests of at most `SMALL_BYTES`, so that large bodies never keep out normal images.
"""

from typing import Final

from service.errors import ShareUsed, Unavailable
from service.fair import Shares

SMALL_BYTES: Final = 4 * 2**20
"""The highest number of bytes of a request that may use the reserve."""
RESERVE: Final = 8
"""The reserve is this part of the memory: one eighth."""


class Buffer:
    """The bytes in memory, by client. It belongs to one event loop."""

    def __init__(self, limit: int, share: float = 1.0) -> None:
        self._shares = Shares(limit, share)

    @property
    def used(self) -> int:
        """The number of bytes that are counted at the moment."""
        return self._shares.used

    def take(self, client: str, size: int, own: int) -> None:
        """Count `size` more bytes of a request that occupies `own` bytes already. A request that is alone in memory is
        never refused.

        Raises:
            ShareUsed: the client would occupy more than its share. Nothing was counted.
            Unavailable: all requests together would occupy too much. Nothing was counted.
        """
        shares = self._shares
        if shares.used > own:
            if not shares.may_add(client, size, own):
                raise ShareUsed(
                    f"requests and unread answers of this client occupy {shares.held(client)} bytes of memory, and "
                    f"{size} more would exceed its share: send fewer at the same time, and read the answers"
                )
            limit = shares.limit if own + size <= SMALL_BYTES else shares.limit - shares.limit // RESERVE
            if shares.used + size > limit:
                raise Unavailable(
                    f"requests and unread answers use more than {limit} bytes; try again later", retry_after_s=1
                )
        shares.add(client, size)

    def add(self, client: str, size: int) -> None:
        """Count `size` more bytes of a client, even if there is no room. A negative number is given back."""
        self._shares.add(client, size)

"""Limits the connections of this process, in total and for each address (service/fair.py)."""

from collections.abc import Callable
from typing import Final

from service.clients import network
from service.fair import Shares

_TOO_MANY: Final = (
    b'{"type":"urn:dinov2:error:too_many_connections","title":"Too many connections","status":503,'
    b'"detail":"too many connections are open, in total or from this address","code":"too_many_connections"}'
)
TURNED_AWAY: Final = b"""HTTP/1.1 503 Service Unavailable\r
content-type: application/problem+json\r
content-length: %d\r
retry-after: 1\r
connection: close\r
\r
%s""" % (len(_TOO_MANY), _TOO_MANY)
"""What a connection beyond the limit gets before it is closed."""


class Connections:
    """Counts the open connections of this process, in total and by the address of the peer.

    Args:
        most: the highest number of connections.
        share: the share of what the other addresses leave that one address may use.
        are_of_proxies: whether all connections come from trusted proxies, so that addresses have no share.
    """

    def __init__(self, most: int, share: float, *, are_of_proxies: bool = False) -> None:
        self._places = Shares(most, share)
        self._are_of_proxies = are_of_proxies
        self.on_refused: Callable[[], object] = lambda: None

    @property
    def open(self) -> int:
        """The number of open connections."""
        return self._places.used

    def admit(self, address: str) -> str | None:
        """Count a connection, and return the name under which it is counted. Return None if it is refused."""
        name = "" if self._are_of_proxies else network(address)
        if not self._places.fits(1) or not self._places.may_add(name, 1):
            self.on_refused()
            return None
        self._places.add(name, 1)
        return name

    def forget(self, name: str) -> None:
        """Note that a connection is closed. `name` is what `admit` returned."""
        self._places.add(name, -1)

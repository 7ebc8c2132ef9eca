"""Says which client sends a request. Rate limits, queues and memory are shared out among clients.

A client is an API key. Requests without a key belong to the client's address, or to its network of 64 bits if the
address is IPv6. A context variable passes the sender of a request on to the code that works for it. A task inherits the
context variable from the request that started it.
"""

import ipaddress
from contextvars import ContextVar
from functools import lru_cache
from typing import Final, NamedTuple, Protocol


class Principal(Protocol):
    """Who sends a request, according to its API key. `key_id` is None if the request has no API key."""

    @property
    def key_id(self) -> str | None: ...


class Sender(NamedTuple):
    """The client of a request, and the number of the request. Work of the service itself has no client."""

    client: str = ""
    request: int = 0


ITSELF: Final = Sender()
"""The sender of work that no request asked for."""
current_sender: Final[ContextVar[Sender]] = ContextVar("current_sender", default=ITSELF)
"""The sender of the request that the current task belongs to."""


def client_of(principal: Principal | None, address: str) -> str:
    """Return the name of a client. `principal` is None if keys are not used. `address` counts if the request has no
    key."""
    return client_name(None if principal is None else principal.key_id, address)


def client_name(key_id: str | None, address: str) -> str:
    """Return the name of the client that has this API key. `address` counts if `key_id` is None."""
    return f"address:{network(address)}" if key_id is None else f"key:{key_id}"


@lru_cache(maxsize=4096)
def network(address: str) -> str:
    """Return an IPv4 address, or the network of 64 bits of an IPv6 address, because one client usually has a whole such
    network. An address of another form is returned unchanged."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))

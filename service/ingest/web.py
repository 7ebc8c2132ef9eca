"""Read images at http and https addresses for `dinov2 index`.

An address that the operator typed is requested as it is. An address in a list comes from elsewhere and must not reach
the network of this machine: its host must have a public address, each redirect is checked too, and the connection goes
to the address that was checked.
"""

import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

import httpx

from service.errors import ImageTooLarge
from service.public_addresses import why_not_public

_STEP_S: Final = 30.0  # time limit for a connection, and for the next bytes
_LIMIT_S: Final = 120.0
"""Time limit for one image in seconds. It also limits servers that send a few bytes at a time."""
_MAX_REDIRECTS: Final = 5
_PORTS: Final = {"http": 80, "https": 443}

Resolve = Callable[[str, int], Sequence[str]]
"""Returns the IP addresses of a host and port, the best one first. It raises OSError if there is none."""


def resolve(host: str, port: int) -> list[str]:
    return list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


class PublicOnly(httpx.BaseTransport):
    """Connects only to public addresses. `inner` makes the connections, in tests without a network."""

    def __init__(self, resolve: Resolve = resolve, inner: httpx.BaseTransport | None = None) -> None:
        self._resolve = resolve
        # A connection to an address may be for another host with the same address, so it is used only once.
        once = httpx.Limits(max_keepalive_connections=0)
        self._inner = inner or httpx.HTTPTransport(trust_env=False, limits=once)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request to the host of its URL.

        Raises:
            httpx.ConnectError: the host has no address, one that is not public, or cannot be reached.
            httpx.UnsupportedProtocol: the URL, which may come from a redirect, is not a web address.
        """
        url = request.url
        if url.scheme not in _PORTS:
            raise httpx.UnsupportedProtocol(f"{url.scheme}:// is not a web address")
        try:
            found = self._resolve(url.host, url.port or _PORTS[url.scheme])
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(f"{url.host} cannot be resolved: {error}") from error
        reasons = [reason for address in found if (reason := why_not_public(address)) is not None]
        if reasons or not found:
            raise httpx.ConnectError(f"{url.host} is not public: {', '.join(reasons) or 'it has no address'}")
        best = {":" in address: address for address in reversed(found)}  # one of IPv4 and one of IPv6
        *others, last = sorted(best.values(), key=found.index)
        for address in others:
            try:
                return self._inner.handle_request(_sent_to(request, address))
            except httpx.ConnectError:
                continue
        return self._inner.handle_request(_sent_to(request, last))

    def close(self) -> None:
        self._inner.close()


def _sent_to(request: httpx.Request, address: str) -> httpx.Request:
    """Return the same request, for a connection to `address`. TLS and the header Host have the name of the host."""
    return httpx.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": request.url.host},
    )


class Web:
    """A reader of images at http and https addresses. All threads share it.

    If `transport` is None, the reader may connect to every address, and uses the proxies of the environment.
    """

    def __init__(self, transport: Callable[[], httpx.BaseTransport] | None = None) -> None:
        self._transport = transport
        self._client: httpx.Client | None = None

    def _opened(self) -> httpx.Client:
        if self._client is None:
            self._client = httpx.Client(
                transport=self._transport() if self._transport is not None else None,
                trust_env=self._transport is None,
                follow_redirects=True,
                max_redirects=_MAX_REDIRECTS,
                timeout=_STEP_S,
                headers={"Accept-Encoding": "identity"},
            )
        return self._client

    def read(self, url: str, max_bytes: int) -> bytes:
        """Send a GET request and return the body of the response.

        Raises:
            OSError: the request failed, or the response has an error status or is compressed.
            ImageTooLarge: the body has more than `max_bytes` bytes. The rest of the body is not read.
        """
        parts, size, until = [], 0, time.monotonic() + _LIMIT_S
        try:
            with self._opened().stream("GET", url) as response:
                response.raise_for_status()
                encoding = response.headers.get("content-encoding", "identity")
                if encoding.lower() != "identity":
                    raise OSError(f"the response is compressed with {encoding[:40]!r}")
                for part in response.iter_raw():
                    parts.append(part)
                    size += len(part)
                    if size > max_bytes:
                        raise ImageTooLarge(f"the file exceeds the limit of {max_bytes} bytes")
                    if time.monotonic() > until:
                        raise OSError(f"the file was not complete after {_LIMIT_S:g} s")
        except httpx.HTTPStatusError as error:
            raise OSError(f"HTTP {error.response.status_code}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise OSError(str(error) or type(error).__name__) from error
        return b"".join(parts)

"""Fetch images from URLs that clients send in place of images.

A client must not be able to reach the network of the service with such a URL. These rules prevent it
(docs/decisions/0035-image-urls.md):

- The feature is off unless the operator lists the allowed hosts.
- Every name is resolved once. All of its addresses must be public, and the connection goes to one of these addresses,
  so a name that later resolves to another address has no effect.
- Redirects are followed here and not by httpx. Each new URL passes all checks again.
- The certificate must be valid for the host in the URL. Proxies, cookies and passwords are never used.
- All failures of the network have the same error, so that clients cannot explore networks. The log has the reason.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final
from urllib.parse import urljoin
from weakref import WeakValueDictionary

import httpx

from model.decode import sniff
from model.folder import HEAD_BYTES
from service.buffer import Buffer
from service.clients import current_sender
from service.errors import (
    ImageTooLarge,
    ImageUrlFailed,
    InvalidRequest,
    PayloadTooLarge,
    QueueFull,
    ServiceError,
)
from service.image_urls import ImageUrl, parse_hosts, parse_image_url
from service.outcomes import Outcome, attempt_await
from service.public_addresses import why_not_public
from service.settings import Settings

log = logging.getLogger(__name__)

MAX_REDIRECTS: Final = 3
FETCH_S: Final = 10.0
"""Time limit for one URL in seconds, with its redirects. It also limits servers that send a few bytes at a time."""
_STALL_S: Final = 5.0  # time limit for a connection, and for the next bytes
_WAIT_S: Final = 5.0  # time limit for waiting until other fetches end
_STEP_S: Final = 0.25
"""Failures are reported after a multiple of this time in seconds. So the time of a failure hardly shows whether an
address was refused or could not be reached."""
_IN_PROCESS, _PER_REQUEST, _PER_ADDRESS = 32, 8, 8
"""The highest numbers of connections at the same time. A limit for each address prevents clients from directing all
connections of the service at one server."""
_RESOLVER_THREADS: Final = 8
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_HEADERS: Final = {
    "User-Agent": "dinov2-service",
    "Accept": "image/*",
    "Accept-Encoding": "identity",
    "Connection": "close",
}
_FAILED: Final = (
    "the image of this URL could not be fetched. Its server must have a public address and a valid certificate, and "
    f"answer within {FETCH_S:g} s with an uncompressed image and status 200, after at most {MAX_REDIRECTS} redirects. "
    "The service's log has the reason"
)

Resolve = Callable[[str, int], Sequence[str]]
"""Returns the IP addresses of a host and port, the best one first. It blocks, and raises OSError if there is none."""


class _Refused(Exception):
    """The reason why an image was not fetched. It is logged but not sent to the client."""


class _Held:
    """The bytes that are fetched for one request. They count as if the client had sent them in the body."""

    def __init__(self, settings: Settings, buffer: Buffer) -> None:
        self._settings, self._buffer = settings, buffer
        self._client = current_sender.get().client
        self._size = 0

    def count(self, size: int) -> None:
        if self._size + size > self._settings.max_body_bytes:
            raise PayloadTooLarge(
                f"the images of all URLs in the request have more than {self._settings.max_body_bytes} bytes"
            )
        self._buffer.take(self._client, size, self._size)
        self._size += size

    def release(self) -> None:
        self._buffer.add(self._client, -self._size)
        self._size = 0


def resolve(host: str, port: int) -> list[str]:
    """Return the IP addresses of a host, the best one first. The final dot prevents the system from trying the name
    with the local domains.

    Raises:
        OSError: the name has no address.
    """
    found = socket.getaddrinfo(f"{host}.".encode("ascii"), port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


class WebImages:
    """Fetches images from the hosts that the setting `image_urls` allows."""

    def __init__(
        self,
        settings: Settings,
        buffer: Buffer,
        *,
        on_result: Callable[[str], object] = lambda result: None,
        resolve: Resolve = resolve,
        transport: Callable[[], httpx.AsyncBaseTransport] | None = None,
    ) -> None:
        """Make an object that fetches images.

        Args:
            buffer: the fetched bytes count in it until the task of the request ends.
            on_result: is called with "fetched" or "failed" for each URL that was requested.
            resolve, transport: replace the resolver, and the connections below the guard, in tests.
        """
        self._settings, self._buffer, self._on_result = settings, buffer, on_result
        self._hosts = parse_hosts(settings.image_urls) if settings.image_urls else None
        self._resolve = resolve
        self._resolvers = ThreadPoolExecutor(_RESOLVER_THREADS, thread_name_prefix="image-urls")
        self._slots = asyncio.Semaphore(_IN_PROCESS)
        self._slots_of_address: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        if transport is None and self._hosts is not None:
            transport = partial(
                httpx.AsyncHTTPTransport,
                verify=httpx.create_ssl_context(trust_env=False),  # made once, because this takes 20 ms
                trust_env=False,
                limits=httpx.Limits(max_connections=1, max_keepalive_connections=0),
            )
        self._transport = transport

    async def close(self) -> None:
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def fetch_all(self, urls: Iterable[str]) -> dict[str, Outcome[bytes]]:
        """Fetch the images of a request, several at the same time. The task that calls this must be that of the
        request. Return the bytes or the error of each URL. URLs that cannot be fetched within half of the request's
        deadline have errors, so that the other images can be answered."""
        unique = dict.fromkeys(urls)
        if not unique:
            return {}
        held, task = _Held(self._settings, self._buffer), asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: held.release())
        until = asyncio.get_running_loop().time() + self._settings.request_deadline_s / 2
        at_once = asyncio.Semaphore(_PER_REQUEST)

        async def outcome(url: str) -> Outcome[bytes]:
            async with at_once:
                return await attempt_await(0, self._fetch(url, held, until))

        async with asyncio.TaskGroup() as group:
            tasks = {url: group.create_task(outcome(url)) for url in unique}
        return {url: task.result() for url, task in tasks.items()}

    async def _fetch(self, text: str, held: _Held, until: float) -> bytes:
        """Fetch one image.

        Raises:
            InvalidRequest: image URLs are off, the URL is invalid, or its host is not in the list.
            ImageUrlFailed: the image could not be fetched.
            ImageTooLarge, PayloadTooLarge: the image, or all images of the request together, are too large.
            QueueFull, Unavailable, ShareUsed: too many images are being fetched, or they use too much memory.
        """
        url = self._parsed(text)
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout_at(min(until, started + FETCH_S)):
                image = await self._follow(url, held)
            self._on_result("fetched")
            return image
        except ServiceError:
            self._on_result("failed")
            raise
        except _Refused as refused:
            reason = str(refused)
        except TimeoutError:
            reason = f"not fetched after {loop.time() - started:.1f} s"
        except (httpx.HTTPError, OSError) as error:
            reason = f"{type(error).__name__}: {error}"
        self._on_result("failed")
        log.warning("image URL not fetched", extra={"fields": {"host": url.origin, "reason": reason}})
        await asyncio.sleep((started - loop.time()) % _STEP_S)
        raise ImageUrlFailed(_FAILED)

    def _parsed(self, text: str) -> ImageUrl:
        if self._hosts is None:
            raise InvalidRequest(
                "the service does not fetch links, because its setting image_urls is not set: send the image as a data "
                "URL (data:image/jpeg;base64,...) or as base64, or ask the operator to allow hosts with "
                "DINOV2_IMAGE_URLS"
            )
        try:
            url = parse_image_url(text)
        except ValueError as error:
            raise InvalidRequest(f"the image URL is not accepted: {error}") from error
        if not self._hosts.allows(url):
            raise InvalidRequest(
                f"the image URL is not accepted: {url.origin} is not among the hosts of the setting image_urls"
            )
        return url

    async def _follow(self, url: ImageUrl, held: _Held) -> bytes:
        """Request a URL and those to which it redirects, and return the image."""
        for _ in range(1 + MAX_REDIRECTS):
            async with self._response(url) as response:
                if response.status_code not in _REDIRECTS:
                    return await self._image(response, held)
                url = self._redirected(url, response.headers.get_list("location"))
        raise _Refused(f"more than {MAX_REDIRECTS} redirects")

    def _redirected(self, url: ImageUrl, locations: list[str]) -> ImageUrl:
        """Return the URL to which a response redirects."""
        if len(locations) != 1:
            raise _Refused(f"a redirect with {len(locations)} locations")
        try:
            target = parse_image_url(urljoin(str(url), locations[0]))
        except ValueError as error:
            raise _Refused(f"a redirect to a URL that is not accepted: {error}") from error
        assert self._hosts is not None
        if not self._hosts.allows(target):
            raise _Refused(f"a redirect to {target.origin}, which is not in the list of hosts")
        return target

    @asynccontextmanager
    async def _response(self, url: ImageUrl) -> AsyncIterator[httpx.Response]:
        """Connect to the server of a URL, after checking its addresses, and yield its response without the body."""
        addresses = await self._public_addresses(url)
        assert self._transport is not None
        async with self._slot(addresses[0]), self._transport() as transport:
            response = await _first_response(transport, [_request(url, address) for address in addresses])
            try:
                yield response
            finally:
                await response.aclose()

    async def _public_addresses(self, url: ImageUrl) -> list[str]:
        """Resolve the host of a URL once, and return the addresses to try: the best one of each kind, IPv4 and IPv6.

        Raises:
            _Refused: an address is not public, or there is none.
        """
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._resolvers, self._resolve, url.host, url.port)
        except OSError as error:
            raise _Refused(f"{url.host} cannot be resolved: {error}") from error
        reasons = [reason for address in found if (reason := why_not_public(address)) is not None]
        if reasons or not found:
            raise _Refused(f"{url.host} is not public: {', '.join(reasons) or 'it has no address'}")
        best = {":" in address: address for address in reversed(found)}
        return sorted(best.values(), key=found.index)

    @asynccontextmanager
    async def _slot(self, address: str) -> AsyncIterator[None]:
        """Wait until there is room for a connection to an address, and occupy it."""
        of_address = self._slots_of_address.setdefault(address, asyncio.Semaphore(_PER_ADDRESS))
        waiting = asyncio.timeout(_WAIT_S)
        try:
            async with waiting, of_address, self._slots:
                waiting.reschedule(None)
                yield
        except TimeoutError:
            if not waiting.expired():
                raise
            raise QueueFull("too many images are being fetched from URLs", retry_after_s=1) from None

    async def _image(self, response: httpx.Response, held: _Held) -> bytes:
        """Read the image in a response. If the first bytes are not those of an image, the rest is not read.

        Raises:
            _Refused: the response is not an uncompressed image with status 200.
            ImageTooLarge: the image has more than `max_image_bytes` bytes.
        """
        if response.status_code != 200:
            raise _Refused(f"status {response.status_code}")
        encoding = response.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise _Refused(f"content encoding {encoding[:80]!r}")
        limit, declared = self._settings.max_image_bytes, int(response.headers.get("content-length", 0))
        chunks: list[bytes] = []
        size, head = 0, b""
        async for chunk in response.aiter_raw():
            held.count(len(chunk))
            chunks.append(chunk)
            size += len(chunk)
            if len(head) < HEAD_BYTES:
                head += chunk[:HEAD_BYTES]
            if len(head) >= HEAD_BYTES:
                _check(head, max(size, declared), limit)
        _check(head, size, limit)
        return b"".join(chunks)


def _check(head: bytes, size: int, limit: int) -> None:
    """Check the first bytes and the size of a response. A response that is not an image has the same error with any
    size."""
    if sniff(head) is None:
        raise _Refused(f"not a known image; it starts with {head[:8].hex(' ')}")
    if size > limit:
        raise ImageTooLarge(f"the image has more than {limit} bytes")


def _request(url: ImageUrl, address: str) -> httpx.Request:
    """Make a request that connects to `address`, with the host of `url` for TLS and in the header Host."""
    host = f"[{address}]" if ":" in address else address
    return httpx.Request(
        "GET",
        f"https://{host}:{url.port}{url.target}",
        headers={"Host": url.origin, **_HEADERS},
        extensions={
            "sni_hostname": url.host,
            "timeout": {"connect": _STALL_S, "read": _STALL_S, "write": _STALL_S, "pool": _STALL_S},
        },
    )


async def _first_response(transport: httpx.AsyncBaseTransport, requests: Sequence[httpx.Request]) -> httpx.Response:
    """Send the requests one after the other until a server can be reached, and return its response."""
    for request in requests[:-1]:
        with suppress(httpx.ConnectError, httpx.ConnectTimeout):
            return await transport.handle_async_request(request)
    return await transport.handle_async_request(requests[-1])

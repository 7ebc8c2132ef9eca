"""Servers on the loopback address that stand in for the internet, for tests of image URLs.

`open_network` starts two servers. The image server answers over TLS and stands in for the addresses in `PUBLIC`. The
trap stands in for every other address and port. It counts connections, and there must never be one. Below the guard of
`service.web_images`, each connection is directed to one of the two.
"""

import asyncio
import ssl
import tempfile
from base64 import encodebytes
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx

from service.settings import Settings
from service.web_images import WebImages
from tests.fakes import photo

PUBLIC = ("93.184.216.34", "93.184.216.35", "2606:2800:220:1:248:1893:25c8:1946")
"""Public addresses, for which the image server stands in."""
IMAGE = photo(5)
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIByjCCAXCgAwIBAgIBATAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxkaW5vdjIg
dGVzdHMwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBcxFTATBgNV
BAMMDGRpbm92MiB0ZXN0czBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABPMn9nQ4
jy7iCQB/sZWXEyfHchd+LO6y9RR7LQx6fYcHZ3YcVB9HMtw631exc10MQL9lV/bJ
uBZ76WrL2wd9jQ+jgaowgacwHQYDVR0OBBYEFDEkzj659mQSKBCbBRyJFMWp4HGi
MB8GA1UdIwQYMBaAFDEkzj659mQSKBCbBRyJFMWp4HGiMA8GA1UdEwEB/wQFMAMB
Af8wDgYDVR0PAQH/BAQDAgKEMEQGA1UdEQQ9MDuCEmltYWdlcy5leGFtcGxlLmNv
bYIUKi5pbWFnZXMuZXhhbXBsZS5jb22CD2Nkbi5leGFtcGxlLm9yZzAKBggqhkjO
PQQDAgNIADBFAiEAiEyk66BeMwwMV4kq2PCMfmZnjdtbY2usgcVM3vVI9hYCIGBt
5oVFvw91BWu4shSxfOLuwi3yvLkTKWbP2f9B9+6h
-----END CERTIFICATE-----
"""
"""A certificate for images.example.com, *.images.example.com and cdn.example.org, valid from 2020 to 2120 and made with
`openssl ca -selfsign`. Its key is the number in `_key`."""

Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


@cache
def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "server.pem")
        file.write_text(_key() + CERTIFICATE)
        context.load_cert_chain(file)
    return context


@cache
def _trusting_context() -> ssl.SSLContext:
    return ssl.create_default_context(cadata=CERTIFICATE)


def _key() -> str:
    """Return the certificate's key on the curve P-256 as PEM. The key is not secret."""
    number = b"a key for tests, known to anyone"
    der = bytes.fromhex("30310201010420") + number + bytes.fromhex("a00a06082a8648ce3d030107")
    kind = "EC PRIVATE KEY"
    return f"-----BEGIN {kind}-----\n{encodebytes(der).decode()}-----END {kind}-----\n"


def answer(body: bytes = IMAGE, status: str = "200 OK", **headers: str) -> bytes:
    """Return an HTTP response. In the names of headers, `_` stands for `-`."""
    fields = {"content_length": str(len(body))} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1") + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return answer(b"", status, location=location)


@dataclass
class Network:
    """The two servers, and the names that the resolver knows.

    names: the addresses of each name. A list of lists contains the addresses for one call after the other.
    answers: the response to each path. The path /to/URL redirects to the percent-encoded URL, and any other path has an
        image.
    heads: the requests that the image server received.
    trapped: the number of connections to the trap.
    dialled: the addresses and ports below the guard, before they were directed to a server.
    """

    names: dict[str, Sequence[Any]] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    trapped: int = 0
    dialled: list[tuple[str, int]] = field(default_factory=list)
    unreachable: set[str] = field(default_factory=set)
    resolved: list[str] = field(default_factory=list)
    ports: Mapping[bool, int] = field(default_factory=dict)  # of the image server (True) and the trap (False)

    def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        addresses = self.names.get(host)
        if not addresses:
            raise OSError(f"no address for {host}")
        if isinstance(addresses[0], str):
            return list(addresses)
        calls = self.resolved.count(host)
        return list(addresses[min(calls, len(addresses)) - 1])

    def web(self, settings: Settings, buffered: Any, **options: Any) -> WebImages:
        """Return an object that fetches images from this network."""
        return WebImages(settings, buffered, resolve=self.resolve, transport=partial(_Redirected, self), **options)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request of the image server."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.heads.append(head)
            path = head.split(" ")[1]
            default = redirect(unquote(path.removeprefix("/to/"))) if path.startswith("/to/") else answer()
            chosen = self.answers.get(path, default)
            if isinstance(chosen, bytes):
                writer.write(chosen)
            else:
                await chosen(writer)
            await writer.drain()
        writer.close()

    async def trap(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.trapped += 1
        writer.close()


class _Redirected(httpx.AsyncBaseTransport):
    """A transport that connects to one of the two servers instead of the address in the request."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._inner = httpx.AsyncHTTPTransport(verify=_trusting_context(), trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        address, port = request.url.host, request.url.port or 443
        self._network.dialled.append((address, port))
        if address in self._network.unreachable:
            raise httpx.ConnectError("unreachable")
        is_public = address in PUBLIC and port == 443
        request.url = request.url.copy_with(host="127.0.0.1", port=self._network.ports[is_public])
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


@asynccontextmanager
async def open_network(**names: Sequence[Any]) -> AsyncIterator[Network]:
    """Start both servers. `names` are added to the names of the resolver, with `_` for `.`."""
    network = Network({name.replace("_", "."): addresses for name, addresses in names.items()})
    network.names |= {"images.example.com": PUBLIC[:1], "cdn.example.org": PUBLIC[1:2]}
    images = await asyncio.start_server(network.serve, "127.0.0.1", 0, ssl=_server_context())
    trap = await asyncio.start_server(network.trap, "127.0.0.1", 0)
    network.ports = {True: images.sockets[0].getsockname()[1], False: trap.sockets[0].getsockname()[1]}
    async with images, trap:
        yield network

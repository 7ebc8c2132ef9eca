"""Cross-origin resource sharing (CORS): let web pages of other origins call the service.

A page may read the answer to a request to another origin only if a header of the answer allows the page's origin.
Before most such requests, the browser asks for permission with a *preflight*, which is an OPTIONS request. The service
has no cookies, so it never allows credentials.
"""

import re
from collections.abc import Mapping
from typing import Final

Headers = list[tuple[bytes, bytes]]

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""The methods that change nothing."""
METHODS: Final = b"GET, HEAD, POST, PUT, PATCH, DELETE"
EXPOSED: Final = (
    b"X-Request-ID, Retry-After, RateLimit, RateLimit-Policy, Server-Timing, Allow, Accept-Encoding, Accept-Ranges, "
    b"Content-Disposition, Content-Encoding, Content-Range, ETag, Location, WWW-Authenticate, X-Depth-Min, "
    b"X-Depth-Max, X-Depth-Units-Per-Metre, X-Log-Bytes, X-Log-Position"
)
"""The headers of an answer that a page may read, in addition to those that browsers always show to pages."""
MAX_AGE_S: Final = 600
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


def parse_origins(text: str) -> frozenset[str]:
    """Return the origins in a comma-separated list. The list may also be `*`, which allows all origins.

    Raises:
        ValueError: an entry is not an origin.
    """
    origins = frozenset(origin.strip().lower() for origin in text.split(",") if origin.strip())
    for origin in sorted(origins):
        if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"{origin[:200]!r} is not an origin: write scheme://host or scheme://host:port, or * for all"
            )
    return origins


class Cors:
    """Makes the CORS headers for answers, given a set of allowed origins."""

    def __init__(self, origins: frozenset[str]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)
        self._any = "*" in origins

    def allows(self, origin: bytes) -> bool:
        """Return whether pages of this origin may call the service."""
        return self._any or origin.lower() in self._origins

    def headers(self, request: Mapping[bytes, bytes]) -> Headers:
        """Return the CORS headers for the answer to a request. `request` contains the headers of the request."""
        if self._any:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", EXPOSED)]
        origin = request.get(b"origin", b"").lower()
        vary = (b"vary", b"Origin")  # also without an allowed origin, because a cache must not reuse that answer
        if origin not in self._origins:
            return [vary]
        return [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", EXPOSED), vary]

    def preflight(self, request: Mapping[bytes, bytes]) -> Headers | None:
        """Return the headers for the answer to a preflight, in addition to those that the method `headers` returns.
        `request` contains the headers of an OPTIONS request. Return None if this request is not a preflight, or if its
        origin is not allowed."""
        origin = request.get(b"origin")
        if origin is None or b"access-control-request-method" not in request:
            return None
        if not self.allows(origin):
            return None
        headers = [
            (b"access-control-allow-methods", METHODS),
            (b"access-control-max-age", str(MAX_AGE_S).encode()),
            (b"vary", b"Access-Control-Request-Headers"),
        ]
        wanted = request.get(b"access-control-request-headers")
        return headers if wanted is None else [(b"access-control-allow-headers", wanted), *headers]


def is_foreign(request: Mapping[bytes, bytes], cors: Cors | None) -> bool:
    """Return whether a web page of another origin sent a request, and `cors` does not allow this origin. `request`
    contains the headers of the request.

    Browsers set `Sec-Fetch-Site` and `Origin` themselves, and pages cannot change them. Browsers older than 2023 do not
    send `Sec-Fetch-Site`, and no browser sends it over plain HTTP except to this machine. Then the host in `Origin` is
    compared with `Host`. Other clients send neither header.
    """
    origin, site = request.get(b"origin"), request.get(b"sec-fetch-site")
    if site is None and origin is None:
        return False
    if origin is not None and cors is not None and cors.allows(origin):
        return False
    if site is not None:
        return site not in (b"same-origin", b"none")
    host = request.get(b"host", b"").lower()
    return not host or (origin or b"").lower().partition(b"://")[2] != host

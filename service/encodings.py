"""Content encodings: decode the compressed bodies of requests, and compress answers.

One megabyte of gzip can decode to a gigabyte. So a body is decoded in pieces of limited size, and the caller can stop
as soon as the decoded body exceeds a limit.
"""

import zlib
from typing import Final

from service.errors import BadRequest, UnsupportedMediaType

ACCEPTED: Final = "gzip, deflate"
"""The encodings that a request body may have, as the value of an `Accept-Encoding` header."""
PIECE_BYTES: Final = 2**18
MAX_MEMBERS: Final = 100
"""The highest number of gzip members in one body. Each member costs time, even if it is empty."""
_LEVEL: Final = 1  # higher levels take several times as long and make numbers only a few percent smaller
_GZIP: Final = 16 + zlib.MAX_WBITS
_ZLIB: Final = zlib.MAX_WBITS
_RAW: Final = -zlib.MAX_WBITS


class BodyDecoder:
    """Decodes a body while it arrives.

    After each call of `feed`, call `decode` until it returns no bytes. When the body is complete, call `finish`.
    """

    def __init__(self, name: str) -> None:
        """Create a decoder for the encoding `name`: `gzip` or `deflate`."""
        self._name = name
        self._received = b""  # not decoded yet
        self._stream: zlib._Decompress | None = None
        self._more = False  # the stream may return more without further input
        self._members = 0

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._received += data

    def decode(self) -> bytes:
        """Return the next decoded bytes, at most `PIECE_BYTES` of them. Return no bytes if further input is needed.

        Raises:
            BadRequest: the received bytes are not valid data in this encoding.
        """
        while self._received or self._more:
            if self._stream is None or self._stream.eof:
                self._stream = self._next_stream()
            try:
                piece = self._stream.decompress(self._received, PIECE_BYTES)
            except zlib.error as error:
                raise BadRequest(f"the body is not valid {self._name}: {error}") from error
            self._received = self._stream.unused_data or self._stream.unconsumed_tail
            self._more = len(piece) == PIECE_BYTES and not self._stream.eof
            if piece:
                return piece
        return b""

    def finish(self) -> None:
        """Check that the body is complete.

        Raises:
            BadRequest: the end of the compressed data is missing.
        """
        if self._stream is not None and not self._stream.eof:
            raise BadRequest(f"the {self._name} body ends too early")

    def _next_stream(self) -> "zlib._Decompress":
        if self._stream is not None and self._name != "gzip":
            raise BadRequest(f"the body continues after the end of its {self._name} data")
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise BadRequest(f"the gzip body has more than {MAX_MEMBERS} members")
        if self._name == "gzip":
            return zlib.decompressobj(_GZIP)
        # RFC 9110 requires zlib's header, but some clients omit it. In hex, its first byte ends in 8. No encoder
        # begins data without the header with such a byte.
        return zlib.decompressobj(_ZLIB if self._received[0] & 0x0F == 8 else _RAW)


def body_decoder(encoding: str) -> BodyDecoder | None:
    """Return a decoder for a request body with this `Content-Encoding`. Return None for the encoding `identity`, which
    means that the body is not compressed.

    Raises:
        UnsupportedMediaType: the encoding is not supported. The answer lists the supported encodings in the header
            `Accept-Encoding`.
    """
    name = encoding.strip().lower().removeprefix("x-")
    if name in ("", "identity"):
        return None
    if name in ("gzip", "deflate"):
        return BodyDecoder(name)
    raise UnsupportedMediaType(
        f"content encoding {encoding[:80]!r} is not accepted: send gzip, deflate, or the body without an encoding",
        headers={"Accept-Encoding": ACCEPTED},
    )


def accepts_gzip(accept_encoding: bytes) -> bool:
    """Return whether an `Accept-Encoding` header allows gzip."""
    others = False
    for part in accept_encoding.lower().split(b","):
        name, _, parameters = part.partition(b";")
        if name.strip() in (b"gzip", b"x-gzip"):
            return _is_wanted(parameters)
        if name.strip() == b"*":
            others = _is_wanted(parameters)
    return others


def _is_wanted(parameters: bytes) -> bool:
    """Return whether an encoding with these parameters may be used. The weight 0 (`q=0`) forbids it."""
    weight = parameters.replace(b" ", b"").removeprefix(b"q=")
    return not weight or weight.strip(b"0.") != b""


def gzipped(body: bytes) -> bytes:
    """Compress the body of an answer with gzip."""
    return zlib.compress(body, _LEVEL, _GZIP)

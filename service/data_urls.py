"""Decode images that are sent in JSON: as data URLs, as plain base64, as links, or in the objects that clients of other
services send.

A text that is a sentence, not valid base64 or a link that cannot be fetched causes an error only for its own image.
With `on_error=partial`, the other images are still processed.
"""

import binascii
import re
import reprlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

from model.decode import sniff
from service.errors import BrokenImage, ImageTooLarge, InvalidRequest
from service.off_loop import off_loop
from service.outcomes import Outcome, attempt, successes
from service.settings import Settings
from service.web_images import WebImages

Fetched = Mapping[str, Outcome[bytes]]
"""The bytes or the error of each link in a request."""

_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(;[^,]*)?,", re.ASCII | re.IGNORECASE)
_LINK = re.compile(r"[a-z][a-z0-9+.-]{1,15}://", re.ASCII | re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]*", re.ASCII)
_SPACE = re.compile(r"\S[ \t]+\S")  # base64 may contain line breaks, but no spaces within a line
_WORD = re.compile(r"[A-Z]?[a-z_-]{2,62}", re.ASCII)  # base64 of an image mixes upper and lower case
_SHORTEST: Final = 64
"""A text with fewer characters may be a word. The smallest PNG has 67 bytes, which are 92 characters as base64."""
IMAGE_FIELDS: Final = ("image", "image_url", "image_base64", "source", "base64", "data", "bytes", "url")
"""The fields that contain the image in an object. OpenAI, LiteLLM and vLLM use `image_url`; Jina `image`, `bytes` and
`url`; Voyage and Cohere `image_base64` and `image_url` in `content`; and LangChain `source`, `data` and `base64`."""
_MAX_NESTED: Final = 4
_START: Final = 100  # enough characters to recognise a link
_FORMS: Final = (
    'send a data URL (data:image/jpeg;base64,...), plain base64, or an object such as {"type": "image_url", '
    '"image_url": {"url": "data:image/jpeg;base64,..."}}'
)


async def decode_texts(texts: list[Any], settings: Settings, web: WebImages) -> list[Outcome[bytes]]:
    """Decode images from a JSON body, and fetch those that are links. Return one outcome for each image, in order: its
    bytes or an error."""
    found = [attempt(i, image_text, text) for i, text in enumerate(texts)]
    fetched = await web.fetch_all(_links(found))

    def work() -> list[Outcome[bytes]]:
        return [text.then(_decoded, settings.max_image_bytes, fetched) for text in found]

    return await off_loop(sum(map(len, successes(found))), work)


async def fetch_links(values: Iterable[Any], web: WebImages) -> Fetched:
    """Fetch the images that are links. `values` are images of a JSON body. Invalid ones are ignored."""
    return await web.fetch_all(_links(attempt(i, image_text, value) for i, value in enumerate(values)))


def _links(texts: Iterable[Outcome[str]]) -> list[str]:
    return [link for text in successes(texts) if (link := _link_in(text)) is not None]


def _link_in(text: str) -> str | None:
    """Return a text without surrounding spaces if it is a link, and None otherwise."""
    return text.strip() if _LINK.match(text[:_START].lstrip()) else None


def link_of(value: Any) -> str | None:
    """Return the link to the image `value` of a JSON body, or None if the image is not sent as a link.

    Raises:
        InvalidRequest: `value` contains no image.
    """
    return _link_in(image_text(value))


def image_from_text(value: Any, max_bytes: int, fetched: Fetched) -> bytes:
    """Decode one image from a JSON body and return the bytes. `value` is a data URL, plain base64, a link or an object
    that contains one of them. Line breaks, the URL-safe characters `-` and `_`, and missing padding are accepted.
    `fetched` contains the outcome of each link (see `fetch_links`).

    Raises:
        InvalidRequest: `value` contains no image, or a data URL without base64.
        ImageTooLarge: the image has more than `max_bytes` bytes.
        BrokenImage: the text is not valid base64.
        ServiceError: the error of the link.
    """
    return _decoded(image_text(value), max_bytes, fetched)


def image_text(value: Any, nested: int = 0) -> str:
    """Return the text that contains an image: `value` itself, or a field of the object `value`.
    `nested` is the number of objects that contain `value`.

    Raises:
        InvalidRequest: there is no such text, or there are several.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        if nested == _MAX_NESTED:
            raise InvalidRequest(f"an image is nested more than {_MAX_NESTED} levels deep in objects: {_FORMS}")
        return _text_in(value, nested)
    if isinstance(value, int | list) and not isinstance(value, bool):
        raise InvalidRequest(
            f"{_quoted(value)} is not an image. Numbers may be the token ids of a text, but this service embeds "
            f"images, not text: {_FORMS}"
        )
    raise InvalidRequest(f"an image must be text or an object, not {type(value).__name__}: {_FORMS}")


def _text_in(fields: dict[str, Any], nested: int) -> str:
    content = fields.get("content")
    if isinstance(content, list):
        if len(content) != 1:
            raise InvalidRequest(f"content has {len(content)} parts: send each image in an object of its own")
        return image_text(content[0], nested + 1)
    if fields.get("text") is not None:
        raise _no_text(fields["text"])
    present = [name for name in IMAGE_FIELDS if fields.get(name) is not None]
    if len(present) != 1:
        raise InvalidRequest(
            f"an image object must have exactly one of {', '.join(IMAGE_FIELDS)}, not "
            f"{' and '.join(present) or reprlib.repr(list(fields))}"
        )
    return image_text(fields[present[0]], nested + 1)


def _decoded(text: str, max_bytes: int, fetched: Fetched) -> bytes:
    """Decode a data URL or plain base64, or take the bytes of a link, and return the bytes. `image_from_text` lists the
    errors."""
    if (link := _link_in(text)) is not None:
        return fetched[link].result()
    start = 0
    if text[:1].isspace():
        text = text.lstrip()
    if text[:5].lower() == "data:":
        match = _DATA_URL.match(text)
        if match is None or not (match[2] or "").lower().endswith(";base64"):
            raise InvalidRequest("a data URL must look like data:image/jpeg;base64,...")
        start = match.end()
    if (len(text) - start) // 4 * 3 > max_bytes + 2:
        raise ImageTooLarge(f"the image has about {(len(text) - start) // 4 * 3} bytes; the limit is {max_bytes}")
    payload = text[start:] if start else text
    if start or len(text) >= _SHORTEST:
        with suppress(binascii.Error, ValueError):
            return binascii.a2b_base64(payload, strict_mode=True)
    if not start and _is_prose(text):
        raise _no_text(text)
    return _lenient(payload)


def _lenient(payload: str) -> bytes:
    """Decode base64 that may contain line breaks and URL-safe characters, and may lack padding."""
    try:
        plain = "".join(payload.split()).replace("-", "+").replace("_", "/").rstrip("=")
        return binascii.a2b_base64(plain + "=" * (-len(plain) % 4), strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise BrokenImage(f"not base64: {error}") from error


def _is_prose(text: str) -> bool:
    """Return whether a text that is not a data URL looks like words or a file name rather than base64. The result is
    False if the decoded text begins with the signature of an image format."""
    with suppress(BrokenImage):
        if sniff(_lenient("".join(text[:128].split())[:64])) is not None:
            return False
    start = text[:1024]
    if _BASE64.fullmatch(start) is None:
        return any(map(str.isalpha, start))
    return (_SPACE.search(start) or _WORD.fullmatch(text)) is not None


def _quoted(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:
        return "a number with thousands of digits"


def _no_text(text: Any) -> InvalidRequest:
    return InvalidRequest(f"{_quoted(text)} is not an image. This service embeds images, not text: {_FORMS}")


def check_count(count: int, settings: Settings, param: str) -> None:
    """Raise InvalidRequest if `count`, the number of images in a request, is 0 or exceeds the limit in `settings`. The
    error names the field `param` as the wrong field."""
    limit = settings.items_per_request
    if not 1 <= count <= limit:
        raise InvalidRequest(f"{count} images in {param}: a request can have 1 to {limit}", param=param)

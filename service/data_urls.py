"""Decode images that are sent in JSON as data URLs or as plain base64.

A text that is a link or is not valid base64 causes an error only for its own image. With `on_error=partial`, the other
images are still processed.
"""

import binascii
import re
from typing import Any

from service.errors import BrokenImage, ImageTooLarge, InvalidRequest
from service.off_loop import off_loop
from service.outcomes import Outcome, attempt
from service.settings import Settings

_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(;[^,]*)?,", re.ASCII | re.IGNORECASE)


async def decode_texts(texts: list[Any], settings: Settings) -> list[Outcome[bytes]]:
    """Decode data URLs or base64 texts. Return one outcome for each text, in order: the decoded bytes or an error."""

    def work() -> list[Outcome[bytes]]:
        return [attempt(i, image_from_text, text, settings.max_image_bytes) for i, text in enumerate(texts)]

    return await off_loop(sum(len(text) for text in texts if isinstance(text, str)), work)


def image_from_text(text: Any, max_bytes: int) -> bytes:
    """Decode one data URL or plain base64 text and return the bytes. Line breaks, the URL-safe characters `-` and `_`,
    and missing padding are accepted.

    Raises:
        InvalidRequest: `text` is not a string, is a link, or is a data URL without base64.
        ImageTooLarge: the image has more than `max_bytes` bytes.
        BrokenImage: the text is not valid base64.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"an image must be a string (data URL or base64), not {type(text).__name__}")
    if text[:8].lower().startswith(("http://", "https://")):
        raise InvalidRequest("the service does not fetch links: send the image as a data URL or base64")
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
    try:
        try:
            return binascii.a2b_base64(payload, strict_mode=True)
        except binascii.Error:
            plain = "".join(payload.split()).replace("-", "+").replace("_", "/").rstrip("=")
            return binascii.a2b_base64(plain + "=" * (-len(plain) % 4), strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise BrokenImage(f"not base64: {error}") from error


def check_count(count: int, settings: Settings, param: str) -> None:
    """Raise InvalidRequest if `count`, the number of images in a request, is 0 or exceeds the limit in `settings`. The
    error names the field `param` as the wrong field."""
    limit = settings.items_per_request
    if not 1 <= count <= limit:
        raise InvalidRequest(f"{count} images in {param}: a request can have 1 to {limit}", param=param)

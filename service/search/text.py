"""Decides which characters ids, sources and metadata keys may contain, and finds the range of texts that have a
prefix.

People copy ids from file names, and file names contain all kinds of characters: macOS writes U+202F (a narrow no-break
space) into the names of screenshots, Persian and Hindi need U+200C and U+200D, and Japanese uses U+3000 as a space.
Python's `str.isprintable` refuses all of these. Only control characters, which break logs and headers, and lone
surrogates, which are not valid Unicode, are refused here.

Texts are compared by code point and never normalised. So `é` as one character (NFC) and as `e` with a combining accent
(NFD) are different texts.
"""

import re
import sys
from typing import Final

_REFUSED: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
ALLOWED: Final = "no control characters or lone surrogates"


def is_allowed(text: str) -> bool:
    """Return whether the text contains neither control characters nor lone surrogates."""
    return _REFUSED.search(text) is None


def texts_with_prefix(prefix: str) -> list[tuple[str, str]]:
    """Return comparisons, as pairs of an operator and a text, that together are true for exactly those texts that begin
    with `prefix`. Texts are compared by code point, as SQLite and Milvus do."""
    comparisons = [(">=", prefix)]
    stem = prefix.rstrip(chr(sys.maxunicode))
    if stem:
        following = ord(stem[-1]) + 1
        following = 0xE000 if 0xD800 <= following < 0xE000 else following  # surrogates are not characters
        comparisons.append(("<", stem[:-1] + chr(following)))
    return comparisons

"""CLIP's tokenizer: byte-level byte pair encoding of lower-case text (openai/CLIP, `clip/simple_tokenizer.py`).

A text is cleaned and divided into words: runs of letters, single digits, runs of other characters, and English endings
such as 's. Each byte of a word is one symbol at first, and the last symbol is marked as the end of the word. The
vocabulary file lists pairs of symbols. As long as a word contains neighbouring symbols that are in the list, the pair
that comes first in the list is joined. The remaining symbols are the tokens.

CLIP cleans text with the package ftfy. `clean` does the same, except that it does not repair text that was decoded with
the wrong character encoding.
"""

import gzip
import html
import re
import unicodedata
import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Final

Pair = tuple[str, str]

KNOWN_VOCABULARY_SHA256: Final = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
"""The hash of `bpe_simple_vocab_16e6.txt.gz` in the package open-clip-torch 3.3.0."""

MAX_VOCABULARY_BYTES: Final = 16 << 20  # after decompression; CLIP's file then has 3 MB
START, END = "<|startoftext|>", "<|endoftext|>"
_SYMBOLS: Final = 2 * 256  # each byte, within a word and at its end
_SPECIAL: Final = 2  # START and END

_SINGLE_QUOTES, _DOUBLE_QUOTES = "\u02bc\u2018\u2019\u201a\u201b", "\u201c\u201d\u201e\u201f"
_TERMINAL_CODE: Final = re.compile("\033\\[[0-9;]*[a-zA-Z]")
_ENDINGS: Final = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_LIGATURES: Final = (
    *(0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4)),
    *range(0xFB00, 0xFB07),
)


class VocabularyError(ValueError):
    """The error raised when a vocabulary file cannot be used. The message gives the reason."""


def read_merges(path: Path, count: int) -> list[Pair]:
    """Return the first `count` pairs of a vocabulary file, which may be compressed with gzip.

    Each line contains a pair, except for the first line, which is a comment.

    Raises:
        VocabularyError: the file is damaged, too large, or contains fewer than `count` pairs.
        OSError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if compressed else path.open("rb") as file:
            content = file.read(MAX_VOCABULARY_BYTES + 1)
        if len(content) > MAX_VOCABULARY_BYTES:
            raise VocabularyError(f"{path}: more than {MAX_VOCABULARY_BYTES >> 20} MiB, so not CLIP's vocabulary")
        lines = content.decode("utf-8").split("\n")[1 : count + 1]
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise VocabularyError(f"{path}: not a vocabulary of CLIP: {error}") from error
    pairs = [(first, second) for first, _, second in (line.rstrip("\r").partition(" ") for line in lines)]
    for number, (first, second) in enumerate(pairs, start=2):
        if not first or not second or " " in second:
            raise VocabularyError(f"{path}: line {number} is {lines[number - 2][:40]!r}, not two symbols")
    if len(pairs) < count:
        raise VocabularyError(f"{path}: has {len(pairs)} pairs, but the text encoder needs {count}")
    return pairs


class Tokenizer:
    """A tokenizer with a vocabulary of `vocab_size` tokens, read from CLIP's vocabulary file.

    Raises:
        VocabularyError, OSError: see `read_merges`.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        merges = read_merges(path, max(0, vocab_size - _SYMBOLS - _SPECIAL))
        symbols = [_byte_symbols()[byte] for byte in _byte_order()]
        names = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges), START, END]
        self._ids = {name: index for index, name in enumerate(names)}  # if a name occurs twice, its last index counts
        self._ranks = {pair: index for index, pair in enumerate(merges)}
        self.start, self.end = self._ids[START], self._ids[END]
        self._tokens_of = lru_cache(maxsize=10_000)(self._word_tokens)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without the start and the end token."""
        return [token for word in split_words(clean(text)) for token in self._tokens_of(word)]

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of a text with the start and the end token.

        The number of tokens is not limited. CLIP cuts a long prompt, but the service refuses it.

        If the text contains the end token's name, the prompt ends there, because the encoder returns the features of
        the first end token.
        """
        tokens = [self.start, *self.encode(text), self.end]
        return tokens[: tokens.index(self.end) + 1]

    def _word_tokens(self, word: str) -> tuple[int, ...]:
        if word in (START, END):
            return (self._ids[word],)
        symbols = [_byte_symbols()[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: self._ranks.get(pair, len(self._ids)))
            if best not in self._ranks:
                break
            symbols = _joined(symbols, best)
        return tuple(self._ids[symbol] for symbol in symbols)


def clean(text: str) -> str:
    """Return the cleaned text, which `split_words` divides into words.

    The result is in lower case, with straight quotation marks and single spaces. HTML entities, ligatures and
    full-width characters are replaced with ordinary characters, and control characters are removed.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON allows lone surrogates
    if "<" not in text:
        text = html.unescape(text)
    text = unicodedata.normalize("NFC", _TERMINAL_CODE.sub("", text).translate(_replacements()))
    text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=1)
def _replacements() -> dict[int, str]:
    """Return the replacements that `clean` makes, as a table for `str.translate`. A character that maps to "" is
    removed."""
    table = dict.fromkeys((*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF), "")
    table |= dict.fromkeys(range(0xFFF9, 0xFFFD), "")
    table |= {code: unicodedata.normalize("NFKC", chr(code)) for code in (*_LIGATURES, *range(0xFF01, 0xFFF0))}
    table |= {0x3000: " ", 0xFB05: "\u017ft"}
    table |= {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
    quotes = str.maketrans(dict.fromkeys(_SINGLE_QUOTES, "'") | dict.fromkeys(_DOUBLE_QUOTES, '"'))
    return {code: text.translate(quotes) for code, text in table.items()} | quotes


def split_words(text: str) -> Iterator[str]:
    """Divide a cleaned text into words, and leave out the spaces between them."""
    kinds = [_kind(character) for character in text]
    start = 0
    while start < len(text):
        fixed = next((name for name in (START, END, *_ENDINGS) if text.startswith(name, start)), None)
        end = start + len(fixed or text[start])
        if fixed is None and kinds[start] != "N":
            while end < len(text) and kinds[end] == kinds[start]:
                end += 1
        if kinds[start] != " ":
            yield text[start:end]
        start = end


def _kind(character: str) -> str:
    """Return "L" for a letter, "N" for a digit or another number, " " for a space, and "" for another character."""
    if character.isspace():
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else ""


def _byte_order() -> list[int]:
    """Return all bytes in the order of their tokens: first those with a printable Latin-1 character, then the
    others."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printed + sorted(set(range(256)) - set(printed))


@lru_cache(maxsize=1)
def _byte_symbols() -> dict[int, str]:
    """Return the character that the vocabulary file uses for each byte.

    It is the byte's Latin-1 character if that is printable, and otherwise a character from U+0100 on.
    """
    order = _byte_order()
    others = [byte for byte in order if byte not in range(0x21, 0x7F) and byte not in {*range(0xA1, 0x100)} - {0xAD}]
    return {byte: chr(0x100 + others.index(byte)) if byte in others else chr(byte) for byte in order}


def _joined(symbols: list[str], pair: Pair) -> list[str]:
    """Return the symbols of a word after each occurrence of `pair` has been joined, from left to right."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined

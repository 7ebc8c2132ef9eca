"""API keys: their form, and the SQLite file in the data folder that stores them.

    dv2_<key id>_<32 random bytes in base62>_<checksum>

The key id names a key in lists and logs. It is not secret. The checksum tells a mistyped key from an unknown one, and
lets scanners for leaked secrets recognise a key without asking the service. Only the sha256 of a key is stored. A fast
hash is enough, because nobody can guess 32 random bytes (docs/decisions/0040-keys.md).

Every change gives `Stamp` a new number, so that all running processes notice it at their next request.
"""

import hashlib
import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from service.sqlite import Schema, connect, prepare, transaction, translated
from service.stamp import Stamp

Scope = Literal["read", "write", "admin"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
"""The scopes, lowest first. Each scope includes the scopes before it."""
FileState = tuple[int, int, int]
FILE: Final = "keys.sqlite3"
MAX_NAME_CHARACTERS: Final = 64

_DIGITS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_CHARACTERS: Final = 10
_SECRET_BYTES: Final = 32
_SECRET_CHARACTERS: Final = 43  # 62^43 > 256^32
_CHECKSUM_CHARACTERS: Final = 6  # 62^6 > 2^32
_KEY: Final = re.compile(rb"(dv2_([0-9A-Za-z]{10})_[0-9A-Za-z]{43})_([0-9A-Za-z]{6})")
_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_CHARACTERS - 1}}}")
_WHAT: Final = "the file of API keys"
_SCHEMA: Final = Schema(
    what="a file of API keys",
    application_id=0x6476326B,  # "dv2k"
    scripts=(
        """
CREATE TABLE keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, digest BLOB NOT NULL,  -- sha256 of the key
    scopes TEXT NOT NULL,                                           -- separated by commas
    created REAL NOT NULL, expires REAL, revoked REAL, last_used REAL  -- seconds since 1970
);
""",
    ),
)


@dataclass(frozen=True)
class Key:
    """A stored API key. Times are in seconds since 1970. `expires`, `revoked` and `last_used` are None if the key never
    expires, is not revoked or was never used."""

    id: str
    name: str
    digest: bytes  # sha256 of the key's text
    scopes: tuple[Scope, ...]
    created: float
    expires: float | None = None
    revoked: float | None = None
    last_used: float | None = None

    def state(self, now: float) -> Literal["valid", "expired", "revoked"]:
        if self.revoked is not None:
            return "revoked"
        return "valid" if self.expires is None or now < self.expires else "expired"


class KeyStore:
    """The keys of one data folder. Several processes may use it at the same time.

    Raises:
        StorageFailed: the file cannot be used, is damaged, or belongs to a newer version of the service.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = folder / FILE
        self._clock = clock
        prepare(self.path, _SCHEMA, mode="DELETE")  # a full disk has no space for a write-ahead log
        self.stamp = Stamp(self.path.with_suffix(".stamp"))

    def file_state(self) -> FileState:
        """Return values that change when the file of the keys is written or replaced."""
        with translated(_WHAT):
            stat = self.path.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def all_keys(self) -> list[Key]:
        """Return all keys, including expired and revoked ones, oldest first."""
        with translated(_WHAT), closing(connect(self.path)) as db:
            rows = db.execute("SELECT * FROM keys ORDER BY rowid").fetchall()
        return [_key(row) for row in rows]

    def create(self, name: str, scopes: Iterable[str], expires_in_s: float | None = None) -> tuple[str, Key]:
        """Create a key. Return its text, which is stored nowhere, and its record.

        Raises:
            ValueError: the name, a scope or the time is not allowed.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"name {name[:MAX_NAME_CHARACTERS]!r} is not allowed: 1 to {MAX_NAME_CHARACTERS} letters, digits, "
                "dots, dashes and underscores, beginning with a letter or digit"
            )
        text, key = self._new(name, parse_scopes(scopes), _expiry(self._clock(), expires_in_s))
        self._write("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [_row(key)])
        return text, key

    def rotate(self, name: str, overlap_s: float, expires_in_s: float | None = None) -> tuple[str, Key, list[Key]]:
        """Create a key with the name and scopes of the newest valid key of this name. Return its text, its record, and
        the records of the older valid keys. These expire after `overlap_s` seconds, unless they expire earlier. If
        `expires_in_s` is None, the new key is valid for as long as the newest one was when it was created.

        Raises:
            ValueError: no valid key has this name.
        """
        now = self._clock()
        valid = [key for key in self.all_keys() if key.name == name and key.state(now) == "valid"]
        if not valid:
            names = sorted({key.name for key in self.all_keys() if key.state(now) == "valid"})
            raise ValueError(f"no valid key is named {name!r}; valid keys are named: {', '.join(names) or 'none'}")
        newest = valid[-1]
        if expires_in_s is None and newest.expires is not None:
            expires_in_s = newest.expires - newest.created
        text, key = self._new(name, newest.scopes, _expiry(now, expires_in_s))
        with translated(_WHAT), closing(connect(self.path)) as db, transaction(db):
            db.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?)", _row(key))
            db.executemany(
                "UPDATE keys SET expires = min(coalesce(expires, ?), ?) WHERE id = ?",
                [(now + overlap_s, now + overlap_s, old.id) for old in valid],
            )
        self.stamp.bump()
        ids = {old.id for old in valid}
        return text, key, [old for old in self.all_keys() if old.id in ids]

    def revoke(self, key: str) -> Key:
        """Revoke a key and return its record. Revoking it again changes nothing. `key` is its id, or its name if
        exactly one valid key has this name. A whole key is accepted too, because this is what a person who finds a
        leaked key has.

        Raises:
            ValueError: there is no such key, or several valid keys have this name.
        """
        key_id = key.removeprefix("dv2_").partition("_")[0]
        keys, now = self.all_keys(), self._clock()
        if key_id not in {one.id for one in keys}:
            key_id = _only_id(key, [one for one in keys if one.name == key and one.state(now) == "valid"])
        self._write("UPDATE keys SET revoked = coalesce(revoked, ?) WHERE id = ?", [(now, key_id)])
        return next(one for one in self.all_keys() if one.id == key_id)

    def set_last_used(self, times: Mapping[str, float]) -> None:
        """Store when keys were last used. `times` maps key ids to times. A later time that another process has stored
        is kept. The stamp stays as it is, because no process has to notice this change."""
        with translated(_WHAT), closing(connect(self.path)) as db, transaction(db):
            db.executemany(
                "UPDATE keys SET last_used = max(coalesce(last_used, 0), ?) WHERE id = ?",
                [(used, key_id) for key_id, used in times.items()],
            )

    def _write(self, statement: str, rows: list[tuple[Any, ...]]) -> None:
        with translated(_WHAT), closing(connect(self.path)) as db, transaction(db):
            db.executemany(statement, rows)
        self.stamp.bump()

    def _new(self, name: str, scopes: tuple[Scope, ...], expires: float | None) -> tuple[str, Key]:
        key_id = "".join(secrets.choice(_DIGITS) for _ in range(_ID_CHARACTERS))
        secret = _base62(int.from_bytes(secrets.token_bytes(_SECRET_BYTES), "big"), _SECRET_CHARACTERS)
        text = f"dv2_{key_id}_{secret}"
        text = f"{text}_{_checksum(text.encode())}"
        return text, Key(key_id, name, digest_of_key(text.encode()), scopes, self._clock(), expires)


def key_id_of(text: bytes) -> str | None:
    """Return the id in a key, or None if the text does not have the form of a key or its checksum is wrong."""
    match = _KEY.fullmatch(text)
    return match[2].decode() if match and _checksum(match[1]) == match[3].decode() else None


def digest_of_key(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def parse_scopes(scopes: Iterable[str]) -> tuple[Scope, ...]:
    """Return scopes in their order and without duplicates.

    Raises:
        ValueError: there is no scope, or an unknown one.
    """
    wanted = list(scopes)
    unknown = [scope for scope in wanted if scope not in SCOPES]
    if unknown or not wanted:
        shown = ", ".join(repr(scope[:40]) for scope in unknown) or "none"
        raise ValueError(f"scopes must be one or more of {', '.join(SCOPES)}, not {shown}")
    return tuple(scope for scope in SCOPES if scope in wanted)


def granted(scopes: Iterable[Scope]) -> frozenset[Scope]:
    """Return all scopes that a key with these scopes has: the highest of them, and every lower one."""
    highest = max((SCOPES.index(scope) for scope in scopes), default=-1)
    return frozenset(SCOPES[: highest + 1])


def _only_id(name: str, named: list[Key]) -> str:
    """Return the id of the only valid key with a name. `named` has all of them.

    Raises:
        ValueError: there is none, or more than one.
    """
    if len(named) == 1:
        return named[0].id
    if named:
        ids = ", ".join(key.id for key in named)
        raise ValueError(f"{len(named)} valid keys are named {name!r}: revoke them by their ids, which are {ids}")
    shown = name.removeprefix("dv2_")[:_ID_CHARACTERS]  # never a part of the secret
    raise ValueError(f"there is no key with the id {shown!r}, and no valid key with this name: see `dinov2 keys list`")


def _expiry(now: float, expires_in_s: float | None) -> float | None:
    if expires_in_s is not None and not 0 < expires_in_s < 1e10:
        raise ValueError(f"a key must expire after more than 0 s and less than 300 years, not after {expires_in_s:g} s")
    return None if expires_in_s is None else now + expires_in_s


def _checksum(text: bytes) -> str:
    return _base62(zlib.crc32(text), _CHECKSUM_CHARACTERS)


def _base62(number: int, characters: int) -> str:
    digits = []
    for _ in range(characters):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))


def _row(key: Key) -> tuple[Any, ...]:
    scopes = ",".join(key.scopes)
    return key.id, key.name, key.digest, scopes, key.created, key.expires, key.revoked, key.last_used


def _key(row: tuple[Any, ...]) -> Key:
    key_id, name, digest, scopes, *times = row
    return Key(key_id, name, digest, parse_scopes(scopes.split(",")), *times)

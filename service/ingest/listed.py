"""Decide which files the lines of a list may name.

Whoever writes a list must not decide which files of this machine are read, or which servers of its network. Without a
flag, a list may only name files in its own folder and below it. Links are resolved first. The same holds for the
addresses in a Parquet file.
"""

import os
import posixpath
from typing import Final, NamedTuple

from service.ingest.folders import Disk, File, Place, find_place

_WEB: Final = ("http", "https")
_WEB_STARTS: Final = ("http://", "https://")
_LOCAL: Final = ("file", "local")


class Allowed(NamedTuple):
    """What lists may name: files and objects outside their folder, and images on public web servers."""

    outside: bool = False
    web: bool = False


def _schemes_of(address: str) -> list[str]:
    """Return the schemes of a URL, such as `zip` and `s3` for `zip://a.jpg::s3://bucket/b.zip`. A path has none."""
    return [part.partition("://")[0].lower() for part in address.split("::")] if "://" in address else []


def is_web(address: str) -> bool:
    """Return whether an address is the URL of an image on a web server."""
    return address.lower().startswith(_WEB_STARTS)


def locate(listed_in: File, address: str, allowed: Allowed) -> tuple[Place, str]:
    """Return the file system of an address in a list, and the path within it. A relative path begins at the folder of
    the list.

    Raises:
        ValueError: the list may not name this address, or its scheme is unknown.
    """
    schemes = _schemes_of(address)
    if not set(schemes).isdisjoint(_WEB):
        raise ValueError("a web address must be http:// or https://, and not a part of another address")
    folder = posixpath.dirname(listed_in.path)
    if schemes and not (len(schemes) == 1 and schemes[0] in _LOCAL):
        beside = f"{listed_in.address.rpartition('/')[0]}/"
        if not allowed.outside and (not address.startswith(beside) or ".." in address.split("/")):
            raise _outside(listed_in)
        return find_place(address)
    if schemes or address.startswith("/"):
        place, path = find_place(address)
    else:
        place, path = listed_in.place, listed_in.place.join(folder, address)
    if not allowed.outside and not (place.is_local == listed_in.place.is_local and _is_below(place, path, folder)):
        raise _outside(listed_in)
    return place, path


def _outside(listed_in: File) -> ValueError:
    return ValueError(f"it is outside the folder of {listed_in.address}; --allow-outside permits this")


def _is_below(place: Place, path: str, folder: str) -> bool:
    """Return whether a path leads to a file below a folder of the same file system, after links are resolved."""
    if isinstance(place, Disk):
        path, folder = os.path.realpath(path), os.path.realpath(folder)
    else:
        path, folder = posixpath.normpath(path), posixpath.normpath(folder)
    return path.startswith(f"{folder.rstrip('/')}/")

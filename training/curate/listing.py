"""List the images of several sources, sorted by key, before any image is read."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from training.curate.table import Indices
from training.data.dataset import Source
from training.data.progress import Tally
from training.data.sources import open_source

CHANGED: Final = (
    "has changed since it was scanned; start the command again. If that does not help, the file has the size and the "
    "time of modification that it had before: touch it first"
)
"""What is said about an image whose bytes are no longer those that were scanned."""


class Location(NamedTuple):
    """Where an image is: its key, the number of its source, and its number there. Both numbers begin at 0."""

    key: str
    source: int
    position: int


@dataclass(frozen=True)
class Listing:
    """The images of several sources, sorted by key.

    An image has the key "<number of the source, from 1>/<name in the source>". `version` changes if an image's file is
    written again. `source` and `position` [n] say where the image is: the number of its source, from 0, and its number
    there. `unlisted` has the key of each file that was found to be unreadable, and the reason.
    """

    key: Sequence[str]
    label: Sequence[str | None]
    version: Sequence[str]
    source: Indices
    position: Indices
    unlisted: Sequence[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.key)

    def location(self, row: int) -> Location:
        """Return where an image is."""
        return Location(self.key[row], int(self.source[row]), int(self.position[row]))


def gone(key: str, error: ValueError) -> OSError:
    """Return the error for an image that could be read when it was scanned, but not any more."""
    return OSError(f"{key} cannot be read any more: {error}; if it was removed or replaced, start the command again")


class Reader:
    """Reads the files of images. It can be sent to another process, where it opens the sources again."""

    def __init__(
        self, addresses: Sequence[str], index_dir: Path, change: Callable[[bytes], bytes] | None = None
    ) -> None:
        """Remember the paths and URLs of the sources, the folder for the indices of tar shards, and a function that
        changes the bytes of each image that is read, if there is one."""
        self._addresses, self._index_dir, self._change = tuple(addresses), index_dir, change
        self._sources: list[Source] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_sources": None}

    @property
    def sources(self) -> list[Source]:
        """Return the sources, which are opened when they are first needed.

        Raises:
            ValueError: a source cannot be used. The message names it.
            OSError: a server or a disk failed.
        """
        if self._sources is None:
            self._sources = open_sources(self._addresses, self._index_dir)
        return self._sources

    def encoded(self, location: Location) -> bytes:
        """Return the bytes of the file of an image.

        Raises:
            ValueError: the file is missing, or is not allowed to be read, or is too large.
            OSError: a server or a disk failed, or the source has other images than when it was listed.
        """
        key, number, position = location
        source = self.sources[number]
        if position >= len(source) or f"{number + 1}/{source.name(position)}" != key:
            raise OSError(f"the images in {self._addresses[number]} have changed since they were listed")
        try:
            data = source.encoded(position)
        except OSError as error:
            raise OSError(f"{key} cannot be read: {error}") from error
        return data if self._change is None else self._change(data)


def open_sources(addresses: Sequence[str], index_dir: Path, tally: Tally | None = None) -> list[Source]:
    """Open sources by their paths or URLs. `index_dir` is the folder for the indices of tar shards.

    Raises:
        ValueError: a source cannot be used. The message names it.
        OSError: a server or a disk failed.
    """
    sources = []
    for address in addresses:
        try:
            sources.append(open_source(address, index_dir, tally))
        except ValueError as error:
            raise ValueError(str(error) if address in str(error) else f"{address}: {error}") from error
    return sources


def list_sources(sources: Sequence[Source]) -> Listing:
    """List the images of all sources, sorted by key.

    Raises:
        ValueError: two images have the same key.
    """
    keys, labels, versions, unlisted = list[str](), list[str | None](), list[str](), list[tuple[str, str]]()
    for number, source in enumerate(sources, 1):
        keys += [f"{number}/{source.name(index)}" for index in range(len(source))]
        classes = source.classes()
        labels += [classes.names[of_image] if of_image >= 0 else None for of_image in classes.numbers.tolist()]
        versions += [source.version(index) for index in range(len(source))]
        unlisted += [(f"{number}/{item.name}", item.reason) for item in source.skipped]
    lengths = [len(source) for source in sources]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    sorted_keys = [keys[i] for i in order]
    for before, after in pairwise(sorted_keys):
        if before == after:
            raise ValueError(f"two images have the name {after}: names must be unique within a source")
    return Listing(
        key=sorted_keys,
        label=[labels[i] for i in order],
        version=[versions[i] for i in order],
        source=np.repeat(np.arange(len(sources)), lengths)[order],
        position=np.concatenate([np.arange(n) for n in lengths])[order],
        unlisted=sorted(unlisted),
    )


def digest_of(*values: str | bytes | None) -> str:
    """Return a sha256 of texts, bytes and None, as 64 hex digits."""
    digest = hashlib.sha256()
    for value in values:
        data = value.encode(errors="surrogateescape") if isinstance(value, str) else value
        digest.update(b"-" if data is None else b"%d " % len(data) + data)
    return digest.hexdigest()

"""Find the items whose file no longer exists in an indexed folder: `dinov2 index FOLDER --prune`.

An item belongs to a folder if its source is a file in this folder. The item is gone if the run has not come across its
source and the file does not exist. An item from a tar or Parquet file is also gone if the run has read other images of
this archive, without a problem, and has not come across the item.

A disk that is not mounted looks like an empty folder. For this reason, an item whose file does not exist is only gone
if the folder that contained the file still contains another file, at any depth. If this folder no longer exists either,
the same must hold for the nearest folder above it that exists. Hidden files do not count. Nothing is gone from a source
in which the run has found no image, or from below a folder or link that could not be read. If it is uncertain whether a
file exists, the item is kept.
"""

import os
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.request import url2pathname

import fsspec

from model.folder import HIDDEN, HIDDEN_FOLDERS, LOOPS, SPECIAL
from service.ingest.folders import Entry, Photo, Place, Problem, Stamp, find_place
from service.search.store import VectorStore

_PAGE: Final = 1000
_IN_PARQUET: Final = ".parquet#"
_NOT_A_FILE: Final = (HIDDEN, HIDDEN_FOLDERS, LOOPS, SPECIAL)
"""Entries of a folder that may exist although the files in it are not mounted."""


@dataclass
class Sources:
    """The sources that a run has come across."""

    images: set[str] = field(default_factory=set)
    problems: set[str] = field(default_factory=set)
    archives: set[str] = field(default_factory=set)  # archives from which an image was read
    stamps: dict[str, Stamp] = field(default_factory=dict)  # of these archives, when an item was first looked for

    def recorded(self, images: Iterable[Photo | Problem]) -> Iterator[Photo | Problem]:
        """Yield all of `images`, and record their sources."""
        for image in images:
            if isinstance(image, Problem):
                self.problems.add(image.source)
            else:
                self.images.add(image.source)
                file, is_member = _file_of(image.source)
                if is_member:
                    self.archives.add(file)
            yield image


def find_folders(sources: Sequence[str]) -> list[tuple[Place, str]]:
    """Return the file system and the path of each folder in `sources`.

    Raises:
        ValueError: a source is not a folder.
        OSError: a source cannot be read.
    """
    folders = []
    for source in sources:
        place, path = find_place(source)
        if not place.entry(path).is_folder:
            raise ValueError(f"--prune compares a collection with folders, and {source} is not a folder")
        folders.append((place, path))
    return folders


def has_images(place: Place, folder: str, found: Sources) -> bool:
    """Return whether the run has found an image in a folder."""
    paths = (_path_in(place, _file_of(source)[0]) for source in found.images)
    return any(path is not None and _is_below(path, folder) for path in paths)


async def gone_items(
    store: VectorStore, collection: str, folders: Sequence[tuple[Place, str]], found: Sources
) -> AsyncIterator[str]:
    """Yield the ids of the items whose file no longer exists in one of the folders.

    Raises:
        CollectionNotFound: the collection does not exist.
        StorageFailed: the store failed.
    """
    checks = [_Check(*folder, found) for folder in folders]
    cursor: str | None = None
    while True:
        page = await store.scroll(collection, cursor=cursor, limit=_PAGE)
        for item in page.items:
            if item.source is not None:
                answers = [check.is_gone(item.source) for check in checks if check.covers(item.source)]
                if answers and all(answers):
                    yield item.id
        if (cursor := page.cursor) is None:
            return


class _Check:
    """Finds out which files of a folder are gone. The state of each subfolder is read once."""

    def __init__(self, place: Place, folder: str, found: Sources) -> None:
        self._place = place
        self._folder = folder.rstrip("/")
        self._found = found
        self._has_images = has_images(place, folder, found)
        problems = (_path_in(place, source) for source in found.problems if not _file_of(source)[1])
        self._problems = {path.rstrip("/") for path in problems if path is not None}
        self._with_files: dict[str, bool] = {}
        if not place.is_local:  # some file systems remember listings, which may be out of date
            fsspec.url_to_fs(place.address(folder))[0].invalidate_cache()

    def covers(self, source: str) -> bool:
        """Return whether the file that contains an image is below the folder."""
        path = _path_in(self._place, _file_of(source)[0])
        return path is not None and _is_below(path, self._folder)

    def is_gone(self, source: str) -> bool:
        """Return whether an image that the folder covers is gone."""
        found = self._found
        if not self._has_images or source in found.images or source in found.problems:
            return False
        file, is_member = _file_of(source)
        path = _path_in(self._place, file)
        if path is None:
            return False
        try:
            entry = self._entry(path)
            if entry is None:
                return self._was_deleted(path)
        except OSError:
            return False
        is_complete = is_member and file in found.archives and file not in found.problems
        return is_complete and found.stamps.setdefault(file, entry.stamp) == entry.stamp

    def _was_deleted(self, path: str) -> bool:
        """Return whether a missing file was deleted, and is not just on a disk that is not mounted.

        Raises:
            OSError: this cannot be found out.
        """
        if path in self._problems:
            return False
        is_known = False
        while not is_known and path != self._folder:
            path = path.rpartition("/")[0]
            if path in self._problems:
                return False
            entry = self._entry(path or "/")
            is_known = entry is not None and entry.is_folder
        return is_known and self._contains_file(path or "/")

    def _contains_file(self, folder: str) -> bool:
        """Return whether a folder contains a file at any depth."""
        if folder not in self._with_files:
            rows = [row for row in self._place.listing(folder) if isinstance(row, Entry)]
            used = [row for row in rows if row.ignored not in _NOT_A_FILE]
            self._with_files[folder] = any(not row.is_folder for row in used) or any(
                self._contains_file(row.path.rstrip("/")) for row in used
            )
        return self._with_files[folder]

    def _entry(self, path: str) -> Entry | None:
        """Return the file or folder at `path`, or None if it does not exist.

        Raises:
            OSError: it cannot be read, for example because it is a link to a missing folder.
        """
        try:
            return self._place.entry(path)
        except (FileNotFoundError, NotADirectoryError):
            if self._place.is_local and os.path.islink(path):
                raise
            return None


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(f"{folder.rstrip('/')}/")


def _file_of(source: str) -> tuple[str, bool]:
    """Return the address of the file that contains an image, and whether this file is an archive."""
    if source.startswith("tar://"):
        return source.rpartition("::")[2], True
    before, in_parquet, row = source.rpartition(_IN_PARQUET)
    return (f"{before}.parquet", True) if in_parquet and row.isdecimal() else (source, False)


def _path_in(place: Place, address: str) -> str | None:
    """Return the path of an address in the file system `place`, or None if the address is in another file system."""
    if place.is_local:
        if address.startswith("file://"):
            return url2pathname(address.removeprefix("file://"))
        return address if "://" not in address else None
    if "://" not in address:
        return None
    try:
        other, path = find_place(address)
    except ValueError:  # an unknown protocol
        return None
    return path if not other.is_local and other.address(path) == place.address(path) else None

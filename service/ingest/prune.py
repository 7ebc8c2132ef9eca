"""Find the items whose file no longer exists in an indexed folder: `dinov2 index FOLDER --prune`.

An item belongs to a folder if its source is a file in this folder. The item is gone if the run has not come across its
source and the file does not exist. An item from a tar or Parquet file is also gone if the run has read other images of
this archive, without a problem, and has not come across the item. If it is uncertain whether a file exists, for example
because a folder cannot be read, the item is kept.
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.request import url2pathname

from service.ingest.folders import Photo, Place, Problem, find_place
from service.search.store import VectorStore

_PAGE: Final = 1000
_IN_PARQUET: Final = ".parquet#"


@dataclass
class Sources:
    """The sources that a run has come across."""

    images: set[str] = field(default_factory=set)
    problems: set[str] = field(default_factory=set)
    archives: set[str] = field(default_factory=set)  # archives from which an image was read

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


async def gone_items(
    store: VectorStore, collection: str, folders: Sequence[tuple[Place, str]], found: Sources
) -> AsyncIterator[str]:
    """Yield the ids of the items whose file no longer exists in one of the folders.

    Raises:
        CollectionNotFound: the collection does not exist.
        StorageFailed: the store failed.
    """
    cursor: str | None = None
    while True:
        page = await store.scroll(collection, cursor=cursor, limit=_PAGE)
        for item in page.items:
            if item.source is not None and any(_is_gone(item.source, *folder, found) for folder in folders):
                yield item.id
        if (cursor := page.cursor) is None:
            return


def _is_gone(source: str, place: Place, folder: str, found: Sources) -> bool:
    if source in found.images or source in found.problems:
        return False
    file, is_member = _file_of(source)
    path = _path_in(place, file)
    if path is None or not path.startswith(f"{folder.rstrip('/')}/"):
        return False
    try:
        place.entry(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return is_member and file in found.archives and file not in found.problems


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
    other, path = find_place(address)
    return path if not other.is_local and other.address(path) == place.address(path) else None

"""Find the images in the sources of `dinov2 index SOURCE...`: folders, archives, lists and addresses.

    folder             all images at any depth, with metadata from `x.json` next to `x.jpg` and from Hugging Face's
                       `metadata.jsonl` or `metadata.csv`, and all archives
    image              one file
    .tar .tar.gz       `service/ingest/archives.py`
    .parquet           `service/ingest/parquet_images.py`
    .txt .jsonl .csv   `service/ingest/lists.py`

A source may be on this machine or on any file system that fsspec supports (s3://, gs://, memory://, file://). A single
image may also be at an http or https address. `service/ingest/listed.py` decides what a list may name. Images are
yielded one by one. An image is read when its `load` function is called. The exceptions are the images in a compressed
or remote tar, which are read before they are yielded.

The id of an image is its path relative to the SOURCE, with slashes: `shelf/a.jpg`, `shards/0001.tar/a.jpg`,
`train.parquet#12`. The id of an image from a list is the `id` on its line, or else the path or address on the line. If
an image or file cannot be read, a `Problem` is yielded and the search continues with the next one.
"""

import os
import posixpath
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from model.decode import sniff
from model.folder import HEAD_BYTES, HIDDEN, HIDDEN_FOLDERS, OTHER_SUFFIXES, Account, suffix_of
from service.ingest.archives import json_object, tar_photos
from service.ingest.folders import Content, Disk, Entry, File, Photo, Place, Problem, find_place, translated
from service.ingest.listed import Allowed, is_web, locate
from service.ingest.lists import LIST_SUFFIXES, read_list
from service.ingest.parquet_images import parquet_photos
from service.ingest.unpacking import MAX_SIDECAR_BYTES
from service.ingest.web import PublicOnly, Web

_TAR: Final = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_METADATA_FILES: Final = ("metadata.jsonl", "metadata.csv")
"""Names of files that describe images in their folder and its subfolders, as in Hugging Face's ImageFolder."""
_MAX_DESCRIBED_BYTES: Final = 256 * 2**20
"""The highest size of such a file, because all its lines are in memory at the same time."""
_NOTHING: Final = Allowed()
_ADVICE: Final = {
    ".zip": "unpack it, or put the images into a .tar",
    ".7z": "unpack it, or put the images into a .tar",
    ".rar": "unpack it, or put the images into a .tar",
    ".zst": "unpack it (unzstd)",
    ".json": "a list must be a .jsonl file with one object per line",
    ".xlsx": "save it as .csv",
    ".xls": "save it as .csv",
}


def find_photos(
    sources: Sequence[str],
    *,
    max_bytes: int = 20 * 2**20,
    image_column: str | None = None,
    folders_as: Sequence[str] = (),
    account: Account | None = None,
    allowed: Allowed = _NOTHING,
) -> Iterator[Photo | Problem]:
    """Return an iterator over the images of all sources, in order. It yields a `Problem` for anything that cannot be
    read.

    Args:
        sources: paths or addresses.
        max_bytes: size limit of one image. Larger images are not read.
        image_column: name of the image column of Parquet and .csv files. If it is None, the column is detected.
        folders_as: metadata keys. Their values are the names of the folders on the path from a source to an image,
            outermost first.
        account: counts the files that are ignored.
        allowed: what lists may name, apart from files in their own folder and below it.

    Raises:
        ValueError: `sources` is empty, or a source does not exist, cannot be reached or is of a kind that cannot be
            read. The error is raised before the iterator is returned.
    """
    if not sources:
        raise ValueError("no source was given")
    roots: list[str | tuple[Place, Entry]] = []
    for source in sources:
        if is_web(source):
            roots.append(source)
            continue
        place, path = find_place(source)
        try:
            entry = place.entry(path)
            _check_kind(source, place, entry)
        except FileNotFoundError as error:
            raise ValueError(f"{source}: no such file or folder") from error
        except OSError as error:
            raise ValueError(f"{source}: {error}") from error
        roots.append((place, entry))
    return _Finder(max_bytes, image_column, folders_as, account or Account(), allowed).photos(roots)


def _check_kind(source: str, place: Place, entry: Entry) -> None:
    """Check that a source may contain images. A file that is neither a list nor an archive must be an image.

    Raises:
        ValueError: the file has the suffix of another kind of file, and its content is not an image, or it is a device,
            a pipe or a socket.
        OSError: the file cannot be read.
    """
    if isinstance(place, Disk) and not entry.is_folder and not os.path.isfile(entry.path):
        raise ValueError(f"{source}: not a plain file")
    suffix = suffix_of(entry.name)
    readable = (*_TAR, ".parquet", *LIST_SUFFIXES)
    if entry.is_folder or suffix not in OTHER_SUFFIXES or entry.name.lower().endswith(readable):
        return
    with translated(entry.path), place.open(entry.path) as file:
        if sniff(file.read(HEAD_BYTES)) is None:
            advice = _ADVICE.get(suffix, "it is not an image")
            kinds = f"a folder, an image, an archive or a list ({', '.join(readable)})"
            raise ValueError(f"{source}: a {suffix} file cannot be indexed; {advice}. A source is {kinds}")


def read_photo(source: str, *, max_bytes: int = 20 * 2**20) -> bytes:
    """Return the bytes of the image at a path or address.

    Raises:
        ImageTooLarge, OSError, ValueError: the image cannot be read. The message gives the reason.
    """
    if is_web(source):
        return Web().read(source, max_bytes)
    place, path = find_place(source)
    return File(place, path, source, place.entry(path).stamp).read(max_bytes)


class _Finder:
    """A search for the images in sources. The same options apply to every source."""

    def __init__(
        self,
        max_bytes: int,
        image_column: str | None,
        folders_as: Sequence[str],
        account: Account,
        allowed: Allowed,
    ) -> None:
        self._max_bytes = max_bytes
        self._image_column = image_column
        self._folders_as = folders_as
        self._account = account
        self._allowed = allowed
        self._web = Web()
        self._public_web = Web(PublicOnly)

    def photos(self, roots: Sequence[str | tuple[Place, Entry]]) -> Iterator[Photo | Problem]:
        for root in roots:
            if isinstance(root, str):
                yield self._on_web(self._web, root, {}, root)
                continue
            place, entry = root
            file = File(place, entry.path, entry.name, entry.stamp)
            if entry.is_folder:
                yield from map(self._with_folders, self._below(place, entry.path, "", {}))
            elif entry.name.lower().endswith(LIST_SUFFIXES):
                yield from self._listed(file)
            elif (archived := self._archived(file, "")) is not None:
                yield from map(self._with_folders, archived)
            else:
                yield self._plain(file)

    def _with_folders(self, found: Photo | Problem) -> Photo | Problem:
        """Add the names of the folders in an image's id to the image's metadata."""
        if not self._folders_as or isinstance(found, Problem) or "://" in found.id:
            return found
        names = dict(zip(self._folders_as, found.id.split("/")[:-1], strict=False))
        load = found.load

        def load_with_names() -> Content:
            data, metadata = load()
            return Content(data, {**metadata, **names})

        return replace(found, load=load_with_names)

    def _below(
        self, place: Place, folder: str, prefix: str, described: Mapping[str, dict[str, Any]]
    ) -> Iterator[Photo | Problem]:
        """Yield the images in a folder and its subfolders, depth first and sorted by name, including the images in
        archives. Other files are counted. `prefix` is the folder's path relative to the source. `described` contains
        the metadata from files such as `metadata.jsonl` in the folders above."""
        rows = list(place.listing(folder))
        sidecars = {row.name: row for row in rows if isinstance(row, Entry) and row.ignored == ".json"}
        for row in rows:
            if isinstance(row, Entry) and row.name in _METADATA_FILES and not row.is_folder:
                here: dict[str, dict[str, Any]] = {}
                yield from self._describe(File(place, row.path, f"{prefix}{row.name}"), prefix, here)
                described = ChainMap(here, dict(described)) if described else here
        for row in rows:
            if isinstance(row, Problem):
                yield row
                continue
            name = f"{prefix}{row.name}"
            file = File(place, row.path, name, row.stamp)
            if row.ignored is not None:
                is_hidden = row.ignored in (HIDDEN, HIDDEN_FOLDERS)
                archived = None if is_hidden else self._archived(file, f"{name}/")
                if archived is None:
                    self._account.ignored[row.ignored] += 1
                else:
                    yield from archived
            elif row.is_folder:
                yield from self._below(place, row.path, f"{name}/", described)
            else:
                stem = row.name.rpartition(".")[0] or row.name
                entry = sidecars.get(f"{stem}.json")
                sidecar = entry and File(place, entry.path, entry.name, entry.stamp or None)
                yield self._plain(file, sidecar, described.get(name))

    def _describe(self, file: File, prefix: str, described: dict[str, dict[str, Any]]) -> Iterator[Problem]:
        """Read a file such as `metadata.jsonl`, and add the metadata of each image to `described`, under the image's
        path relative to the source. Yield a `Problem` for each line that cannot be used.

        A file with this name but without the field `file_name` in its first line is of another kind, and is ignored."""
        try:
            with file.open() as raw:
                if b"file_name" not in raw.readline(2**16):
                    return
                if raw.seek(0, os.SEEK_END) > _MAX_DESCRIBED_BYTES:
                    raise OSError(f"it has more than {_MAX_DESCRIBED_BYTES:,} bytes: index the file itself as a list")
        except OSError as error:
            yield Problem(file.address, str(error))
            return
        for line in read_list(file, "file_name"):
            if isinstance(line, Problem):
                yield line
            else:
                fields = line.metadata if line.id is None else {"id": line.id, **line.metadata}
                described[posixpath.normpath(f"{prefix}{line.address}")] = fields

    def _archived(self, file: File, prefix: str) -> Iterator[Photo | Problem] | None:
        """Return an iterator over the images in an archive, or None if the file is not an archive."""
        if file.name.lower().endswith(_TAR):
            self._account.archives += 1
            return tar_photos(file, prefix, self._max_bytes, self._account)
        if suffix_of(file.name) == ".parquet":
            self._account.archives += 1
            return parquet_photos(file, self._image_column, self._max_bytes, partial(self._at, file))
        return None

    def _plain(self, file: File, sidecar: File | None = None, described: Mapping[str, Any] | None = None) -> Photo:
        return Photo(file.name, file.address, partial(self._content, file, sidecar, described or {}), file.stamp)

    def _content(self, file: File, sidecar: File | None, described: Mapping[str, Any]) -> Content:
        metadata = dict(described)
        if sidecar is not None:
            metadata |= json_object(sidecar.read(MAX_SIDECAR_BYTES), sidecar.name.rpartition("/")[2])
        return Content(file.read(self._max_bytes), metadata)

    def _listed(self, file: File) -> Iterator[Photo | Problem]:
        for line in read_list(file, self._image_column):
            yield line if isinstance(line, Problem) else self._at(file, line.address, line.metadata, line.id)

    def _on_web(self, web: Web, url: str, metadata: dict[str, Any], item_id: str) -> Photo:
        return Photo(item_id, url, lambda: Content(web.read(url, self._max_bytes), metadata))

    def _at(
        self, listed_in: File, address: str, metadata: dict[str, Any], item_id: str | None = None
    ) -> Photo | Problem:
        """Return the image at an address. `listed_in` is the list or Parquet file that contains the address. If the
        address is a relative path, it is resolved from the folder of this file. If the address cannot be used, return a
        `Problem`."""
        item_id = address if item_id is None else item_id
        if is_web(address):
            if not self._allowed.web:
                return Problem(address, "a list may not name web addresses; --allow-web permits this")
            return self._on_web(self._public_web, address, metadata, item_id)
        try:
            place, path = locate(listed_in, address, self._allowed)
            stamp = place.entry(path).stamp if place.is_local else None  # remotely, each stamp would need a request
        except (OSError, ValueError) as error:
            return Problem(address, getattr(error, "strerror", None) or str(error))
        file = File(place, path, address, stamp)
        return Photo(item_id, file.address, lambda: Content(file.read(self._max_bytes), metadata), stamp)

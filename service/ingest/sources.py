"""Find the images in the sources of `dinov2 index SOURCE...`: folders, archives, lists and addresses.

    folder             all images at any depth, with `x.json` next to `x.jpg` as metadata, and all archives
    image              one file
    .tar .tar.gz       `service/ingest/archives.py`
    .parquet           `service/ingest/archives.py`
    .txt               one path or address per line
    .jsonl             {"image": "...", "id": "...", ...} per line; other keys are metadata

A source may be on this machine or on any file system that fsspec supports (s3://, gs://, memory://, file://). A single
image may also be at an http or https address. Images are yielded one by one. An image is read when its `load` function
is called. The exceptions are the images in a compressed or remote tar, which are read before they are yielded.

The id of an image is its path relative to the SOURCE, with slashes: `shelf/a.jpg`, `shards/0001.tar/a.jpg`,
`train.parquet#12`. The id of an image from a list is the `id` on its line, or else the path or address on the line. If
an image or file cannot be read, a `Problem` is yielded and the search continues with the next one.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final

from service.ingest.archives import (
    IMAGE_SUFFIXES,
    MAX_SIDECAR_BYTES,
    json_object,
    parquet_photos,
    suffix_of,
    tar_photos,
)
from service.ingest.folders import Content, Entry, File, Photo, Place, Problem, Web, find_place

_TAR: Final = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_LISTS: Final = (".txt", ".jsonl", ".ndjson")
_ADDRESS_KEYS: Final = ("image", "uri", "url", "path", "source")
_WEB: Final = ("http://", "https://")
_MAX_LINE_BYTES: Final = 2**20


def find_photos(
    sources: Sequence[str], *, max_bytes: int = 20 * 2**20, image_column: str | None = None
) -> Iterator[Photo | Problem]:
    """Return an iterator over the images of all sources, in order. It yields a `Problem` for anything that cannot be
    read.

    Args:
        sources: paths or addresses.
        max_bytes: size limit of one image. Larger images are not read.
        image_column: name of the image column of Parquet files. If it is None, the column is detected.

    Raises:
        ValueError: `sources` is empty, or a source does not exist or cannot be reached. The error is raised before the
            iterator is returned.
    """
    if not sources:
        raise ValueError("no source was given")
    roots: list[str | tuple[Place, Entry]] = []
    for source in sources:
        if source.startswith(_WEB):
            roots.append(source)
            continue
        place, path = find_place(source)
        try:
            roots.append((place, place.entry(path)))
        except FileNotFoundError as error:
            raise ValueError(f"{source}: no such file or folder") from error
        except OSError as error:
            raise ValueError(f"{source}: {error}") from error
    return _Finder(max_bytes, image_column).photos(roots)


def read_photo(source: str, *, max_bytes: int = 20 * 2**20) -> bytes:
    """Return the bytes of the image at a path or address.

    Raises:
        ImageTooLarge, OSError, ValueError: the image cannot be read. The message gives the reason.
    """
    if source.startswith(_WEB):
        return Web().read(source, max_bytes)
    place, path = find_place(source)
    return File(place, path, source, place.entry(path).stamp).read(max_bytes)


class _Finder:
    """A search for the images in sources. The same options apply to every source."""

    def __init__(self, max_bytes: int, image_column: str | None) -> None:
        self._max_bytes = max_bytes
        self._image_column = image_column
        self._web = Web()

    def photos(self, roots: Sequence[str | tuple[Place, Entry]]) -> Iterator[Photo | Problem]:
        for root in roots:
            if isinstance(root, str):
                yield self._on_web(root, {}, root)
                continue
            place, entry = root
            if entry.is_folder:
                yield from self._below(place, entry.path, "")
                continue
            file = File(place, entry.path, entry.name, entry.stamp)
            if entry.name.lower().endswith(_LISTS):
                yield from self._listed(file)
            else:
                yield from self._archived(file, "") or [self._plain(file, None)]

    def _below(self, place: Place, folder: str, prefix: str) -> Iterator[Photo | Problem]:
        """Yield the images in a folder and its subfolders, depth first and sorted by name, including the images in
        archives. Other files are ignored. `prefix` is the folder's path relative to the source."""
        rows = list(place.listing(folder))
        sidecars = {row.name: row for row in rows if isinstance(row, Entry) and suffix_of(row.name) == ".json"}
        for row in rows:
            if isinstance(row, Problem):
                yield row
                continue
            name = f"{prefix}{row.name}"
            file = File(place, row.path, name, row.stamp)
            if row.is_folder:
                yield from self._below(place, row.path, f"{name}/")
            elif suffix_of(name) in IMAGE_SUFFIXES:
                sidecar = sidecars.get(f"{row.name.rpartition('.')[0]}.json")
                yield self._plain(file, sidecar and File(place, sidecar.path, sidecar.name, sidecar.stamp))
            else:
                yield from self._archived(file, f"{name}/") or ()

    def _archived(self, file: File, prefix: str) -> Iterator[Photo | Problem] | None:
        """Return an iterator over the images in an archive, or None if the file is not an archive."""
        if file.name.lower().endswith(_TAR):
            return tar_photos(file, prefix, self._max_bytes)
        if suffix_of(file.name) == ".parquet":
            return parquet_photos(file, self._image_column, self._max_bytes, partial(self._at, file))
        return None

    def _plain(self, file: File, sidecar: File | None) -> Photo:
        return Photo(file.name, file.address, partial(self._content, file, sidecar), file.stamp)

    def _content(self, file: File, sidecar: File | None) -> Content:
        metadata = {}
        if sidecar is not None:
            metadata = json_object(sidecar.read(MAX_SIDECAR_BYTES), sidecar.name.rpartition("/")[2])
        return Content(file.read(self._max_bytes), metadata)

    def _listed(self, file: File) -> Iterator[Photo | Problem]:
        is_json = not file.name.lower().endswith(".txt")
        try:
            with file.open() as lines:
                number = 0
                while line := lines.readline(_MAX_LINE_BYTES + 1):
                    number += 1
                    where = f"{file.address}:{number}"
                    if len(line) > _MAX_LINE_BYTES:
                        yield Problem(
                            where, f"the line has more than {_MAX_LINE_BYTES} bytes; the rest of the file was not read"
                        )
                        return
                    if line.strip():
                        yield self._line(file, line, where, is_json)
        except OSError as error:
            yield Problem(file.address, str(error))

    def _line(self, file: File, line: bytes, where: str, is_json: bool) -> Photo | Problem:
        try:
            text = line.decode().strip()
            if not is_json:
                return self._at(file, text, {})
            fields = json_object(text, "the line")
            key = next((key for key in _ADDRESS_KEYS if isinstance(fields.get(key), str) and fields[key]), None)
            if key is None:
                raise ValueError(f"the line has no address of an image: add one of {', '.join(_ADDRESS_KEYS)}")
            address, item_id = fields.pop(key), fields.pop("id", None)
            if item_id is not None and not isinstance(item_id, str):
                raise ValueError("the id is not a string")
            inner = fields.pop("metadata", {})
            if not isinstance(inner, dict):
                raise ValueError("the metadata is not a JSON object")
            return self._at(file, address, {**fields, **inner}, item_id)
        except ValueError as error:
            return Problem(where, str(error))

    def _on_web(self, url: str, metadata: dict[str, Any], item_id: str) -> Photo:
        return Photo(item_id, url, lambda: Content(self._web.read(url, self._max_bytes), metadata))

    def _at(
        self, listed_in: File, address: str, metadata: dict[str, Any], item_id: str | None = None
    ) -> Photo | Problem:
        """Return the image at an address. `listed_in` is the list or Parquet file that contains the address. If the
        address is a relative path, it is resolved from the folder of this file. If the address cannot be used, return a
        `Problem`."""
        item_id = address if item_id is None else item_id
        if address.startswith(_WEB):
            return self._on_web(address, metadata, item_id)
        try:
            if "://" in address or address.startswith("/"):
                place, path = find_place(address)
            else:
                place = listed_in.place
                path = place.join(listed_in.path.rpartition("/")[0], address)
            stamp = place.entry(path).stamp if place.is_local else None  # remotely, each stamp would need a request
        except (OSError, ValueError) as error:
            return Problem(address, getattr(error, "strerror", None) or str(error))
        file = File(place, path, address, stamp)
        return Photo(item_id, file.address, lambda: Content(file.read(self._max_bytes), metadata), stamp)

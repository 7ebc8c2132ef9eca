"""Scan images: read and decode each one once, and store all that the other stages need to know about it.

The listed images are divided into parts of fixed size. A part is stored in one step, under a name made from its keys
and the versions of its files, so a scan that was killed continues with the parts that are missing. Another scan of
other images takes over what the last table knows: an image whose file has the same version is not read, and an image
with the same bytes as one in that table is not decoded.
"""

import hashlib
import shutil
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from model.artifact import read_manifest
from model.decode import decode_stored, upright
from model.files import write_bytes
from model.pooling import Pooling
from training.curate.copies.hashes import perceptual_hash
from training.curate.embedding import Embedder
from training.curate.faces import FaceSettings
from training.curate.hidden_faces import HiddenFaces
from training.curate.listing import CHANGED, Listing, Location, Reader, digest_of, gone, list_sources
from training.curate.progress import Track
from training.curate.quality import MEASURES, measure
from training.curate.rows import (
    Found,
    Row,
    found_in,
    part_bytes,
    read_facts,
    read_images,
    read_problems,
    read_versions,
    write_table,
)
from training.curate.table import Images, Pixels
from training.curate.workers import RunAll, Workers
from training.data.dataset import LIMITS, decode

VERSION: Final = "1"
"""Changes whenever a scan finds out something else about the same image. Results of other versions are not used."""
PART_IMAGES: Final = 128
FEW: Final = 64
"""The number of new images up to which this process scans them itself, because starting others takes seconds."""
INDEX, FACES, PARTS, TABLE = "index", "faces", "parts", "table-"


@dataclass(frozen=True)
class ScanSettings:
    """What a scan needs to know to scan an image. All of it is the same for every worker.

    `addresses` are the sources. `folder` is the scan's own folder, `artifact` that of the model. Images whose shorter
    side is less than `min_side` pixels are problems. If `faces` is set, faces are hidden when an image is read.
    """

    addresses: tuple[str, ...]
    folder: Path
    artifact: Path
    pooling: Pooling
    min_side: int
    faces: FaceSettings | None = None

    def reader(self) -> Reader:
        """Return a reader of the sources.

        Raises:
            ValueError: faces are to be hidden, and the detector is not installed.
        """
        if self.faces is None:
            return Reader(self.addresses, self.folder / INDEX)
        folder = self.folder / FACES / digest_of(repr(self.faces))[:16]
        return Reader(self.addresses, self.folder / INDEX, HiddenFaces(folder, self.faces))

    def signature(self) -> str:
        """Return a sha256 of all that decides what is found out about an image.

        Raises:
            ValueError: the artifact cannot be used.
        """
        fingerprint = read_manifest(self.artifact).fingerprint
        faces = None if self.faces is None else repr(self.faces)
        return digest_of(VERSION, fingerprint, self.pooling, str(self.min_side), faces, *MEASURES)


@dataclass(frozen=True)
class Item:
    """One image to scan: where it is, and the version of its file.

    `known` is the row of the image in the last table if its file has not changed since, otherwise None.
    """

    location: Location
    version: str
    known: int | None = None


@dataclass(frozen=True)
class Part:
    """Some images that are scanned by one worker, the name of their file, and the folder of the last table, if any."""

    name: str
    items: tuple[Item, ...]
    table: Path | None


class Scanner:
    """Scans the images of parts. The model and the last table are opened when they are first needed."""

    def __init__(self, settings: ScanSettings) -> None:
        self._settings = settings
        self._reader = settings.reader()
        self._embedder: Embedder | None = None
        self._last: tuple[Path, _Known] | None = None

    def __call__(self, part: Part) -> tuple[str, int, bytes]:
        """Scan a part. Return its name, its number of images, and its Parquet file.

        Raises:
            ValueError: a source or the model cannot be used.
            OSError: a server or a disk failed. The message names the image.
        """
        known = self._known(part.table)
        rows = [self._row(item, known) for item in part.items]
        return part.name, len(rows), part_bytes(rows)

    def _known(self, table: Path | None) -> "_Known | None":
        if table is None:
            return None
        if self._last is None or self._last[0] != table:
            self._last = table, _Known(read_images(table))
        return self._last[1]

    def _row(self, item: Item, known: "_Known | None") -> Row:
        key, version = item.location.key, item.version
        if item.known is not None:
            assert known is not None
            return Row(key, version, found_in(known.images, item.known))
        try:
            data = self._reader.encoded(item.location)
            sha256 = hashlib.sha256(data).digest()
            if known is not None and (row := known.row_of(sha256)) is not None:
                return Row(key, version, found_in(known.images, row))
            return Row(key, version, self._scan(data, sha256))
        except ValueError as error:
            return Row(key, version, None, str(error))

    def _scan(self, data: bytes, sha256: bytes) -> Found:
        """Decode an image and return what is found out about it.

        Raises:
            ValueError: the image cannot be used.
        """
        stored = decode_stored(data, LIMITS)
        image = upright(stored.rgb, stored.orientation)
        pixels = np.ascontiguousarray(image)
        height, width = pixels.shape[:2]
        if min(height, width) < self._settings.min_side:
            raise ValueError(
                f"the image is {width} x {height}: its shorter side must have at least {self._settings.min_side} pixels"
            )
        gray = np.asarray(image.convert("L"))
        return Found(
            sha256=sha256,
            pixels_sha256=pixels_digest(pixels),
            phash=perceptual_hash(gray),
            width=width,
            height=height,
            n_bytes=len(data),
            measures=measure(pixels, stored.mode, image, gray),
            embedding=self._model()(pixels),
        )

    def _model(self) -> Embedder:
        """Return the model.

        Raises:
            OSError: the model cannot be used. It is no ValueError, which would be a problem of one image.
        """
        if self._embedder is None:
            settings = self._settings
            try:
                self._embedder = Embedder(settings.artifact, settings.pooling, settings.folder)
            except ValueError as error:
                raise OSError(f"the model cannot be used: {error}") from error
        return self._embedder


def pixels_digest(pixels: Pixels) -> bytes:
    """Return the sha256 of the height, the width and the pixels of an upright RGB image [height, width, 3]."""
    digest = hashlib.sha256(np.array(pixels.shape[:2], "<u4").tobytes())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


class _Known:
    """The last table, in which images are found by the digest of their bytes."""

    def __init__(self, images: Images) -> None:
        self.images = images
        starts = np.ascontiguousarray(images.sha256[:, :8]).view(">u8").ravel()
        self._order = np.argsort(starts, kind="stable")
        self._starts: npt.NDArray[np.uint64] = starts[self._order].astype(np.uint64)

    def row_of(self, sha256: bytes) -> int | None:
        """Return the row of an image with this digest, or None."""
        start = np.uint64(int.from_bytes(sha256[:8], "big"))
        at = int(np.searchsorted(self._starts, start))
        while at < len(self._starts) and self._starts[at] == start:
            row = int(self._order[at])
            if self.images.sha256[row].tobytes() == sha256:
                return row
            at += 1
        return None


@dataclass(frozen=True)
class Scanned:
    """A finished scan: the folder and the digest of its table, its images, and a reader for their files.

    `is_new` says whether this run has made the table, and `n_read` is the number of images whose files it has read.
    """

    folder: Path
    digest: str
    images: Images
    listing: Listing
    reader: Reader
    is_new: bool
    n_read: int

    def location(self, index: int) -> Location:
        """Return where an image is."""
        return self.listing.location(bisect_left(self.listing.key, self.images.key[index]))

    def encoded(self, index: int) -> bytes:
        """Return the bytes of the file of an image.

        Raises:
            OSError: the file cannot be read, or its content is no longer what was scanned.
        """
        key = self.images.key[index]
        try:
            data = self.reader.encoded(self.location(index))
        except ValueError as error:
            raise gone(key, error) from error
        if hashlib.sha256(data).digest() != self.images.sha256[index].tobytes():
            raise OSError(f"{key} {CHANGED}")
        return data

    def pixels(self, index: int) -> Pixels:
        """Return an image, upright: RGB uint8 [height, width, 3].

        Raises:
            OSError: as in `encoded`.
        """
        return decode(self.encoded(index))


def scan(settings: ScanSettings, run_all: RunAll, track: Track, what: str) -> Scanned:
    """Scan all images of the sources, or what is missing of a scan that has begun, and return the result.

    Args:
        settings: the settings of the scan.
        run_all: the workers.
        track: shows the progress.
        what: what is scanned, for the progress.

    Raises:
        ValueError: a source or the model cannot be used, or none of the images can be used.
        OSError: a server or a disk failed, or a worker was killed. Finished parts are kept.
    """
    (settings.folder / PARTS).mkdir(parents=True, exist_ok=True)
    for unfinished in settings.folder.glob(f".{TABLE}*"):
        shutil.rmtree(unfinished)
    reader = settings.reader()
    listing = list_sources(reader.sources)
    signature = settings.signature()
    inputs = digest_of(signature, *listing.key, *listing.label, *listing.version, *chain(*listing.unlisted))
    table = settings.folder / f"{TABLE}{inputs[:32]}"
    n_read, is_new = 0, not table.exists()
    if is_new:
        names = [_part_name(signature, listing, rows) for rows in _part_rows(listing)]
        files = [settings.folder / PARTS / f"{name}.parquet" for name in names]
        missing = _missing(settings, listing, signature, files)
        n_read = sum(item.known is None for part in missing for item in part.items)
        is_known = all(part.table is not None for part in missing)
        workers = Workers(1) if is_known and n_read <= FEW else run_all
        _scan_parts(settings, workers, track(what, sum(len(part.items) for part in missing)), missing)
        write_table(table, files, listing, {"signature": signature})
        _clear(settings.folder, table, set(names))
    images = read_images(table)
    if not len(images):
        key, problem = read_problems(table)[0]
        raise ValueError(f"none of {len(listing)} images can be used; the first: {key}: {problem}")
    return Scanned(table, read_facts(table)["digest"], images, listing, reader, is_new, n_read)


def _scan_parts(
    settings: ScanSettings,
    run_all: RunAll,
    tracked: AbstractContextManager[Callable[[int], object]],
    missing: Sequence[Part],
) -> None:
    """Scan parts and store them."""
    with tracked as advance:
        results: Iterator[Any] = run_all(partial(Scanner, settings), missing)
        for name, count, content in results:
            write_bytes(settings.folder / PARTS / f"{name}.parquet", content)
            advance(count)


def _part_rows(listing: Listing) -> list[range]:
    return [range(start, min(start + PART_IMAGES, len(listing))) for start in range(0, len(listing), PART_IMAGES)]


def _part_name(signature: str, listing: Listing, rows: range) -> str:
    part = slice(rows.start, rows.stop)
    return f"{rows.start // PART_IMAGES:06d}-{digest_of(signature, *listing.key[part], *listing.version[part])[:32]}"


def _missing(settings: ScanSettings, listing: Listing, signature: str, files: Sequence[Path]) -> list[Part]:
    """Return the parts that are not stored yet."""
    missing = [(rows, file) for rows, file in zip(_part_rows(listing), files, strict=True) if not file.exists()]
    if not missing:
        return []
    table = _last_table(settings.folder, signature)
    versions = {} if table is None else read_versions(table)

    def item(row: int) -> Item:
        version, known_row = versions.get(listing.key[row], (None, None))
        same = version == listing.version[row]
        return Item(listing.location(row), listing.version[row], known_row if same else None)

    return [Part(file.stem, tuple(item(row) for row in rows), table) for rows, file in missing]


def _last_table(folder: Path, signature: str) -> Path | None:
    """Return the folder of the table of an earlier scan with the same settings, if there is one."""
    for table in sorted(folder.glob(f"{TABLE}*")):
        if read_facts(table)["signature"] == signature:
            return table
    return None


def _clear(folder: Path, table: Path, names: Collection[str]) -> None:
    """Delete the tables of earlier scans, and the parts with other names."""
    for old in folder.glob(f"{TABLE}*"):
        if old != table:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}")))
    for part in (folder / PARTS).glob("*.parquet"):
        if part.stem not in names:
            part.unlink()

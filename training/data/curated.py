"""Datasets that `dinov2 curate` has written: their description, the check of their files, and lists as sources.

A dataset is a folder with the file `curation.json`. Its images are either in tar shards, which are read like all others
(`training/data/shards.py`), or they stay where they were, and the dataset has only lists of them. In both cases
`curation.json` has the digest of the images, which becomes part of the provenance of a run.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from training.data.dataset import Classes, Indices, Skipped, Source

CURATION: Final = "curation.json"
STAGING: Final = ".writing"
"""Folder in a dataset's folder in which its files are written before all of them get their final names."""

FORMAT: Final = "dinov2-curation-1"
PARTS: Final = ("train", "val")
LIST_SUFFIX: Final = ".jsonl"


@dataclass(frozen=True)
class Curation:
    """The content of `curation.json`.

    `form` is `shards` or `list`. `files` describes the shards or lists: for each its name, its size in bytes, its
    sha256 and its number of images. `extras` are the names of the other files. `sources` are the addresses of the
    images of a list, in the order of the numbers with which the keys begin. `digests` contains the digests of all
    images and of each part, and `counts` the numbers of images of each part.
    """

    form: str
    files: Sequence[Mapping[str, Any]]
    extras: Sequence[str]
    sources: Sequence[str]
    digests: Mapping[str, str]  # "all", "train", "val" -> sha256
    counts: Mapping[str, int]  # "train", "val" -> number of images


def read_curation(folder: Path) -> Curation | None:
    """Return the description of the dataset in a folder, or None if the folder has no `curation.json` of this program.

    Raises:
        ValueError: the file is damaged, or was written by another version of this program.
    """
    path = folder / CURATION
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return parse_curation(data, str(path))


def parse_curation(data: bytes, name: str) -> Curation | None:
    """Return the content of a `curation.json`, or None if it is not of this program. `name` is its path or URL.

    Raises:
        ValueError: see `read_curation`.
    """
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    if not isinstance(content, dict) or not str(content.get("format")).startswith("dinov2-curation-"):
        return None
    if content["format"] != FORMAT:
        raise ValueError(f"{name} has the format {content['format']}, but this version reads only {FORMAT}")
    try:
        fields = ("form", "files", "extras", "sources", "digests", "counts")
        return Curation(*(content[field] for field in fields))
    except KeyError as error:
        raise ValueError(f"{name} is damaged: it has no {error}") from error


def open_curation(folder: Path) -> Curation | None:
    """Return the description of the dataset in a folder after a check that its files are complete.

    The check compares the sizes of the files, so a changed file of equal size is not noticed. Return None if the folder
    is not a dataset that `dinov2 curate` has written.

    Raises:
        ValueError: the dataset is being written, or a file is missing or has another size.
    """
    if (folder / STAGING / CURATION).exists():
        raise ValueError(f"{folder} is not completely written; run the same `dinov2 curate` again to complete it")
    curation = read_curation(folder)
    if curation is None:
        return None
    for file in curation.files:
        path = folder / file["name"]
        n_bytes = path.stat().st_size if path.is_file() else None
        if n_bytes != file["bytes"]:
            has = "is missing" if n_bytes is None else f"has {n_bytes:,} bytes"
            raise ValueError(
                f"{path} {has}, but {CURATION} says {file['bytes']:,} bytes; run `dinov2 curate` again, or copy the "
                "dataset again"
            )
    return curation


# Lists


class ListSource:
    """A source of the images in the lists `train.jsonl` and `val.jsonl` of a dataset. The images are in other sources.

    The name of an image is its key: the number of its source, counted from 1, a slash, and its name in that source. An
    image is used only if its bytes are those that were curated.

    Args:
        folder: the folder of the dataset.
        curation: its description.
        open_source: opens a source by its address.

    Raises:
        ValueError: a list is damaged, a source cannot be opened, or an image is no longer in its source.
    """

    skipped: Sequence[Skipped] = ()
    ignored: Mapping[str, int] = {}

    def __init__(self, folder: Path, curation: Curation, open_source: Callable[[str], Source]) -> None:
        rows: list[_Row] = []
        self.parts: Mapping[str, Indices] = {}
        for part in PARTS:
            if curation.counts[part]:
                rows += _read_list(folder / f"{part}{LIST_SUFFIX}")
        if curation.counts["val"]:
            n_train = curation.counts["train"]
            self.parts = {"train": np.arange(n_train), "val": np.arange(n_train, len(rows))}
        self._rows = rows
        self._sources = [open_source(address) for address in curation.sources]
        self._places = self._located(folder)

    def _located(self, folder: Path) -> Indices:
        """Return for each image the number of its source, counted from 0, and its number in this source, [n, 2]."""
        wanted = {row.key: index for index, row in enumerate(self._rows)}
        places = np.full((len(self._rows), 2), -1, np.int64)
        for number, source in enumerate(self._sources):
            for own in range(len(source)):
                index = wanted.get(f"{number + 1}/{source.name(own)}")
                if index is not None:
                    places[index] = number, own
        missing = np.flatnonzero(places[:, 0] < 0)
        if len(missing):
            raise ValueError(
                f"{len(missing):,} of {len(places):,} images of the list in {folder} are no longer in their sources: "
                f"{self._rows[missing[0]].key}; run `dinov2 curate` again"
            )
        return places

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return self._rows[index].key

    def label(self, index: int) -> str | None:
        return self._rows[index].label

    def classes(self) -> Classes:
        """Return the classes of all images. They are the labels in the lists."""
        numbers: dict[str, int] = {}
        of_image = [-1 if not row.label else numbers.setdefault(row.label, len(numbers)) for row in self._rows]
        return Classes(np.array(of_image, np.int32), list(numbers))

    def encoded(self, index: int) -> bytes:
        """Return the bytes of an image's file.

        Raises:
            ValueError: the image cannot be read, or it has changed since it was curated.
            OSError: the server or the disk failed.
        """
        number, own = self._places[index].tolist()
        data = self._sources[number].encoded(own)
        if hashlib.sha256(data).hexdigest() != self._rows[index].sha256.hex():
            raise ValueError("the file has changed since it was curated")
        return data

    def fingerprint(self, index: int) -> str:
        """Return the sha256 of the image, which its list contains."""
        return self._rows[index].sha256.hex()

    def version(self, index: int) -> str:
        """Return the sha256 of the image, which its list contains."""
        return self._rows[index].sha256.hex()


class _Row(NamedTuple):
    key: str
    sha256: bytes
    label: str | None


def _read_list(path: Path) -> list[_Row]:
    rows, labels = [], dict[str, str]()
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                label = row["label"]
                label = None if label is None else labels.setdefault(label, label)  # one string for all of its images
                rows.append(_Row(row["key"], bytes.fromhex(row["sha256"]), label))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__} {error}") from error
    return rows

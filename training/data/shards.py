"""Tar shards (WebDataset's format) as a source of numbered images.

A tar file has no table of contents, so this module makes an index of each shard: the names, offsets and labels of its
images. `tarfile` finds the images by jumping from header to header. A remote shard is read in blocks of 4 MiB, and
blocks without a header are skipped. The index is stored in the run's folder. With it, an image is one range of bytes in
one file, so a run can read images in any order. A loader that reads shards from start to end could only shuffle within
a buffer.

In WebDataset (https://github.com/webdataset/webdataset), members with the same path up to the first dot of the file
name form one sample. Here each image of a sample is a separate image of the source. Its label is the content of the
sample's `.cls` member. If file names contain further dots, such as `img.0001.jpg` and `img.0002.jpg`, all of them would
belong to the sample `img`. So if several `.cls` members match, the one that shares the longest name with the image is
used: `img.0001.cls` for `img.0001.jpg`. If there is no `.cls` member, the label is the name of the folder that contains
the image.

If a shard is truncated, its complete images are used, and `skipped` says that it is truncated.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from model.files import replacing
from model.folder import HEAD_BYTES, HELD_OUT, HIDDEN, TRAIN, ignored_as, printable, sample_names, split_names
from training.data.blobs import Blob, LocalBlob, MemoryBlob
from training.data.dataset import MAX_BYTES, Classes, Indices, Skipped, joined_classes

COMPRESSED = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
"""The suffixes of compressed tars, and the commands that unpack them."""

MAX_UNPACKED = 2**30
"""The maximum size in bytes, packed and unpacked, of a compressed tar. It is unpacked into memory for random access."""

READ_AHEAD_REMOTE, READ_AHEAD_LOCAL = 4 * 2**20, 2**10
"""The number of bytes that are read at once when headers are read. For a remote shard, a request takes as long as the
transfer of a few MiB. For a local shard, one read covers a header and a `.cls` member."""

MAX_HEADER = 2**20
"""The maximum number of bytes of one read by tarfile. A damaged header may give any length for a long name."""

MAX_LABEL = 256
LABEL = ".cls"
INDEX_VERSION = 3
BLOCK = 512


class _Reader(io.RawIOBase):
    """A file object through which Python's `tarfile` reads a shard.

    It reads the shard in blocks, and keeps the block that it read last in memory.
    """

    def __init__(self, blob: Blob, ahead: int) -> None:
        self._blob, self._ahead, self._at = blob, ahead, 0
        self._start, self._held = 0, b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        end = min(self._at + size, self._blob.size)
        if end <= self._at:
            return b""
        if not self._start <= self._at <= end <= self._start + len(self._held):
            length = min(max(self._ahead, size), self._blob.size - self._at)
            self._start, self._held = self._at, self._blob.read(self._at, length)
        data = self._held[self._at - self._start : end - self._start]
        self._at = end
        return data


@dataclass(frozen=True)
class Names:
    """A sequence of strings, stored in one buffer. A list of a million names would take 100 MB."""

    text: bytes  # the strings in UTF-8, one after the other
    ends: Indices  # [n] the position in `text` where each string ends

    @classmethod
    def of(cls, names: Sequence[str]) -> "Names":
        encoded = [name.encode() for name in names]
        return cls(b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].decode()


@dataclass(frozen=True)
class ShardIndex:
    """The index of the n images of one shard: their names, the positions of their bytes, and their labels.

    A label is a number in `classes`, or -1 for an image without a label. `skipped` lists the members that cannot be
    used, and `ignored` counts the members that are not images, by kind.
    """

    names: Names
    offsets: Indices  # [n] bytes from the shard's start
    sizes: Indices  # [n] bytes
    labels: Indices  # [n] numbers in `classes`, or -1
    classes: list[str]
    skipped: list[Skipped]
    ignored: dict[str, int]


def common_folder(names: Sequence[str]) -> int:
    """Return the length of the longest folder path with which all names start, including its final slash."""
    first, last = min(names, default=""), max(names, default="")
    differ = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first.rfind("/", 0, differ) + 1


def _members(reader: _Reader, size: int, problems: list[str]) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a shard of `size` bytes, up to the first unreadable one.

    If the shard is damaged or truncated, the reason is appended to `problems`.
    """
    try:
        with tarfile.open(fileobj=cast(IO[bytes], reader), mode="r:", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would store all members, 1 kB each
                yield member
            reader.seek(tar.offset)
    except tarfile.ReadError as error:
        problems.append(f"not a tar, or damaged, or truncated: {error}")
        return
    # tarfile treats a damaged header as the end of the tar, unless it is the first header.
    end = reader.read(BLOCK)
    if len(end) < BLOCK:
        problems.append("the zeros at the end of the tar are missing, so it may be truncated")
    elif any(end):
        problems.append(f"damaged at byte {reader.tell() - BLOCK} of {size}; the rest cannot be read")


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0].rpartition("/")[2]


def index_shard(blob: Blob, shard: str) -> ShardIndex:
    """Make the index of a shard by reading its headers, and return it.

    Args:
        blob: the shard's file.
        shard: the shard's name, which is used in the list of skipped members.

    Raises:
        OSError: the server or the disk failed.
    """
    reader = _Reader(blob, READ_AHEAD_LOCAL if isinstance(blob, LocalBlob | MemoryBlob) else READ_AHEAD_REMOTE)
    images: list[tuple[str, int, int]] = []
    labels_by_name: dict[str, str] = {}
    problems: list[str] = []
    skipped: list[Skipped] = []
    ignored: Counter[str] = Counter()
    for member in _members(reader, blob.size, problems):
        name = printable(member.name.removeprefix("./").lstrip("/"))
        if member.isdir():
            continue
        kind = _ignored_as(reader, member, name)
        if kind is not None:
            ignored[kind] += 1
        cut = member.offset_data + member.size > blob.size
        if kind not in (None, LABEL):
            continue
        if ".." in name.split("/"):
            skipped.append(Skipped(f"{shard}/{name}", "its name contains .., which leads out of its folder"))
        elif not member.isreg() or member.issparse():
            skipped.append(
                Skipped(f"{shard}/{name}", "a link or a sparse file: its bytes are not one range of the shard")
            )
        elif cut:
            skipped.append(Skipped(f"{shard}/{name}", f"truncated: the shard ends inside it, at byte {blob.size}"))
        elif kind is None:
            images.append((name, member.offset_data, member.size))
        elif member.size <= MAX_LABEL:
            reader.seek(member.offset_data)
            label = reader.read(member.size).decode(errors="replace").strip()
            labels_by_name[name[: -len(LABEL)]] = label
    skipped += [Skipped(shard, problem) for problem in problems]
    labels = [_label_of(name, labels_by_name) for name, _, _ in images]
    classes = sorted({label for label in labels if label})
    numbers = {label: number for number, label in enumerate(classes)}
    return ShardIndex(
        Names.of([name for name, _, _ in images]),
        np.array([offset for _, offset, _ in images], np.int64),
        np.array([size for _, _, size in images], np.int64),
        np.array([numbers.get(label, -1) for label in labels], np.int64),
        classes,
        skipped,
        dict(ignored),
    )


def _ignored_as(reader: _Reader, member: tarfile.TarInfo, name: str) -> str | None:
    """Return the kind under which a member is ignored, or None if it is an image (see `model.folder.ignored_as`)."""

    def head() -> bytes:
        reader.seek(member.offset_data)
        return reader.read(min(member.size, HEAD_BYTES)) if member.isreg() else b""

    if any(part.startswith(".") and part != ".." for part in name.split("/")):
        return HIDDEN
    return ignored_as(name.rpartition("/")[2], head)


def _label_of(name: str, labels_by_name: Mapping[str, str]) -> str:
    """Return the label of an image: the content of its `.cls` member, or else the name of the folder that contains it.

    The name of the `.cls` member, without its suffix, is the longest of `sample_names(name)` that exists.
    """
    labels = (labels_by_name.get(other) for other in sample_names(name))
    return next((label for label in labels if label), None) or _folder_of(name)


# The index on disk


def _index_path(blob: Blob, index_dir: Path) -> Path:
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in printable(blob.url.rpartition("/")[2]))[:80]
    url = os.path.abspath(blob.url) if "://" not in blob.url else blob.url
    return index_dir / f"{stem}-{hashlib.sha256(os.fsencode(url)).hexdigest()[:12]}.npz"


def _identity(blob: Blob, shard: str) -> list[object]:
    return [INDEX_VERSION, shard, blob.size, blob.version]


def _saved(path: Path, identity: list[object]) -> ShardIndex | None:
    """Load the index that is stored at `path`.

    Return None if the file is missing or damaged, or if its index is for another `identity` (a shard's name, size and
    version).
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            facts = json.loads(bytes(file["facts"]))
            if facts["identity"] != identity:
                return None
            names = Names(bytes(file["names"]), file["ends"])
            skipped = [Skipped(*item) for item in facts["skipped"]]
            columns = (file["offsets"], file["sizes"], file["labels"])
            return ShardIndex(names, *columns, facts["classes"], skipped, facts["ignored"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _save(path: Path, identity: list[object], index: ShardIndex) -> None:
    facts = {
        "identity": identity,
        "classes": index.classes,
        "skipped": [[s.name, s.reason] for s in index.skipped],
        "ignored": index.ignored,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
        "names": np.frombuffer(index.names.text, np.uint8),
        "ends": index.names.ends,
        "offsets": index.offsets,
        "sizes": index.sizes,
        "labels": index.labels,
    }
    with replacing(path) as temporary, temporary.open("wb") as file:  # two ranks may both write it, with equal content
        np.savez(file, allow_pickle=False, **arrays)


def load_index(blob: Blob, shard: str, index_dir: Path) -> ShardIndex:
    """Return the index of a shard. If `index_dir` does not contain the current index, make it and store it there.

    An index is no longer current if the shard's size or version has changed. If the shard is in memory, its index is
    always made and never stored.

    Raises:
        OSError: the server or the disk failed, or the index cannot be written.
    """
    if isinstance(blob, MemoryBlob):
        return index_shard(blob, shard)
    path, identity = _index_path(blob, index_dir), _identity(blob, shard)
    index = _saved(path, identity)
    if index is None:
        index = index_shard(blob, shard)
        _save(path, identity, index)
    return index


def is_compressed(name: str) -> bool:
    """Return whether a file name ends in a suffix of a compressed tar, such as `.gz`."""
    return os.path.splitext(name)[1].lower() in COMPRESSED


def _opener(suffix: str) -> Callable[[IO[bytes]], IO[bytes]]:
    return cast(Callable[[IO[bytes]], IO[bytes]], {".bz2": bz2.open, ".xz": lzma.open}.get(suffix, gzip.open))


def unpacked(blob: Blob) -> MemoryBlob:
    """Unpack a compressed tar, and return it as a file in memory.

    Raises:
        ValueError: the file is too large or damaged, or Python does not support its compression.
        OSError: the server or the disk failed.
    """
    suffix = os.path.splitext(blob.url)[1].lower()
    advice = f"unpack it ({COMPRESSED[suffix]}): a compressed tar has no random access"
    if suffix == ".zst":
        raise ValueError(f"{blob.url}: {advice}")
    if blob.size > MAX_UNPACKED:
        raise ValueError(f"{blob.url} has {blob.size} bytes; {advice}, and only small ones are unpacked in memory")
    packed = io.BytesIO(blob.read(0, blob.size))
    try:
        with _opener(suffix)(packed) as file:
            data = file.read(MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{blob.url} cannot be unpacked: {error}") from error
    if len(data) > MAX_UNPACKED:
        raise ValueError(f"{blob.url} unpacks to more than {MAX_UNPACKED} bytes; {advice}")
    return MemoryBlob(blob.url, data)


# The source


def _word(shard: str) -> str | None:
    """Return the word in a shard's path that names a part of a data set, such as `train` or `val`, in lower case.

    Words are separated by slashes, dashes, underscores and dots. `test` counts only if there is no other such word,
    because folders are often called `test`. Return None if there is no such word, or more than one.
    """
    words = set(re.split(r"[-/_.]", shard.lower())) & {TRAIN, *HELD_OUT}
    if len(words) > 1:
        words.discard("test")
    return words.pop() if len(words) == 1 else None


class TarSource:
    """A source of the images in tar shards, in the order of the shards and of their members.

    The name of an image is `shard/member`. If the paths of some shards contain the word `train` and those of others a
    word for held-out data, such as `val` (`model.folder.HELD_OUT`), these words divide the images into train and val
    (`parts`). Otherwise, folders with such names inside the shards divide the images. In the images' paths, these
    folders must directly follow the folders that all paths have in common.
    """

    def __init__(
        self, shards: Sequence[tuple[str, Blob, ShardIndex]], ignored: Mapping[str, int] | None = None
    ) -> None:
        self._shards = list(shards)
        self._ends = np.cumsum([len(index.names) for _, _, index in shards], dtype=np.int64)
        self.skipped: Sequence[Skipped] = [s for _, _, index in shards for s in index.skipped]
        self.ignored = sum((Counter(index.ignored) for _, _, index in shards), Counter(ignored))
        self.parts: Mapping[str, Indices] = self._parts()

    def _parts(self) -> dict[str, Indices]:
        words = [_word(shard) for shard, _, _ in self._shards]
        if (two := split_names(word for word in words if word is not None)) is not None:
            of_item = np.repeat([str(word) for word in words], [len(index.names) for _, _, index in self._shards])
        else:
            names = [name for _, _, index in self._shards for name in (index.names[i] for i in range(len(index.names)))]
            start = common_folder(names)
            of_item = np.array([name[start:].partition("/")[0] for name in names])
            two = split_names(set(of_item.tolist()))
        if two is None:
            return {}
        parts = {part: np.flatnonzero(of_item == name) for part, name in zip(("train", "val"), two, strict=True)}
        return parts if all(len(part) for part in parts.values()) else {}

    def _find(self, index: int) -> tuple[str, Blob, ShardIndex, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return *self._shards[number], index - (int(self._ends[number - 1]) if number else 0)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, index: int) -> str:
        shard, _, table, i = self._find(index)
        return f"{shard}/{table.names[i]}"

    def label(self, index: int) -> str | None:
        _, _, table, i = self._find(index)
        return table.classes[table.labels[i]] if table.labels[i] >= 0 else None

    def classes(self) -> Classes:
        return joined_classes([Classes(index.labels.astype(np.int32), index.classes) for _, _, index in self._shards])

    def encoded(self, index: int) -> bytes:
        """Return the bytes of an image's encoded file.

        Raises:
            ValueError: the image has more than `MAX_BYTES` bytes.
            OSError: the server or the disk failed, or the shard has changed.
        """
        _, blob, table, i = self._find(index)
        size = int(table.sizes[i])
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes: more than the limit of {MAX_BYTES} for an image")
        return blob.read(int(table.offsets[i]), size)

    def fingerprint(self, index: int) -> str:
        _, _, table, i = self._find(index)
        return str(table.sizes[i])

    def version(self, index: int) -> str:
        _, blob, table, i = self._find(index)
        return f"{table.sizes[i]} {blob.size} {blob.version}"

"""Divide images into tar shards in WebDataset's format, and write a shard. Equal images give equal bytes."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal, cast

import numpy as np

from model.decode import sniff
from training.curate.listing import CHANGED
from training.curate.table import Images, Indices
from training.data.shards import LABEL, MAX_LABEL

SUFFIXES: Final = {"JPEG": "jpg", "TIFF": "tif"}
"""The suffixes of image formats that are not the format's name in lower case."""

SAMPLE_DIGITS: Final = 20

ReadBytes = Callable[[int], bytes]


@dataclass(frozen=True)
class WriteSettings:
    """How a dataset is written.

    `form` is `shards` (tar shards in WebDataset's format) or `list` (lists of images that stay where they are). A shard
    has at most `shard_images` images, and at most `shard_bytes` bytes of images unless a single image is larger.
    `name`, `description` and `license` describe the dataset in `croissant.json`.

    Raises:
        ValueError: `form` is unknown, or a maximum is less than 1.
    """

    form: Literal["shards", "list"] = "shards"
    shard_images: int = 10_000
    shard_bytes: int = 2**30
    name: str = "curated-images"
    description: str = "Images that dinov2 curate has selected."
    license: str = ""

    def __post_init__(self) -> None:
        if self.form not in ("shards", "list"):
            raise ValueError(f"form={self.form!r} must be shards or list")
        for name in ("shard_images", "shard_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Shard:
    """A shard that is to be written: its name, the numbers of its images, and a digest of what will be in it."""

    name: str
    indices: Indices
    digest: str


def sample_name(key: str) -> str:
    """Return the name of an image's sample in a shard, without suffix: the first digits of the key's sha256.

    Keys themselves are not used. WebDataset ends a sample's name at the first dot, and a folder in the name would
    become the class of an image without a class. Because the images of a shard are in the order of these names,
    programs that read shards from start to end do not get one class after the other.
    """
    return hashlib.sha256(key.encode()).hexdigest()[:SAMPLE_DIGITS]


def plan_shards(images: Images, indices: Indices, part: str, settings: WriteSettings) -> list[Shard]:
    """Divide images into shards, and return the shards.

    A shard is a range of keys. It ends at an image whose key has a digest below a certain value, or when it is full. So
    if an image is added or removed, the shards that follow do not change, except up to the next such image.

    Raises:
        ValueError: the label of an image is too long for a shard.
    """
    shards: list[Shard] = []
    chunk: list[int] = []
    n_bytes = 0

    def close() -> None:
        digest = hashlib.sha256()
        for index in chunk:
            line = [images.key[index], images.sha256[index].tobytes().hex(), images.label[index]]
            digest.update(json.dumps(line).encode())
        name = f"{part}-{len(shards):06d}.tar"
        shards.append(Shard(name, np.array(chunk, np.int64), digest.hexdigest()))

    for index in indices.tolist():
        label, size = images.label[index], int(images.n_bytes[index])
        if label is not None and len(label.encode()) > MAX_LABEL:
            raise ValueError(f"the label of {images.key[index]} has more than {MAX_LABEL} bytes: {label[:60]}...")
        if chunk and (len(chunk) == settings.shard_images or n_bytes + size > settings.shard_bytes):
            close()
            chunk, n_bytes = [], 0
        chunk.append(index)
        n_bytes += size
        ends = 2 * max(1 / settings.shard_images, size / settings.shard_bytes)  # so shards are half full on average
        if int(sample_name(images.key[index])[:12], 16) / 16**12 < ends:
            close()
            chunk, n_bytes = [], 0
    if chunk:
        close()
    return shards


# Tar files


class _Hashed:
    """A file that is written from start to end, of which the sha256 is computed at the same time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member to a tar. Its metadata is always the same: read by everyone, time 0, owner 0."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))
    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would store all members


def _suffix(key: str, data: bytes) -> str:
    name = sniff(data[:256])
    if name is None:
        raise ValueError(f"{key} is no longer an image")
    return SUFFIXES.get(name, name.lower())


def read_same(images: Images, index: int, read_bytes: ReadBytes) -> bytes:
    """Read the bytes of an image, and return them if they are those that were scanned.

    Raises:
        ValueError: the image cannot be read, or it has changed since the scan.
        OSError: the server or the disk failed.
    """
    data = read_bytes(index)
    if hashlib.sha256(data).digest() != images.sha256[index].tobytes():
        raise ValueError(f"{images.key[index]} {CHANGED}")
    return data


def write_shard(path: Path, images: Images, indices: Indices, read_bytes: ReadBytes) -> str:
    """Write a tar shard, and return its sha256.

    Each image has the members NAME.jpg (or another suffix), NAME.cls with its label, if it has one, and NAME.json with
    its key, its sha256 and its size in pixels.

    Raises:
        ValueError: see `read_same`.
        OSError: the image cannot be read, or the shard cannot be written.
    """
    order = sorted(indices.tolist(), key=lambda index: sample_name(images.key[index]))
    with path.open("wb") as file:
        hashed = _Hashed(file)
        with tarfile.open(fileobj=cast(IO[bytes], hashed), mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index in order:
                key, data = images.key[index], read_same(images, index, read_bytes)
                name, label = sample_name(key), images.label[index]
                _add(tar, f"{name}.{_suffix(key, data)}", data)
                if label is not None:
                    _add(tar, name + LABEL, label.encode())
                facts = {
                    "key": key,
                    "sha256": images.sha256[index].tobytes().hex(),
                    "width": int(images.width[index]),
                    "height": int(images.height[index]),
                }
                _add(tar, f"{name}.json", (json.dumps(facts, ensure_ascii=False) + "\n").encode())
    return hashed.sha256.hexdigest()

"""Photos as training sees them: numbered items with a name, perhaps a label, and bytes that may be broken.

Three places hold them (`training/data/sources.py`): folders, tar shards, Hugging Face datasets. Whatever the place, an
item is encoded bytes. `model/decode.py` decodes them, so training sees the pixels that serving sees, and a hostile or
damaged file is a ValueError with a reason and never more.

Ten crops per image and epoch from JPEGs would decode each image again and again. An image is decoded once per step (or
once per run, where all fit into memory: `training/data/loader.py`) and squashed to a square, so that a batch is one
tensor; `aspect` keeps its shape (see `training/data/augment.py`).

Legend: n images, S side of the squares, b images of a step.
"""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from model.decode import PILLOW_MAX_PIXELS, DecodeLimits, Pixels, decode_stored, upright
from model.decode import decode as decode_image
from model.preprocess import PreprocessSpec, output_size

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})

MAX_BYTES = 256 * 2**20
"""Bytes of one encoded image. A larger file is not read into memory."""

LIMITS = DecodeLimits(max_bytes=MAX_BYTES, max_pixels=PILLOW_MAX_PIXELS)
"""What an image may cost: more than in serving, since a run's owner chose the images."""

DRAFT_MARGIN = 2
"""libjpeg may decode at 1/2, 1/4, 1/8 of a side, as long as this many times the square's side remain: the bicubic
resize then still averages over pixels, and the squares differ by about one of 255 levels."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Skipped:
    """What could not be read, and why."""

    name: str
    reason: str


class Source(Protocol):
    """A numbered collection of encoded images. All methods may be called from any thread.

    The order is a function of the data alone. `parts` holds the items' numbers by `train` and `val` where the data is
    already split so, and is empty where it is not. `skipped` lists what was known to be unreadable on opening; it has
    no number.
    """

    @property
    def parts(self) -> Mapping[str, Indices]: ...

    @property
    def skipped(self) -> Sequence[Skipped]: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Unique in the source, the same on every machine, printable."""

    def label(self, index: int) -> str | None: ...

    def encoded(self, index: int) -> bytes:
        """The image as its file has it.

        Raises:
            ValueError: this item is broken, and will be so tomorrow; the message says why.
            OSError: the place does not answer; nothing is known of the item.
        """

    def fingerprint(self, index: int) -> str:
        """What can be told of the content without reading it (its size in bytes)."""


@dataclass(frozen=True)
class Photo:
    """One item of a source: what the evaluation takes in the place of a path."""

    source: Source
    index: int

    @property
    def name(self) -> str:
        return self.source.name(self.index)

    @property
    def label(self) -> str | None:
        return self.source.label(self.index)

    def read(self) -> Pixels:
        """RGB uint8 [H, W, 3], upright; errors as `decode` and `Source.encoded`."""
        return decode(self.source.encoded(self.index))


class Subset:
    """Some items of a source, renumbered; itself a source."""

    parts: Mapping[str, Indices]

    def __init__(self, source: Source, indices: Indices) -> None:
        self._source, self._indices, self.parts = source, indices, {}

    @property
    def skipped(self) -> Sequence[Skipped]:
        """Those of the whole source."""
        return self._source.skipped

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def label(self, index: int) -> str | None:
        return self._source.label(int(self._indices[index]))

    def encoded(self, index: int) -> bytes:
        return self._source.encoded(int(self._indices[index]))

    def fingerprint(self, index: int) -> str:
        return self._source.fingerprint(int(self._indices[index]))


def photos_of(source: Source) -> list[Photo]:
    """The items of a source, as the evaluation takes them."""
    return [Photo(source, i) for i in range(len(source))]


def label_of(photo: Path | Photo) -> str:
    """Class of an image: its label, for a file the name of its folder.

    Raises:
        ValueError: it has none.
    """
    label = photo.parent.name if isinstance(photo, Path) else photo.label
    if label is None:
        raise ValueError(f"{photo.name} has no label")
    return label


# Reading


def decode(data: bytes) -> Pixels:
    """Decode an image as serving does, see `model.decode.decode`.

    Raises:
        ValueError: not a readable image, or one that is too large; the message says why.
    """
    return decode_image(data, LIMITS)


def squash(photo: Pixels, side: int) -> tuple[Pixels, float]:
    """An image [H, W, 3] as a square uint8 [3, side, side], bicubic, and its aspect (width / height).

    Raises:
        ValueError: a side of it is more than 100 times the other; what the evaluation refuses is nothing to train on.
    """
    height, width = photo.shape[:2]
    output_size(height, width, PreprocessSpec())
    return _channels_first(np.asarray(_square(Image.fromarray(photo), side))), width / height


def _square(photo: Image.Image, side: int, box: tuple[float, float, float, float] | None = None) -> Image.Image:
    return photo.resize((side, side), Image.Resampling.BICUBIC, box)


def _channels_first(square: Pixels) -> Pixels:
    return np.ascontiguousarray(square.transpose(2, 0, 1))


def decode_square(data: bytes, side: int) -> tuple[Pixels, float]:
    """`squash(decode(data), side)`, but a JPEG much larger than the square is decoded at a fraction of its size.

    The square then differs a little (`DRAFT_MARGIN`); it is the same on every call. An image that EXIF turns is turned
    as a square, which may round a value to its neighbour.

    Raises:
        ValueError: as `decode` and `squash`.
    """
    stored = decode_stored(data, LIMITS, least_side=DRAFT_MARGIN * side)
    # a fraction's sides are rounded up: the box says where the image ends within the last pixels
    square = upright(_square(stored.rgb, side, stored.box), stored.orientation)
    return _channels_first(np.asarray(square)), stored.aspect


def read_file(path: Path) -> bytes:
    """Content of an image's file.

    Raises:
        ValueError: no regular file, not there, not allowed to be read, or larger than `MAX_BYTES`.
        OSError: the disk or the system is at fault, not this file.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
            raise ValueError("not a regular file")
        if found.st_size > MAX_BYTES:
            raise ValueError(f"{found.st_size} bytes: more than the {MAX_BYTES} that an image may have")
        return path.read_bytes()
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error.strerror}") from error


def read_photo(photo: Path | Photo) -> Pixels:
    """RGB uint8 [H, W, 3], EXIF orientation applied.

    Raises:
        ValueError: not a readable image; the message says why.
    """
    return decode(read_file(photo)) if isinstance(photo, Path) else photo.read()


# Folders of files


def _walk(folder: str, above: frozenset[tuple[int, int]], suffixes: tuple[str, ...]) -> Iterator[str]:
    """Files below a folder in the order of their paths' parts. `above`: (device, inode) of the folders that lead here;
    a link to one of them is a loop."""
    here = os.stat(folder)
    above |= {(here.st_dev, here.st_ino)}
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        try:
            if entry.is_dir():
                target = entry.stat()
                if (target.st_dev, target.st_ino) not in above:
                    yield from _walk(entry.path, above, suffixes)
            elif entry.name.lower().endswith(suffixes) and entry.is_file():
                yield entry.path
        except PermissionError as error:
            raise ValueError(f"{entry.path} cannot be listed: {error.strerror}") from error
        except OSError as error:
            if not entry.is_symlink():  # a link that leads nowhere, or to itself, is no file
                raise ValueError(f"{entry.path} cannot be listed: {error.strerror}") from error


def walk_files(folder: Path, suffixes: frozenset[str]) -> Iterator[str]:
    """Files below `folder`, at any depth, whose lower-case names end so; sorted by the parts of their paths.

    Links are followed, but not to a folder that holds the link.

    Raises:
        ValueError: no such folder, or a part of it cannot be listed.
    """
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist or is no folder")
    above = [parent.stat() for parent in folder.resolve().parents]
    loops = frozenset((found.st_dev, found.st_ino) for found in above)
    return _walk(str(folder), loops, tuple(sorted(suffixes)))


def find_images(folder: Path) -> list[Path]:
    """All image files below `folder`, at any depth, sorted.

    Raises:
        ValueError: no such folder, a part of it that cannot be listed, or no image in it.
    """
    found = [Path(path) for path in walk_files(folder, SUFFIXES)]
    if not found:
        raise ValueError(f"no images below {folder}: looked for {', '.join(sorted(SUFFIXES))}")
    return found


# Splits and the order of a run


def _held_out(n_photos: int, share: float, seed: int) -> tuple[Indices, Indices]:
    """Numbers of the images to train on and of those held out, each ascending."""
    order = np.random.default_rng(seed).permutation(n_photos)
    n_held_out = int(n_photos * share)
    return np.sort(order[n_held_out:]), np.sort(order[:n_held_out])


def split_source(source: Source, held_out_share: float, seed: int) -> tuple[Subset, Subset]:
    """Photos to train on and images kept for the evaluation.

    Data with the parts `train` and `val` is taken at its word. Otherwise a share of all images, drawn with `seed`, is
    held out and never trained on.
    """
    if {"train", "val"} <= set(source.parts):
        return Subset(source, source.parts["train"]), Subset(source, source.parts["val"])
    train, held_out = _held_out(len(source), held_out_share, seed)
    return Subset(source, train), Subset(source, held_out)


@lru_cache(maxsize=2)  # the epoch at hand, and the next while images are read ahead
def _epoch_order(n_photos: int, seed: int, epoch: int) -> npt.NDArray[np.uint32]:
    return np.random.default_rng((seed, epoch)).permutation(n_photos).astype(np.uint32)


def batch_indices(n_photos: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The images [batch_size] of one step: a fresh permutation per epoch, the incomplete last batch dropped.

    A pure function of (seed, step), so a resumed run goes on with exactly the images that come next.

    Raises:
        ValueError: fewer images than a batch has.
    """
    if not 1 <= batch_size <= n_photos:
        raise ValueError(f"batch_size={batch_size} must be 1 to {n_photos}, the number of images")
    epoch, position = divmod(step, n_photos // batch_size)
    order = _epoch_order(n_photos, seed, epoch)
    return torch.from_numpy(order[position * batch_size : (position + 1) * batch_size].astype(np.int64))

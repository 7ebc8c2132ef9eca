"""Images for training. A source is a numbered collection of images, each with a name, an optional label and its bytes.

Sources are folders, tar shards or Hugging Face datasets (`training/data/sources.py`). The bytes of an image are those
of its encoded file, and they may be broken. `model/decode.py` decodes them, so training sees the same pixels as
serving. A hostile or damaged file causes nothing worse than a ValueError, which gives the reason.

If all images fit into memory, each image is decoded once per run. Otherwise an image is decoded again in each step that
uses it, and all its crops for that step are made from the result (`training/data/loader.py`). A decoded image is
squashed to a square, so that a batch is one tensor. Its original width / height is stored as its `aspect` (see
`training/data/augment.py`).
"""

import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from PIL import Image
from torch import Tensor

from model.decode import PILLOW_MAX_PIXELS, DecodeLimits, Pixels, decode_stored, upright
from model.decode import decode as decode_image
from model.folder import Listed, walk
from model.preprocess import PreprocessSpec, output_size

MAX_BYTES = 256 * 2**20
"""The maximum size of one encoded image in bytes. A larger file is not read into memory."""

LIMITS = DecodeLimits(max_bytes=MAX_BYTES, max_pixels=PILLOW_MAX_PIXELS)
"""The limits for decoding. They are higher than those of serving, because the owner of a run chose the images."""

DRAFT_MARGIN = 2
"""libjpeg may decode a JPEG at 1/2, 1/4 or 1/8 of its size, as long as each side keeps at least this many times the
square's side. The bicubic resize then still averages over pixels, and the squares change by about one of 255 levels."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Classes:
    """The classes of n images: for each image its number in `names`, or -1 if it has no class, int32 [n]."""

    numbers: npt.NDArray[np.int32]
    names: Sequence[str]

    def __getitem__(self, indices: Indices | slice) -> "Classes":
        return Classes(self.numbers[indices], self.names)


def joined_classes(parts: Sequence[Classes]) -> Classes:
    """Return the classes of all images of several parts, one part after the other. Classes with equal names are one."""
    known: dict[str, int] = {}
    numbers = [np.zeros(0, np.int32)]
    for part in parts:
        new = np.array([known.setdefault(name, len(known)) for name in part.names] + [-1], np.int32)
        numbers.append(new[part.numbers])  # the last entry is for -1
    return Classes(np.concatenate(numbers), list(known))


class Source(Protocol):
    """A numbered collection of encoded images. All methods may be called from any thread.

    The order of the images depends only on the data. If the data is divided into a training part and a held-out part
    (`model.folder.HELD_OUT` lists the names of the latter), `parts` maps `train` and `val` to the numbers of the images
    in these two parts. Otherwise `parts` is empty. `skipped` lists the images that were found to be unreadable when the
    source was opened. They have no number. `ignored` counts the files that are not images, by kind.
    """

    @property
    def parts(self) -> Mapping[str, Indices]: ...

    @property
    def skipped(self) -> Sequence[Skipped]: ...

    @property
    def ignored(self) -> Mapping[str, int]: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the printable name of an image. It is unique in the source and the same on every machine."""

    def label(self, index: int) -> str | None: ...

    def classes(self) -> Classes:
        """Return the classes of all images. They are the labels, except that `FolderSource` finds fewer classes."""

    def encoded(self, index: int) -> bytes:
        """Return the bytes of an image's encoded file.

        Raises:
            ValueError: the image is broken; the message gives the reason.
            OSError: the server or the disk failed; the image may be fine.
        """

    def fingerprint(self, index: int) -> str:
        """Return a string that changes if the image's size in bytes changes. The content of the image is not read."""

    def version(self, index: int) -> str:
        """Return a string that changes if the file with the image is written again, as far as its storage can tell.

        It may also change if the file is copied. The content of the image is not read.
        """


@dataclass(frozen=True)
class Photo:
    """One image of a source. Evaluations accept a `Photo` wherever they accept the path of an image file."""

    source: Source
    index: int

    @property
    def name(self) -> str:
        return self.source.name(self.index)

    @property
    def label(self) -> str | None:
        return self.source.label(self.index)

    def read(self) -> Pixels:
        """Return the decoded image, turned upright: RGB uint8 [height, width, 3].

        Raises:
            ValueError: the image is broken; the message gives the reason.
            OSError: the server or the disk failed; the image may be fine.
        """
        return decode(self.source.encoded(self.index))


class Subset:
    """A source that consists of selected images of another source. The selected images are numbered from 0."""

    parts: Mapping[str, Indices]

    def __init__(self, source: Source, indices: Indices) -> None:
        self._source, self._indices, self.parts = source, indices, {}

    @property
    def skipped(self) -> Sequence[Skipped]:
        """Return the skipped images of the source from which the images were selected."""
        return self._source.skipped

    @property
    def ignored(self) -> Mapping[str, int]:
        """Return the counts of ignored files in the source from which the images were selected."""
        return self._source.ignored

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def label(self, index: int) -> str | None:
        return self._source.label(int(self._indices[index]))

    def classes(self) -> Classes:
        return self._source.classes()[self._indices]

    def encoded(self, index: int) -> bytes:
        return self._source.encoded(int(self._indices[index]))

    def fingerprint(self, index: int) -> str:
        return self._source.fingerprint(int(self._indices[index]))

    def version(self, index: int) -> str:
        return self._source.version(int(self._indices[index]))


def photos_of(source: Source) -> list[Photo]:
    """Return all images of a source as a list of `Photo` objects."""
    return [Photo(source, i) for i in range(len(source))]


def label_of(photo: Path | Photo) -> str:
    """Return the label of an image. The label of a file is the name of the folder that contains it.

    Raises:
        ValueError: the image has no label.
    """
    label = photo.parent.name if isinstance(photo, Path) else photo.label
    if label is None:
        raise ValueError(f"{photo.name} has no label")
    return label


# Reading


def decode(data: bytes) -> Pixels:
    """Decode an image, and return it upright: RGB uint8 [height, width, 3].

    Serving decodes with the same function, `model.decode.decode`, but with lower limits than `LIMITS`.

    Raises:
        ValueError: the bytes are not a readable image, or the image is too large; the message gives the reason.
    """
    return decode_image(data, LIMITS)


def squash(photo: Pixels, side: int) -> tuple[Pixels, float]:
    """Resize an image [height, width, 3] to a square, bicubically and without keeping its aspect ratio.

    Return the square, uint8 [3, side, side], and the image's original width / height.

    Raises:
        ValueError: one side is more than 100 times the other. Evaluation refuses such images too.
    """
    height, width = photo.shape[:2]
    output_size(height, width, PreprocessSpec())
    return _channels_first(np.asarray(_square(Image.fromarray(photo), side))), width / height


def _square(photo: Image.Image, side: int, box: tuple[float, float, float, float] | None = None) -> Image.Image:
    return photo.resize((side, side), Image.Resampling.BICUBIC, box)


def _channels_first(square: Pixels) -> Pixels:
    return np.ascontiguousarray(square.transpose(2, 0, 1))


def decode_square(data: bytes, side: int) -> tuple[Pixels, float]:
    """Decode an image, and squash it to a square.

    Return the square, uint8 [3, side, side], and the image's original width / height. The result differs from that of
    `squash(decode(data), side)` in two small ways. A JPEG that is much larger than the square is decoded at a fraction
    of its size, which changes the pixels slightly (see `DRAFT_MARGIN`), but in the same way each time. An image with an
    EXIF orientation is turned after it is squashed, which may change pixel values by one.

    Raises:
        ValueError: the image cannot be decoded, is too large, or has one side more than 100 times the other.
    """
    stored = decode_stored(data, LIMITS, least_side=DRAFT_MARGIN * side)
    # libjpeg rounds up the sides of a reduced image, so the image may end within the last pixels. The box is its end.
    square = upright(_square(stored.rgb, side, stored.box), stored.orientation)
    return _channels_first(np.asarray(square)), stored.aspect


def read_file(path: Path) -> bytes:
    """Return the contents of an image file.

    Raises:
        ValueError: the file is missing, is not a regular file, is not readable, or is larger than `MAX_BYTES`.
        OSError: the disk or the system failed; the file may be fine.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait forever
            raise ValueError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{status.st_size} bytes: more than the limit of {MAX_BYTES} for an image")
        return path.read_bytes()
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error.strerror}") from error


def read_photo(photo: Path | Photo) -> Pixels:
    """Read and decode an image, and return it upright: RGB uint8 [height, width, 3].

    Raises:
        ValueError: the image is broken; the message gives the reason.
        OSError: the server or the disk failed; the image may be fine.
    """
    return decode(read_file(photo)) if isinstance(photo, Path) else photo.read()


# Folders of files


def walk_folder(folder: Path) -> Iterator[Listed]:
    """Yield every file at any depth below `folder`, as `model.folder.walk` does.

    Raises:
        ValueError: the folder does not exist, or a folder in it cannot be listed.
    """
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist or is not a folder")
    for listed in walk(folder):
        if listed.is_folder and listed.problem is not None:  # training without a class, unnoticed, would spoil a run
            raise ValueError(f"{listed.path} cannot be listed: {listed.problem}")
        yield listed


def find_images(folder: Path) -> list[Path]:
    """Return the paths of all image files below `folder`, at any depth, sorted.

    Raises:
        ValueError: the folder does not exist, a folder in it cannot be listed, or there are no images.
    """
    images = [Path(listed.path) for listed in walk_folder(folder) if listed.is_image]
    if not images:
        raise ValueError(f"no images below {folder}")
    return images


# Splits and the order of a run


def _held_out(source: Source, share: float, seed: int) -> tuple[Indices, Indices]:
    """Divide the images of a source at random, and return the numbers of each part, in ascending order.

    The first part contains the images to train on. The second contains the share `share` of all images. An image is
    held out if the digest of its name and the seed is among the smallest. If images are added later, an image that was
    trained on therefore rarely becomes one that is held out.
    """
    names = (f"{seed}/{source.name(i)}".encode(errors="surrogateescape") for i in range(len(source)))
    digests = np.fromiter(map(xxhash.xxh3_64_intdigest, names), np.uint64, len(source))
    order = np.argsort(digests, kind="stable")
    n_held_out = int(len(source) * share)
    return np.sort(order[n_held_out:]), np.sort(order[:n_held_out])


def split_indices(source: Source, held_out_share: float, seed: int) -> tuple[Indices, Indices]:
    """Return the numbers of the images to train on, and those of the images to hold out for evaluation.

    If the source is already divided into `train` and `val` (see `Source.parts`), these two parts are returned.
    Otherwise the share `held_out_share` of all images is drawn at random with `seed` and held out.
    """
    if {"train", "val"} <= set(source.parts):
        return source.parts["train"], source.parts["val"]
    return _held_out(source, held_out_share, seed)


def split_source(source: Source, held_out_share: float, seed: int) -> tuple[Subset, Subset]:
    """Return two sources: the images to train on, and the images to hold out for evaluation (see `split_indices`)."""
    train, held_out = split_indices(source, held_out_share, seed)
    return Subset(source, train), Subset(source, held_out)


@lru_cache(maxsize=2)  # the current epoch, and the next one when images are decoded ahead
def _epoch_order(n_photos: int, seed: int, epoch: int) -> npt.NDArray[np.uint32]:
    return np.random.default_rng((seed, epoch)).permutation(n_photos).astype(np.uint32)


def batch_indices(n_photos: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Return the numbers of the images of one training step, int64 [batch_size].

    Each epoch goes through the images in a new random order, and leaves out the last few if they do not fill a batch.
    The result depends only on the arguments, so a resumed run continues with exactly the images that come next.

    Raises:
        ValueError: `batch_size` is less than 1 or more than the number of images.
    """
    if not 1 <= batch_size <= n_photos:
        raise ValueError(f"batch_size={batch_size} must be 1 to {n_photos}, the number of images")
    epoch, position = divmod(step, n_photos // batch_size)
    order = _epoch_order(n_photos, seed, epoch)
    return torch.from_numpy(order[position * batch_size : (position + 1) * batch_size].astype(np.int64))

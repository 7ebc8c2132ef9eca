"""Computes the features of a frozen set with one model, and keeps them on disk for later comparisons.

The features of the live model are needed for every challenger. They are stored in one file for each model, precision,
pooling and frozen set. The name of the file contains hashes of all of them, and the file itself repeats the full key,
which is compared when it is read.

Legend: n images, V views of each image, D features.
"""

import hashlib
import io
import logging
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact
from model.decode import DecodeError, DecodeLimits, decode
from model.engines.protocol import Engine
from model.files import write_bytes
from model.pooling import Pooling
from model.preprocess import preprocess
from service.ingest.embed import load_ahead, vectors_of
from service.jobs.frozen_set import FrozenImage, FrozenSet, read_image
from service.jobs.own_views import VERSION, own_views

log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]

VIEWS: Final = 2
"""The number of crops of each image in a set without classes."""

_BATCH: Final = 16  # images and crops in one forward pass


@dataclass(frozen=True)
class SetFeatures:
    """Features of the images of a frozen set, [n, D] in the order of the list, and of their crops, [n, V, D]. V is 0 if
    the images have classes."""

    images: FloatArray
    views: FloatArray


@dataclass(frozen=True)
class FeatureCache:
    """The stored features of one model and one frozen set, in a subfolder of `folder`."""

    folder: Path
    fingerprint: str
    pooling: Pooling
    frozen: FrozenSet

    def key(self, precision: str) -> str:
        """Return the text that determines the features."""
        views = "no views" if self.frozen.has_labels else f"{VIEWS} views of version {VERSION}"
        return f"{self.fingerprint}/{self.pooling}/{precision}/{self.frozen.digest}/{views}"

    def path(self, precision: str) -> Path:
        """Return the path of the file, which may not exist."""
        name = hashlib.sha256(self.key(precision).encode()).hexdigest()[:16]
        return self.folder / "features" / f"{self.fingerprint[:8]}-{precision}-{name}.npz"

    def read(self, precision: str) -> SetFeatures | None:
        """Return the stored features, or None if there are none. A damaged file is reported in the log and ignored."""
        path = self.path(precision)
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                if str(file["key"]) == self.key(precision):
                    return SetFeatures(file["images"], file["views"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s cannot be read and is computed again: %s", path, error)
        return None

    def write(self, precision: str, features: SetFeatures) -> None:
        """Store features.

        Raises:
            OSError: the file cannot be written.
        """
        buffer = io.BytesIO()
        np.savez(buffer, key=np.array(self.key(precision)), images=features.images, views=features.views)
        path = self.path(precision)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, buffer.getvalue())


def embed_set(
    frozen: FrozenSet,
    folder: Path,
    artifact: Artifact,
    engine: Engine,
    *,
    pooling: Pooling,
    limits: DecodeLimits,
    advance: Callable[[int], object] = lambda count: None,
) -> SetFeatures:
    """Compute the features of all images of a frozen set, and of their crops if the images have no classes.

    `advance` is called with a number of images when these are done. The features are not scaled to length 1.

    Raises:
        ValueError: an image is missing, changed, or cannot be decoded. The message names it.
    """
    spec, n_views = artifact.manifest.preprocess, 0 if frozen.has_labels else VIEWS

    def load(image: FrozenImage) -> list[FloatArray]:
        try:
            pixels = decode(read_image(folder, image), limits)
        except DecodeError as error:
            raise ValueError(f"{folder / image.path}: an image of the frozen set cannot be decoded: {error}") from error
        return [preprocess(view, spec) for view in (pixels, *own_views(pixels, image.sha256, n_views))]

    per_batch = max(1, _BATCH // (1 + n_views))
    vectors: list[FloatArray] = []
    loaded = load_ahead(frozen.images, load, ahead=2 * per_batch)
    while batch := [pixels for _, pixels in islice(loaded, per_batch)]:
        vectors += vectors_of(engine, [pixels for image in batch for pixels in image], pooling, normalize=False)
        advance(len(batch))
    rows = _stacked(vectors, len(frozen.images), 1 + n_views)  # [n, 1 + V, D]
    return SetFeatures(np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1:]))


def _stacked(vectors: Sequence[FloatArray], n: int, per_image: int) -> FloatArray:
    matrix = np.stack(vectors)
    return matrix.reshape(n, per_image, matrix.shape[1])

"""Views of evaluation images: crops and mixtures of their colours, by which edited copies of them are found.

The embedding of a crop can differ much from that of its source, and so can the perceptual hash of a recoloured image.
Sets of evaluation images are small, so each is also embedded as five crops, and hashed as six mixtures of its colours.
An edited copy then resembles at least one of them (docs/decisions/0058-copies.md).

Legend: m evaluation images, V embeddings and H hashes of each, D dimensions.
"""

from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Final, NamedTuple, Self

import numpy as np
from PIL import Image

from model.files import write_bytes
from model.pooling import Pooling
from training.curate.copies.hashes import Hashes, perceptual_hash
from training.curate.embedding import Embedder, FloatArray
from training.curate.listing import Location, Reader, gone
from training.curate.progress import Track
from training.curate.scan import Scanned
from training.curate.table import Images, Pixels
from training.curate.workers import Workers
from training.data.dataset import decode

VERSION: Final = "1"
"""Changes whenever the same image gets other views."""
SIDE: Final = 0.87  # share of the sides of a crop, which keeps three quarters of the area
PLACES: Final = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5))  # of the crops, vertical first
MIXTURES: Final = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5))  # of R, G and B
PART_IMAGES: Final = 16  # images that a worker takes at once


class Part(NamedTuple):
    """Some images that one worker takes at once, and the number of the first."""

    start: int
    locations: tuple[Location, ...]


class Views(NamedTuple):
    """The embeddings [m, V, D] and hashes [m, H] of m evaluation images. The first of each is that of the image."""

    embedding: FloatArray
    phash: Hashes

    @classmethod
    def only_whole(cls, images: Images) -> Self:
        """Return the embedding and the hash of each image, without crops and mixtures."""
        return cls(images.embedding[:, None], images.phash[:, None])


class ViewWorker:
    """Makes the crops and mixtures of images. It reads the images itself."""

    def __init__(self, reader: Reader, artifact: Path, pooling: Pooling, derived_dir: Path) -> None:
        self._reader, self._embed = reader, Embedder(artifact, pooling, derived_dir)

    def __call__(self, part: Part) -> tuple[int, FloatArray, Hashes]:
        """Return the number of the first image of a part, the embeddings [p, 5, D] and the hashes [p, 6].

        Raises:
            OSError: an image cannot be read.
        """
        images = [self._pixels(location) for location in part.locations]
        embedding = np.stack([np.stack([self._embed(crop) for crop in crops(pixels)]) for pixels in images])
        return part.start, embedding, np.stack([mixture_hashes(pixels) for pixels in images])

    def _pixels(self, location: Location) -> Pixels:
        try:
            return decode(self._reader.encoded(location))
        except ValueError as error:
            raise gone(location.key, error) from error


def crops(pixels: Pixels) -> list[Pixels]:
    """Return the five crops of an image [H, W, 3]."""
    height, width = pixels.shape[:2]
    tall, wide = max(1, round(SIDE * height)), max(1, round(SIDE * width))
    corners = [(round((height - tall) * y), round((width - wide) * x)) for y, x in PLACES]
    return [np.ascontiguousarray(pixels[top : top + tall, left : left + wide]) for top, left in corners]


def mixture_hashes(pixels: Pixels) -> Hashes:
    """Return the perceptual hashes [6] of the mixtures of the colours of an image [H, W, 3]."""
    image = Image.fromarray(pixels)
    mixed = [np.asarray(image.convert("L", matrix=(*weights, 0))) for weights in MIXTURES]
    return np.array([perceptual_hash(gray) for gray in mixed], np.uint64)


def stored_views(
    scanned: Scanned, artifact: Path, pooling: Pooling, cache: Path, workers: Workers, track: Track
) -> Views:
    """Return the views of all images of a scan. They are made once, and stored in the folder `cache`.

    Raises:
        OSError: an image cannot be read, a worker was killed, or the views cannot be stored.
    """
    path = cache / f"views-{VERSION}-{scanned.digest[:32]}.npz"
    if not path.exists():
        make = partial(ViewWorker, scanned.reader, artifact, pooling, scanned.folder.parent)
        n = len(scanned.images)
        starts = range(0, n, PART_IMAGES)
        parts = [Part(top, tuple(scanned.location(i) for i in range(top, min(top + PART_IMAGES, n)))) for top in starts]
        made: dict[int, tuple[FloatArray, Hashes]] = {}
        with track("views of evaluation images", n) as advance:
            results: Iterator[tuple[int, FloatArray, Hashes]] = workers(make, parts)
            for start, embedding, phash in results:
                made[start] = embedding, phash
                advance(len(phash))
        columns = [np.concatenate(column) for column in zip(*(made[start] for start in starts), strict=True)]
        cache.mkdir(parents=True, exist_ok=True)
        buffer = BytesIO()
        np.savez(buffer, embedding=columns[0], phash=columns[1])
        write_bytes(path, buffer.getvalue())
    whole = Views.only_whole(scanned.images)
    with np.load(path) as stored:
        return Views(
            np.concatenate((whole.embedding, stored["embedding"]), axis=1),
            np.concatenate((whole.phash, stored["phash"]), axis=1),
        )

"""Draws items from the collections that store their images, to see how much a new model changes what searches find.

The nearest neighbours of each item among the drawn items are compared for both models. This is information, and decides
nothing: a better model also changes what searches find.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact
from model.decode import DecodeLimits
from model.engines.protocol import Engine
from model.pooling import Pooling
from model.preprocess import preprocess
from service.errors import ServiceError
from service.features.images import decode
from service.ingest.embed import vectors_of
from service.jobs.gate_scores import Pair
from service.originals import Originals, photo_digest
from service.search.opening import open_store
from service.search.sampling import draw
from service.settings import Settings
from service.tags import tag_parts

MOST_ITEMS: Final = 200
"""The largest number of items that are drawn from a collection."""
MOST_COLLECTIONS: Final = 10
"""The largest number of collections, the largest ones."""
_BATCH: Final = 16

LiveVectors = dict[str, dict[str, npt.NDArray[np.float32]]]
"""The vectors of one model, by the name of the collection and the sha256 of the image."""


@dataclass(frozen=True)
class LiveSample:
    """Drawn items: for each collection, the pooling of its vectors and the sha256 of each image. `read` returns an
    image."""

    collections: dict[str, tuple[Pooling, list[str]]]
    read: Callable[[str], bytes]


@contextmanager
def drawn_live(settings: Settings, tell: Callable[[str], object]) -> Iterator[LiveSample]:
    """Draw items whose image is stored. If the collections cannot be read, call `tell` with the reason and draw
    nothing. The images can be read within the `with` block."""
    originals = Originals(settings.originals_place)

    def read(digest: str) -> bytes:
        return asyncio.run(originals.get(digest))

    try:
        drawn = asyncio.run(_draw(settings, originals))
    except ServiceError as error:
        tell(f"no neighbours are compared in the collections, because they cannot be read: {error.detail}")
        drawn = {}
    try:
        yield LiveSample(drawn, read)
    finally:
        asyncio.run(originals.close())


async def _draw(settings: Settings, originals: Originals) -> dict[str, tuple[Pooling, list[str]]]:
    if settings.vector_store == "embedded" and not (settings.data_dir / "search.sqlite3").exists():
        return {}
    store = await open_store(settings)
    drawn: dict[str, tuple[Pooling, list[str]]] = {}
    try:
        for info in sorted(await store.collections(), key=lambda info: -info.count):
            pooling = tag_parts(info.tag).pooling
            if pooling is None or not info.spec.originals or len(drawn) == MOST_COLLECTIONS:
                continue
            digests = [photo_digest(item) for item in (await draw(store, info, MOST_ITEMS)).items]
            stored = [each for each in dict.fromkeys(digests) if each and await originals.size(each) is not None]
            drawn[info.name] = (pooling, stored)
    finally:
        await store.close()
    return drawn


def embed_live(sample: LiveSample, artifact: Artifact, engine: Engine, limits: DecodeLimits) -> LiveVectors:
    """Embed the drawn images with one model. Images that can no longer be read are left out."""
    vectors: LiveVectors = {}
    for name, (pooling, digests) in sample.collections.items():
        mine = vectors.setdefault(name, {})
        for start in range(0, len(digests), _BATCH):
            pixels = {}
            for digest in digests[start : start + _BATCH]:
                try:
                    pixels[digest] = preprocess(decode(sample.read(digest), limits), artifact.manifest.preprocess)
                except (ServiceError, ValueError):
                    continue
            found = vectors_of(engine, list(pixels.values()), pooling, normalize=True) if pixels else []
            mine |= {digest: vector for digest, vector in zip(pixels, found, strict=True) if np.isfinite(vector).all()}
    return vectors


def pairs_of(champion: LiveVectors, challenger: LiveVectors) -> dict[str, Pair]:
    """Return the vectors of the images that both models have embedded, by collection."""
    pairs = {}
    for name in champion:
        common = [digest for digest in champion[name] if digest in challenger[name]]
        if common:
            pairs[name] = Pair(
                *(np.stack([vectors[name][each] for each in common]) for vectors in (champion, challenger))
            )
    return pairs

"""Embed the items that a collection's new vectors lack, from their images."""

import asyncio
import logging
import time
from collections.abc import Sequence

import numpy as np

from model.pooling import Pooling
from model.preprocess import preprocess
from service.errors import Conflict, ServiceError
from service.features.images import decode
from service.features.patch_cache import patches_key
from service.features.patches import Patches
from service.ingest.embed import FloatArray, pooled
from service.migration.images import read_image
from service.migration.work import Places, Work
from service.originals import photo_digest
from service.search.partners import Filled, Missing
from service.search.store import CollectionInfo
from service.tags import tag_parts

log = logging.getLogger(__name__)


async def fill(work: Work, name: str) -> bool:
    """Embed the items that the partner of a collection lacks. Return whether any were embedded."""
    migrations, lost = work.places.migrations, work.lost.setdefault(name, {})
    info = await work.places.store.info(name)
    tag, pooling = work.tag(info), tag_parts(info.tag).pooling
    if info.tag == tag or pooling is None:
        return False  # switched before this migration was interrupted, or created again for other vectors
    await migrations.start(name, tag, work.dimension(pooling))
    after, added = 0, 0
    while page := await migrations.missing(name, tag, after=after, limit=work.options.batch_size):
        after = page[-1].number
        wanted = [item for item in page if lost.get(item.id) != item.number]
        if not wanted:
            continue
        started = time.monotonic()
        try:
            added += await _embed(work, info, wanted, tag, pooling)
        except Conflict:  # the collection was deleted and created again: begin with the new one
            return True
        work.report.embedded += len(wanted)
        work.report.pending = await migrations.pending()
        await work.tell(f"embedding {name}")
        busy = time.monotonic() - started
        await asyncio.sleep(busy * (1 / work.options.share - 1))
    return added > 0


async def _embed(work: Work, info: CollectionInfo, wanted: Sequence[Missing], tag: str, pooling: Pooling) -> int:
    images = [await read_image(work, info.name, item) for item in wanted]
    readable = [(item, image) for item, image in zip(wanted, images, strict=True) if image is not None]
    stored = await _stored(work.places, info, [item for item, _ in readable])
    filled = await asyncio.to_thread(_vectors, work, info.name, readable, pooling, stored)
    return await work.places.migrations.fill(info.name, tag, filled) if filled else 0


async def _stored(places: Places, info: CollectionInfo, items: Sequence[Missing]) -> set[str]:
    """Return the digests of the items' images that are stored and that searches may compare patch by patch."""
    if places.patches is None or not info.spec.originals:
        return set()
    digests = [digest for item in items if (digest := photo_digest(item)) is not None]
    return {digest for digest in digests if await places.originals.size(digest) is not None}


def _vectors(
    work: Work, name: str, images: Sequence[tuple[Missing, bytes]], pooling: Pooling, stored: set[str]
) -> list[Filled]:
    """Embed images with the new model, as the service does. Write the patch features of the images with the digests
    `stored` to the patch store, so that searches need not compute them after the switch."""
    spec = work.opened.artifact.manifest.preprocess
    decoded: list[tuple[Missing, FloatArray, tuple[int, int]]] = []
    for item, image in images:
        try:
            rgb = decode(image, work.options.limits)
            decoded.append((item, preprocess(rgb, spec), (rgb.shape[0], rgb.shape[1])))
        except (ServiceError, ValueError) as error:
            log.warning("item %r of %r: %s", item.id, name, error)
            work.lose(name, item)
    if not decoded:
        return []
    pixels = np.stack([each for _, each, _ in decoded])
    features = work.opened.engine.run(pixels)
    if work.places.patches is not None and stored:
        side, sizes = work.opened.artifact.manifest.config.patch_size, [size for _, _, size in decoded]
        packed = Patches.of_batch(features.patches, (pixels.shape[2], pixels.shape[3]), side, sizes)
        kept = {photo_digest(item): each for (item, _, _), each in zip(decoded, packed, strict=True)}
        work.places.patches.set_many(
            {
                patches_key(digest, *work.model): each.to_bytes()
                for digest, each in kept.items()
                if digest in stored and each is not None
            }
        )
    filled = []
    for (item, _, _), vector in zip(decoded, pooled(features, pooling, True), strict=True):
        if np.isfinite(vector).all() and vector.any():
            filled.append(Filled(item.number, item.id, vector))
        else:
            work.lose(name, item)
    return filled

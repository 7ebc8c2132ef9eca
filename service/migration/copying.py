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
from service.ingest.embed import vectors_of
from service.migration.images import read_image
from service.migration.work import Work
from service.search.partners import Filled, Missing
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
            added += await _embed(work, name, wanted, tag, pooling)
        except Conflict:  # the collection was deleted and created again: begin with the new one
            return True
        work.report.embedded += len(wanted)
        work.report.pending = await migrations.pending()
        await work.tell(f"embedding {name}")
        busy = time.monotonic() - started
        await asyncio.sleep(busy * (1 / work.options.share - 1))
    return added > 0


async def _embed(work: Work, name: str, wanted: Sequence[Missing], tag: str, pooling: Pooling) -> int:
    images = [await read_image(work, name, item) for item in wanted]
    readable = [(item, image) for item, image in zip(wanted, images, strict=True) if image is not None]
    filled = await asyncio.to_thread(_vectors, work, name, readable, pooling)
    return await work.places.migrations.fill(name, tag, filled) if filled else 0


def _vectors(work: Work, name: str, images: Sequence[tuple[Missing, bytes]], pooling: Pooling) -> list[Filled]:
    """Embed images with the new model, as the service does."""
    spec = work.opened.artifact.manifest.preprocess
    decoded = []
    for item, image in images:
        try:
            decoded.append((item, preprocess(decode(image, work.options.limits), spec)))
        except (ServiceError, ValueError) as error:
            log.warning("item %r of %r: %s", item.id, name, error)
            work.lose(name, item)
    if not decoded:
        return []
    vectors = vectors_of(work.opened.engine, [pixels for _, pixels in decoded], pooling, True)
    filled = []
    for (item, _), vector in zip(decoded, vectors, strict=True):
        if np.isfinite(vector).all() and vector.any():
            filled.append(Filled(item.number, item.id, vector))
        else:
            work.lose(name, item)
    return filled

"""The images of items: whether they exist, and reading them."""

import asyncio
import hashlib
import logging
from collections.abc import Mapping, Sequence

from service.errors import ServiceError
from service.migration.work import Places, Work
from service.originals import photo_digest
from service.search.partners import Missing

log = logging.getLogger(__name__)


async def has_image(places: Places, item: Missing) -> bool:
    """Return whether the image of an item is stored, or may be read from its source."""
    digest = photo_digest(item)
    if digest is not None and await places.originals.size(digest) is not None:
        return True
    return item.source is not None and places.read_source is not None


async def read_image(work: Work, name: str, item: Missing) -> bytes | None:
    """Return the image of an item of the collection `name`, or note the item as lost and return None."""
    digest, places = photo_digest(item), work.places
    try:
        if digest is not None and await places.originals.size(digest) is not None:
            return await places.originals.get(digest)
        if item.source is not None and places.read_source is not None:
            image = await asyncio.to_thread(places.read_source, item.source)
            if digest in (None, hashlib.sha256(image).hexdigest()):
                return image
            log.warning("item %r of %r: the image at its source has changed", item.id, name)
    except (OSError, ValueError, ServiceError) as error:
        log.warning("item %r of %r: %s", item.id, name, error)
    work.lose(name, item)
    return None


def described(lost: Mapping[str, Sequence[str]], most: int = 10) -> str:
    """Return a text that names items by their collections, at most `most` of each."""
    return "; ".join(
        f"{name}: {', '.join(ids[:most])}{f' and {len(ids) - most} more' if len(ids) > most else ''}"
        for name, ids in lost.items()
    )

"""Reads the patch features of stored images. Features that are not cached are computed from the images."""

import asyncio
from collections.abc import Sequence

from service.errors import NotFound
from service.features.patches import Patches
from service.originals import digest_of, photo_digest
from service.outcomes import Outcome, attempt, attempt_await
from service.search.store import Hit, Item
from service.state import Service


async def digests_of(service: Service, name: str, hits: Sequence[Hit]) -> list[str | None]:
    """For each hit, in order, return the digest (sha256) of its image, or None if the digest is unknown. The digest is
    taken from the hit's source or, if the source contains none, from the stored item."""
    named = [digest_of(hit.source) for hit in hits]
    unnamed = [hit.id for hit, digest in zip(hits, named, strict=True) if digest is None]
    items = iter(await service.store.get(name, unnamed) if unnamed else [])
    return [digest or _of_item(next(items)) for digest in named]


def _of_item(item: Item | None) -> str | None:
    return None if item is None else photo_digest(item)


async def patches_of(service: Service, digests: Sequence[str | None]) -> list[Outcome[Patches]]:
    """For each digest, in order, return the patch features of the stored image, or the error if the image is missing or
    cannot be read."""
    wanted = list(dict.fromkeys(digest for digest in digests if digest is not None))
    kept = await service.pipeline.kept_patches(wanted)
    missing = [digest for digest in wanted if digest not in kept]
    images = await asyncio.gather(*(attempt_await(i, _read(service, digest)) for i, digest in enumerate(missing)))
    computed = dict(zip(missing, await service.pipeline.patches(images), strict=True))
    await _forget_erased(service, [digest for digest, outcome in computed.items() if outcome.error is None])

    def patches(digest: str | None) -> Patches:
        if digest is None:
            raise NotFound("the image is not stored")
        return kept[digest] if digest in kept else computed[digest].result()

    return [attempt(i, patches, digest) for i, digest in enumerate(digests)]


async def _forget_erased(service: Service, digests: Sequence[str]) -> None:
    """Erase the patch features of the images that were erased after they had been read, because they were stored
    afterwards."""
    sizes = await asyncio.gather(*(service.originals.size(digest) for digest in digests))
    if gone := [digest for digest, size in zip(digests, sizes, strict=True) if size is None]:
        await service.pipeline.patch_cache.erase(gone)


async def _read(service: Service, digest: str) -> tuple[str, bytes]:
    return digest, await service.originals.get(digest)

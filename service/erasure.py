"""Erases stored images: one image, with the items that refer to it, or all images to which no item refers.

An item refers to an image if its `source` names the image, or if its collection stores images and its `digest` is that
of the image. To find out which images are needed, all items of all collections are read. The service may run meanwhile.
A request stores an image shortly before it writes the item. This renews the image's time stamp, and images with a new
time stamp are spared (docs/decisions/0040-keys.md).

The stored patch features of an image are erased with it. Snapshots and backups do not count as references, and images
in backups are not erased.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Container, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from service.errors import CollectionNotFound, Conflict, InvalidRequest, NotFound
from service.features.patch_store import PatchStore
from service.originals import SHA256, Originals, digest_of
from service.search.store import CollectionInfo, Item, VectorStore
from service.search.transfer import pages

Items = Literal["refuse", "keep", "delete"]
"""What to do with the items that refer to an image that is to be erased: refuse to erase the image, keep the items
without it, or delete the items too."""
GRACE_S: Final = 600.0
"""Time for which an image is spared after it was stored, because the item for it may not be written yet. This is longer
than the deadline of a request."""
UNREFERENCED_GRACE_S: Final = 24 * 3600.0
"""The same for images that nobody names. This is longer than the restore of a backup may take, which stores all images
before it writes their items."""
MAX_LISTED: Final = 100


class Reference(NamedTuple):
    """An item that refers to an image."""

    collection: str
    id: str


@dataclass(frozen=True)
class Erased:
    """The result of erasing one image. `items` are the items that referred to it."""

    digest: str
    bytes: int
    items: list[Reference] = field(default_factory=list)


@dataclass(frozen=True)
class Unreferenced:
    """The images to which no item refers: how many there are or were, and their size in bytes."""

    images: int
    bytes: int


async def erase_image(
    store: VectorStore, originals: Originals, patches: PatchStore, digest: str, items: Items = "refuse"
) -> Erased:
    """Erase one image and its patch features. If an earlier call erased only the image, because of a fault, this call
    erases the patch features and raises NotFound.

    Raises:
        InvalidRequest: the digest is not a sha256 in hex.
        NotFound: the image is not stored.
        Conflict: `items` is "refuse" and an item refers to the image, or may be about to.
        StorageFailed: the image or its patch features cannot be erased.
    """
    if not SHA256.fullmatch(digest):
        raise InvalidRequest(f"{digest[:80]!r} is not the sha256 of an image: 64 hex digits, in lower case")
    started = time.time()
    if await originals.size(digest) is None:
        await _forget(patches, [digest])
        raise NotFound(f"the image {digest} is not stored")
    found = await references(store, {digest})
    if found and items == "refuse":
        raise Conflict(f"{_listed(found)} to the image {digest}; keep these items without it, or delete them too")
    if items == "delete":
        for collection in sorted({reference.collection for reference in found}):
            await store.delete(collection, [one.id for one in found if one.collection == collection])
    size = await originals.erase(digest, unless_since=started - GRACE_S if items == "refuse" else None)
    if size is None:
        raise Conflict(
            f"the image {digest} was stored less than {GRACE_S:g} s ago, so an item that refers to it may be about to "
            "be written; try again later, or keep such items without the image"
        )
    await _forget(patches, [digest])
    return Erased(digest, size, found)


async def erase_unreferenced(
    store: VectorStore, originals: Originals, patches: PatchStore, *, only_count: bool = False
) -> Unreferenced:
    """Erase all images to which no item refers and their patch features, except those that were stored within the last
    day. If `only_count` is true, erase nothing and return what would be erased."""
    limit = time.time() - UNREFERENCED_GRACE_S
    candidates = await originals.stored_before(limit)
    seen: set[tuple[str, str | None]] = set()
    for _ in range(2):  # a second time, because a collection may have been copied or renamed during the first
        for info in await _unseen(store, seen):
            async for digest in _digests(store, info):
                candidates.pop(digest, None)
    images = size = 0
    if not only_count:
        await _forget(patches, list(candidates))  # if this fails, the next call finds the same images
    for digest, stored in candidates.items():
        try:
            erased = stored if only_count else await originals.erase(digest, unless_since=limit)
        except NotFound:  # another process has erased it
            continue
        if erased is not None:
            images, size = images + 1, size + erased
    if images and not only_count:
        await _forget(patches, list(candidates))  # a search may have stored patch features in the meantime
    return Unreferenced(images, size)


async def references(store: VectorStore, digests: Container[str]) -> list[Reference]:
    """Return the items of all collections that refer to one of these images."""
    found = []
    for info in await store.collections():
        try:
            async for page in pages(store, info.name):
                found += [Reference(info.name, item.id) for item in page if _digest(item, info) in digests]
        except CollectionNotFound:  # deleted in the meantime
            continue
    return found


async def _forget(patches: PatchStore, digests: Sequence[str]) -> None:
    await asyncio.to_thread(patches.erase, digests)


async def _unseen(store: VectorStore, seen: set[tuple[str, str | None]]) -> list[CollectionInfo]:
    """Return the collections that are new or have changed since the last call, and add them to `seen`."""
    infos = [info for info in await store.collections() if (info.name, info.version) not in seen]
    seen.update((info.name, info.version) for info in infos)
    return infos


async def _digests(store: VectorStore, info: CollectionInfo) -> AsyncIterator[str]:
    """Yield the digests of the images to which the items of a collection refer."""
    try:
        async for page in pages(store, info.name):
            for item in page:
                digest = _digest(item, info)
                if digest is not None:
                    yield digest
    except CollectionNotFound:  # deleted in the meantime
        return


def _digest(item: Item, info: CollectionInfo) -> str | None:
    """Return the digest of the image to which an item refers, or None."""
    return digest_of(item.source) or (item.digest if info.spec.originals else None)


def _listed(found: list[Reference]) -> str:
    shown = ", ".join(f"{one.id[:80]!r} of {one.collection!r}" for one in found[:MAX_LISTED])
    rest = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
    return f"the item {shown} refers" if len(found) == 1 else f"the items {shown}{rest} refer"

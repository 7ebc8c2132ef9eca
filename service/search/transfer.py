"""Copies collections between stores, exports them to files and imports them from files. The commands `dinov2
collections copy`, `export` and `import` use this module.

Items are read and written page by page through the protocol `VectorStore`, so the memory needed does not grow with the
size of the collection. Only .npz files are read and written as a whole. An interrupted copy or import can be run again:
a copy skips items that exist, and an import writes all items again.

The images of a collection may be stored too (`service/originals.py`). If the source and the target have different image
stores, a copy includes the images. Each image is copied before the items that refer to it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from model.files import replacing
from service.errors import CollectionNotFound, Conflict, InvalidRequest, NotFound, StorageFailed
from service.originals import THREADS, HasPhoto, Originals, photo_digest
from service.search.checks import checked_items
from service.search.collection_files import (
    BATCH,
    Head,
    JsonlWriter,
    NpzWriter,
    ParquetWriter,
    read_jsonl,
    read_npz,
    read_parquet,
)
from service.search.store import CollectionSpec, Item, VectorStore

FORMATS: Final = (".parquet", ".npz", ".jsonl")

Progress = Callable[[int], None]


@dataclass
class Photos:
    """Counts of the images that a copy handled, by outcome."""

    copied: int = 0
    present: int = 0  # images that were already in the target
    missing: int = 0  # images that are not in the source
    unreadable: int = 0  # images that are damaged in the source
    reason: str = ""  # why the first unreadable image could not be read


@dataclass(frozen=True)
class Copied:
    """The result of a copy or import: how many items were written, how many were already in the target, and how many
    the collection contains at the end."""

    written: int
    present: int  # items that were already in the target and left unchanged
    count: int  # items in the collection at the end
    photos: Photos | None = None  # None if images were not copied


async def copy_collection(
    source: VectorStore,
    target: VectorStore,
    name: str,
    new_name: str | None = None,
    *,
    originals: tuple[Originals, Originals] | None = None,
    advance: Progress = lambda _: None,
) -> Copied:
    """Copy a collection to another store, or to another name. Items whose ids already exist in the target collection
    are skipped. Return counts of items and images.

    Args:
        originals: the image stores of the source and the target. If they are different, and the collection's settings
            say that images are stored, the images are copied too, including those of skipped items.

    Raises:
        Conflict: the target has an alias with this name, or a collection with this name but other settings. This error
            is also raised if the two collections contain different numbers of items at the end.
        StorageFailed: an image cannot be stored at the target, or a store fails.
    """
    info = await source.info(name)
    new_name = new_name or name
    await target.create(new_name, info.spec)
    written = present = 0
    photos = Photos()
    if originals is not None and (not info.spec.originals or originals[0].is_same_place(originals[1])):
        originals = None
    async for page in pages(source, name):
        present_items = await target.get(new_name, [item.id for item in page])
        missing = [item for item, existing in zip(page, present_items, strict=True) if existing is None]
        if originals is not None:
            await copy_photos(page, *originals, photos)
        if missing:
            await target.upsert(new_name, missing, tag=info.tag)
        written, present = written + len(missing), present + len(page) - len(missing)
        advance(len(page))
    wanted, count = await source.count(name), await target.count(new_name)
    if wanted != count:
        raise Conflict(
            f"{name!r} holds {wanted} items and {new_name!r} now {count}: one of the collections was written to "
            f"during the copy, or {new_name!r} had other items before; run the copy again, or copy to a new name"
        )
    return Copied(written, present, count, photos if originals is not None else None)


async def copy_photos(
    items: Sequence[HasPhoto],
    source: Originals,
    target: Originals,
    photos: Photos,
) -> None:
    """Copy the images to which the items refer, at most `THREADS` of them at the same time. Count the outcomes in
    `photos`."""
    gate = asyncio.Semaphore(THREADS)  # limits the memory, because each image is in memory while it is copied

    async def copy(digest: str) -> None:
        async with gate:
            try:
                size = await source.size(digest)
                present = await target.size(digest)
                if size is not None and present == size and await target.renew(digest):
                    photos.present += 1
                    return
                data = await source.get(digest)
            except NotFound:
                photos.missing += 1
                return
            except StorageFailed as error:
                photos.unreadable += 1
                photos.reason = photos.reason or error.detail
                return
            await target.put(data)
            photos.copied += 1

    digests = dict.fromkeys(photo_digest(item) for item in items)
    copies = (copy(digest) for digest in digests if digest is not None)
    results = await asyncio.gather(*copies, return_exceptions=True)  # no copy may still run when an error is raised
    for error in results:
        if error is not None:
            raise error


async def pages(store: VectorStore, collection: str) -> AsyncIterator[list[Item]]:
    """Yield all items of a collection, page by page."""
    cursor: str | None = None
    while True:
        page = await store.scroll(collection, cursor=cursor, limit=BATCH)
        if page.items:
            yield page.items
        cursor = page.cursor
        if cursor is None:
            return


async def export_collection(store: VectorStore, name: str, out: Path, *, advance: Progress = lambda _: None) -> int:
    """Write a collection to a file and return the number of items. The suffix of the file name determines the format.

    Raises:
        ValueError: the suffix is not a known format.
        ModuleNotFoundError: pyarrow is needed but not installed.
        OSError: the file cannot be written.
    """
    suffix = check_format(out)
    info = await store.info(name)
    writers: dict[str, type[ParquetWriter] | type[NpzWriter] | type[JsonlWriter]] = {
        ".parquet": ParquetWriter,
        ".npz": NpzWriter,
        ".jsonl": JsonlWriter,
    }
    count = 0
    with replacing(out) as path, path.open("wb") as file:
        writer = writers[suffix](file, info)
        try:
            async for page in pages(store, name):
                writer.write(page)
                count += len(page)
                advance(len(page))
        except BaseException:
            writer.abandon()
            raise
        writer.close()
    return count


async def import_collection(
    store: VectorStore, name: str, path: Path, *, tag: str | None = None, advance: Progress = lambda _: None
) -> Copied:
    """Add the items of a file to a collection. If the collection does not exist, it is created. Existing items with the
    same ids are replaced. Return how many items were written, and how many the collection contains at the end.

    Args:
        tag: the tag of the vectors, which identifies the model that made them. It is needed if the file has no tag. If
            the file has a tag, the two tags must be the same.

    Raises:
        ValueError: the file has an unknown format or is damaged, or the tag is missing or differs from the tag in the
            file. If a particular line or row is damaged, the message contains its number, and items before it may have
            been written.
        InvalidRequest: an item or a setting is not allowed. For an item, the message contains the file and the number
            of the item, counted from 1.
        ModelMismatch, Conflict: the collection contains vectors from another model or with another dimension.
    """
    suffix = check_format(path)
    opened = {".parquet": read_parquet, ".npz": read_npz, ".jsonl": read_jsonl}[suffix](path)
    head = next(opened)
    assert isinstance(head, Head)
    made_by = head.tag or tag
    if made_by is None:
        raise ValueError(
            f"{path}: the file has no tag that identifies the model of its vectors; give --tag or --fingerprint"
        )
    if tag is not None and tag != made_by:
        raise ValueError(f"{path}: the vectors in the file are of {made_by!r}, not of {tag!r}")
    written, made = 0, head.spec is None
    for items in opened:
        assert isinstance(items, list)
        if not made and head.spec is not None:
            await _make(store, name, head.spec)
            made = True
        try:
            await store.upsert(name, items, tag=made_by)
        except InvalidRequest as error:
            position = _first_refused(items)
            named = f"item {written + position + 1:,}: " if position is not None else ""
            raise InvalidRequest(f"{path}: {named}{error.detail}", param=error.param) from error
        written += len(items)
        advance(len(items))
    if not made and head.spec is not None:  # the file has settings but no items
        await _make(store, name, head.spec)
    return Copied(written, 0, await store.count(name) if written or head.spec else 0)


def _first_refused(items: Sequence[Item]) -> int | None:
    """Return the position in `items` of the first item that is not allowed, or None if all items are allowed."""
    for position, item in enumerate(items):
        try:
            checked_items([item])
        except InvalidRequest:
            return position
    return None


def check_format(path: Path) -> str:
    """Return the suffix of the file name, in lower case. Raises ValueError if the suffix is not one of FORMATS."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the name must end in one of {', '.join(FORMATS)}")
    return path.suffix.lower()


async def _make(store: VectorStore, name: str, spec: CollectionSpec) -> None:
    """Create a collection if it does not exist. The settings of an existing collection are not changed. Later writes
    check its tag and dimension."""
    try:
        await store.info(name)
    except CollectionNotFound:
        await store.create(name, spec)

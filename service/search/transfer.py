"""Collections from store to store, into files and back: `dinov2 collections copy | export | import`.

Everything goes through `VectorStore`, page by page, so a million vectors need no more memory than a thousand
(.npz excepted: it is written at once). A copy or import that was interrupted is simply run again: a copy skips the ids
that are there, an import writes them again with the same content.

A collection that keeps its images has them beside the store (`service/originals.py`); a copy to where other images are
kept takes them along, each before the items that lead to it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from model.files import replacing
from service.errors import CollectionNotFound, Conflict, InvalidRequest, NotFound, StorageFailed
from service.originals import THREADS, Originals, photo_digest
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
    """What became of the images that the items of a copy lead to."""

    copied: int = 0
    present: int = 0  # were there already
    missing: int = 0  # the source does not have them
    unreadable: int = 0  # the source has them, damaged
    reason: str = ""  # of the first that could not be read


@dataclass(frozen=True)
class Copied:
    """What a copy or an import did."""

    written: int
    present: int  # were there already, and were left
    count: int  # of the collection now
    photos: Photos | None = None  # None: there were none to take along


async def copy_collection(
    source: VectorStore,
    target: VectorStore,
    name: str,
    new_name: str | None = None,
    *,
    originals: tuple[Originals, Originals] | None = None,
    advance: Progress = lambda _: None,
) -> Copied:
    """Everything of a collection into another store, or under another name; ids that are there are skipped.

    Args:
        originals: where the source keeps images, and where the target does. They are copied if the collection keeps
            its images and the places are two, also those of items that were there.

    Raises:
        Conflict: the target has the name with other settings, or the counts differ at the end.
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
            await _copy_photos(page, *originals, photos)
        if missing:
            await target.upsert(new_name, missing, tag=info.tag)
        written, present = written + len(missing), present + len(page) - len(missing)
        advance(len(page))
    wanted, count = await source.count(name), await target.count(new_name)
    if wanted != count:
        raise Conflict(
            f"{name!r} holds {wanted} items and {new_name!r} now {count}: one of them was written to meanwhile, or "
            f"{new_name!r} held others before; run the copy again, or into a new name"
        )
    return Copied(written, present, count, photos if originals is not None else None)


async def _copy_photos(items: Sequence[Item], source: Originals, target: Originals, photos: Photos) -> None:
    """Those that the items lead to, a few at a time; counted in `photos`."""
    gate = asyncio.Semaphore(THREADS)  # each image under way is in memory

    async def copy(digest: str) -> None:
        async with gate:
            try:
                size = await source.size(digest)
                if size is not None and await target.size(digest) == size:
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
    await asyncio.gather(*(copy(digest) for digest in digests if digest is not None))


async def pages(store: VectorStore, collection: str) -> AsyncIterator[list[Item]]:
    """All items, page by page."""
    cursor: str | None = None
    while True:
        page = await store.scroll(collection, cursor=cursor, limit=BATCH)
        if page.items:
            yield page.items
        cursor = page.cursor
        if cursor is None:
            return


async def export_collection(store: VectorStore, name: str, out: Path, *, advance: Progress = lambda _: None) -> int:
    """Writes a collection to a file of the kind that the suffix says; the number of items.

    Raises:
        ValueError: no such kind; ModuleNotFoundError: pyarrow is missing; OSError: the file cannot be written.
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
    """Adds a file's items to a collection, which is made if need be; ids that are there are replaced.

    Args:
        tag: what made the vectors, for a file that does not say; one that does must agree.

    Raises:
        ValueError: the file is none of ours, says no tag, or is damaged; the message names the line or row. Items
            before that are in the collection.
        InvalidRequest: an item or a setting is not allowed; the message names the file and the item, counted from 1.
        ModelMismatch, Conflict: the collection is of another model or dimension.
    """
    suffix = check_format(path)
    opened = {".parquet": read_parquet, ".npz": read_npz, ".jsonl": read_jsonl}[suffix](path)
    head = next(opened)
    assert isinstance(head, Head)
    made_by = head.tag or tag
    if made_by is None:
        raise ValueError(
            f"{path}: says no tag, so nothing tells which model made its vectors; give --tag or --fingerprint"
        )
    if tag is not None and tag != made_by:
        raise ValueError(f"{path}: its vectors are of {made_by!r}, not of {tag!r}")
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
    if not made and head.spec is not None:  # an empty collection is one too
        await _make(store, name, head.spec)
    return Copied(written, 0, await store.count(name) if written or head.spec else 0)


def _first_refused(items: Sequence[Item]) -> int | None:
    """Where the first item stands that no store takes."""
    for position, item in enumerate(items):
        try:
            checked_items([item])
        except InvalidRequest:
            return position
    return None


def check_format(path: Path) -> str:
    """Raises ValueError unless the suffix is one of FORMATS."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the name must end in one of {', '.join(FORMATS)}")
    return path.suffix.lower()


async def _make(store: VectorStore, name: str, spec: CollectionSpec) -> None:
    """One that exists is kept with its settings; the write checks that tag and dimension agree."""
    try:
        await store.info(name)
    except CollectionNotFound:
        await store.create(name, spec)

"""Collections from store to store, into files and back: `dinov2 collections copy | export | import`.

Everything goes through `VectorStore`, some items at a time, so a million vectors need no more memory than a thousand
(.npz excepted: it is written at once). A copy or import that was interrupted is simply run again: a copy skips the ids
that are there, an import writes them again with the same content.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from service.durable import aside
from service.errors import CollectionNotFound, Conflict
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


@dataclass(frozen=True)
class Copied:
    """What a copy or an import did."""

    written: int
    present: int  # were there already, and were left
    count: int  # of the collection now


async def copy_collection(
    source: VectorStore,
    target: VectorStore,
    name: str,
    new_name: str | None = None,
    *,
    advance: Progress = lambda _: None,
) -> Copied:
    """Everything of a collection into another store, or under another name; ids that are there are skipped.

    Raises:
        Conflict: the target has the name with other settings, or the counts differ at the end.
    """
    info = await source.info(name)
    new_name = new_name or name
    await target.create(new_name, info.spec)
    written = present = 0
    async for page in pages(source, name):
        there = await target.get(new_name, [item.id for item in page])
        missing = [item for item, found in zip(page, there, strict=True) if found is None]
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
    return Copied(written, present, count)


async def pages(store: VectorStore, collection: str, size: int = BATCH) -> AsyncIterator[list[Item]]:
    """All items, some at a time."""
    cursor: str | None = None
    while True:
        page = await store.scroll(collection, cursor=cursor, limit=size)
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
    with aside(out) as file:
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
        ModelMismatch, Conflict: the collection is of another model or dimension.
    """
    suffix = check_format(path)
    opened = {".parquet": read_parquet, ".npz": read_npz, ".jsonl": read_jsonl}[suffix](path)
    head = next(opened)
    assert isinstance(head, Head)
    known = head.tag or tag
    if known is None:
        raise ValueError(
            f"{path}: says no tag, so nothing tells which model made its vectors; give --tag or --fingerprint"
        )
    if tag is not None and tag != known:
        raise ValueError(f"{path}: its vectors are of {known!r}, not of {tag!r}")
    written, made = 0, head.spec is None
    for items in opened:
        assert isinstance(items, list)
        if not made and head.spec is not None:
            await _make(store, name, head.spec)
            made = True
        await store.upsert(name, items, tag=known)
        written += len(items)
        advance(len(items))
    if not made and head.spec is not None:  # an empty collection is one too
        await _make(store, name, head.spec)
    return Copied(written, 0, await store.count(name) if written or head.spec else 0)


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

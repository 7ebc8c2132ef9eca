"""Restores collections from snapshot files, all of them or none.

The items of each snapshot are written to a hidden collection, page by page, so that other writes can run between two
pages. When all snapshots have been read, one transaction gives the hidden collections their names and sets the aliases.
After a crash, the maintenance of the store removes the hidden collections.
"""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Container, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from service.errors import CollectionNotFound, Conflict, StorageFailed
from service.search import database, snapshots
from service.search.database import Row
from service.search.quotas import Quotas
from service.search.store import CollectionInfo

Write = Callable[..., Awaitable[Any]]


class Restored(NamedTuple):
    """The descriptions of the restored collections, and the keys of the collections that they replaced."""

    infos: list[CollectionInfo]
    replaced: set[int]


async def restore(
    root: Path,
    files: Mapping[str, Path],
    aliases: Mapping[str, str],
    *,
    replace: bool,
    write: Write,
    quotas: Quotas,
    damaged: Container[int],
) -> Restored:
    """Create a collection from each snapshot file, and set aliases.

    Args:
        root: the folder of the store's snapshots, which also contains the lock files of restores.
        files: maps the name of each new collection to its snapshot file.
        aliases: maps each alias to the name of its collection.
        replace: whether to replace existing collections and aliases that have these names. The aliases of a replaced
            collection then point to its replacement.
        write: runs a function on the database in a write transaction. With `frees`, the function only deletes.
        quotas: how much the store accepts.
        damaged: the keys of the collections whose tables are damaged.

    Raises:
        Conflict: a collection or alias has one of the names, and `replace` is False. A collection never replaces an
            alias, nor an alias a collection.
        CollectionNotFound: the collection for an alias does not exist.
        InvalidRequest: a snapshot is damaged.
        QuotaExceeded: there would be too many collections or items.
        StorageFailed: a snapshot cannot be read, or the disk is full.
    """
    await write(partial(_check, names=list(files), aliases=aliases, replace=replace))
    rows: dict[str, Row] = {}
    with ExitStack() as locks:
        try:
            for name, path in files.items():
                kept, pages = await asyncio.to_thread(snapshots.read, path)
                hidden = locks.enter_context(snapshots.restoring(root))
                row = rows[name] = await write(
                    partial(database.make, name=hidden, spec=kept.spec, earlier=kept.earlier)
                )
                while (page := await asyncio.to_thread(next, pages, None)) is not None:
                    await write(partial(snapshots.insert, row=row, items=page[0], vectors=page[1]))
            restored: Restored = await write(
                partial(_publish, rows=rows, aliases=aliases, replace=replace, quotas=quotas, damaged=damaged)
            )
            return restored
        except BaseException:
            for row in rows.values():
                with suppress(StorageFailed):  # raise the first error; maintenance removes the remains
                    await asyncio.shield(asyncio.ensure_future(write(partial(database.drop, key=row.key), frees=True)))
            raise


def _check(db: sqlite3.Connection, names: list[str], aliases: Mapping[str, str], replace: bool) -> None:
    """Raise Conflict if a name is taken and may not be replaced. The message lists all such names."""
    collections = {row.name for row in database.every(db)}
    existing = dict(db.execute("SELECT a.name, c.name FROM aliases a JOIN collections c ON c.id = a.collection"))
    clashes = [f"{name!r} is an alias already" for name in names if name in existing]
    clashes += [f"{alias!r} is a collection already" for alias in aliases if alias in collections]
    if not replace:
        clashes += [f"{name!r} is a collection already" for name in names if name in collections]
        clashes += [
            f"{alias!r} is an alias of {existing[alias]!r} already"
            for alias, target in aliases.items()
            if existing.get(alias, target) != target
        ]
    if clashes:
        raise Conflict("; ".join(clashes))


def _publish(
    db: sqlite3.Connection,
    rows: Mapping[str, Row],
    aliases: Mapping[str, str],
    replace: bool,
    quotas: Quotas,
    damaged: Container[int],
) -> Restored:
    """Give the hidden collections `rows` their names, and set the aliases. If `replace` is true, existing
    collections that have these names are dropped first."""
    _check(db, list(rows), aliases, replace)
    replaced = set()
    for name, row in rows.items():
        old = _found(db, name)
        if old is not None:
            db.execute("UPDATE aliases SET collection = ? WHERE collection = ?", (row.key, old.key))
            replaced |= database.drop(db, old.key, damaged=damaged)
        db.execute("UPDATE collections SET name = ?, version = version + 1 WHERE id = ?", (name, row.key))
        if old is None:
            quotas.check_collections(db)
        quotas.check_items(db, 0 if old is None else old.count, database.find(db, name).info)
    for alias, target in aliases.items():
        db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?)", (alias, database.find(db, target).key))
    return Restored([database.find(db, name).info for name in rows], replaced)


def _found(db: sqlite3.Connection, name: str) -> Row | None:
    try:
        return database.find(db, name)
    except CollectionNotFound:
        return None

"""Re-embed a collection with another model while it is searched and written to.

A collection can have one partner: a hidden collection with the same items and the vectors of another model. Before the
switch the partner is the candidate. It starts empty. A copier embeds the items that it lacks and fills them in, and
every write to the collection also changes the partner in the same transaction:

    written     the partner gets the item if the writer embedded the image with the other model too, and otherwise loses
                it, so that the copier embeds it again
    edited      the item of the partner gets the same metadata and source
    deleted     the item of the partner is deleted

So an item of the partner always belongs to the current item of the collection. `fill` compares the number of the item,
which changes with every write, so a copier never brings back a deleted item and never overwrites a newer one.

The switch exchanges the names of collections and partners in one transaction. Then the old collection is the partner,
the former. It still receives every write, so a second switch goes back. `end` deletes the partner.
"""

import dataclasses
import json
import sqlite3
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeVar, cast

from service.errors import Conflict
from service.search import database
from service.search.checks import check_match, check_name, normalised
from service.search.database import Role, Row
from service.search.specs import check_spec
from service.search.store import CollectionInfo, Floats, Item, VectorStore
from service.tags import tag_parts

T = TypeVar("T")
_PREFIX: Final = "partner:"
_SWITCHING: Final = "switching:"


class Missing(NamedTuple):
    """An item that a partner lacks. `number` identifies this version of the item."""

    number: int
    id: str
    source: str | None
    digest: str | None


class Filled(NamedTuple):
    """A vector of the other model for the version `number` of an item."""

    number: int
    id: str
    vector: Floats


class Partnership(NamedTuple):
    """A collection and its partner. `role` is candidate or former. A former may also have items that the collection
    lacks, because their images could not be read."""

    collection: CollectionInfo
    partner: CollectionInfo
    role: Role


class Migrations(Protocol):
    """The methods of a store that can re-embed its collections (capability `migrations`)."""

    async def start(self, collection: str, tag: str, dimension: int) -> Partnership:
        """Give a collection an empty partner for vectors with this tag, and return the two. If it already has a partner
        with this tag, change nothing.

        Raises:
            Conflict: the collection itself has this tag, or it has a partner with another tag.
        """

    async def partnerships(self) -> list[Partnership]:
        """Return all collections that have a partner, sorted by name."""

    async def lacking(self, collection: str) -> int:
        """Return the number of items of a collection that its partner lacks, or 0 if it has no partner. This compares
        the ids of all items."""

    async def pending(self) -> int:
        """Return about how many items all candidates lack. Unlike `lacking`, this only compares counts."""

    async def former(self, collection: str) -> CollectionInfo | None:
        """Return the description of the former of a collection, or None if it has none. A candidate does not count."""

    async def missing(self, collection: str, tag: str, *, after: int = 0, limit: int = 256) -> list[Missing]:
        """Return items that have no vector with this tag in the partner, in ascending order of their numbers, from the
        first number above `after`. Without such a partner, these are all items."""

    async def fill(self, collection: str, tag: str, vectors: Sequence[Filled]) -> int:
        """Add vectors to the partner that has this tag. Skip those whose item has been replaced or deleted, or has a
        vector already. Return how many were added.

        Raises:
            Conflict: there is no such partner.
        """

    async def switch(self, tags: Mapping[str, str], *, may_lack: Mapping[str, int] | None = None) -> None:
        """Exchange collections and their partners, all at once or none. `tags` maps the name of each collection to the
        tag that it has afterwards. A collection that has this tag already stays as it is. `may_lack` maps the name of a
        collection to the number of items that its partner may lack. Such items are missing after the switch.

        Raises:
            Conflict: a partner lacks more items, or there is no partner with this tag.
        """

    async def end(self, collection: str) -> None:
        """Delete the partner of a collection. If there is none, change nothing."""


def migrations_of(store: VectorStore) -> Migrations:
    """Return the `Migrations` of a store that has the capability `migrations`."""
    assert "migrations" in store.capabilities
    return cast(MigratingStore, store).migrations


class MigratingStore(VectorStore, Protocol):
    """A store that can re-embed its collections (capability `migrations`)."""

    migrations: Migrations


class EmbeddedMigrations:
    """The `Migrations` of the embedded store. `read` and `write` run a function on its database, `forget` drops the
    views of deleted collections, and `wake` starts the maintenance of segments. `damaged` are the keys of collections
    whose tables are damaged."""

    def __init__(
        self,
        read: Callable[..., Awaitable[Any]],
        write: Callable[..., Awaitable[Any]],
        forget: Callable[[set[int]], None],
        wake: Callable[[], None],
        *,
        damaged: Container[int] = (),
    ) -> None:
        self._read, self._write, self._forget, self._wake = read, write, forget, wake
        self._damaged = damaged

    async def start(self, collection: str, tag: str, dimension: int) -> Partnership:
        result: Partnership = await self._write(partial(_start, name=check_name(collection), tag=tag, size=dimension))
        return result

    async def partnerships(self) -> list[Partnership]:
        result: list[Partnership] = await self._read(_partnerships)
        return result

    async def lacking(self, collection: str) -> int:
        def work(db: sqlite3.Connection) -> int:
            row = database.find(db, check_name(collection))
            partner = partner_of(db, row)
            return 0 if partner is None else _lacks(db, row, partner)

        lacks: int = await self._read(work)
        return lacks

    async def pending(self) -> int:
        count: int = await self._read(_pending)
        return count

    async def former(self, collection: str) -> CollectionInfo | None:
        def work(db: sqlite3.Connection) -> CollectionInfo | None:
            partner = partner_of(db, database.find(db, check_name(collection)))
            return None if partner is None or partner.role != "former" else partner.info

        info: CollectionInfo | None = await self._read(work)
        return info

    async def missing(self, collection: str, tag: str, *, after: int = 0, limit: int = 256) -> list[Missing]:
        result: list[Missing] = await self._read(
            partial(_missing, name=check_name(collection), tag=tag, after=after, limit=limit)
        )
        return result

    async def fill(self, collection: str, tag: str, vectors: Sequence[Filled]) -> int:
        unit = [filled._replace(vector=normalised(filled.vector)) for filled in vectors]
        added: int = await self._write(partial(_fill, name=check_name(collection), tag=tag, vectors=unit))
        self._wake()
        return added

    async def switch(self, tags: Mapping[str, str], *, may_lack: Mapping[str, int] | None = None) -> None:
        for name in tags:
            check_name(name)
        await self._write(partial(_switch, tags=tags, may_lack=may_lack or {}))

    async def end(self, collection: str) -> None:
        self._forget(await self._write(partial(_end, name=check_name(collection), damaged=self._damaged), frees=True))
        self._wake()


def partner_of(db: sqlite3.Connection, row: Row) -> Row | None:
    """Return the partner of a collection, under the name of the collection, or None if it has none."""
    return None if row.partner is None else dataclasses.replace(database.by_key(db, row.partner), name=row.name)


def info_of(db: sqlite3.Connection, row: Row) -> CollectionInfo:
    """Return the description of a collection, with the tag of its partner."""
    partner = partner_of(db, row)
    return row.info if partner is None else dataclasses.replace(row.info, partner=partner.spec.tag)


def version_with(db: sqlite3.Connection, name: str, tag: str) -> Row:
    """Return the collection with this name or alias, or its former if only that has vectors with this tag. So a vector
    that a client computed shortly before a switch still finds its items."""
    row = database.find(db, name)
    if row.spec.tag != tag and row.partner is not None:
        partner = partner_of(db, row)
        if partner is not None and partner.role == "former" and partner.spec.tag == tag:
            return partner
    return row


Prepared = Sequence[tuple[Item, Floats, str]]
"""Items as `checked_items` returns them: with their vectors of length 1 and their metadata as text."""


def write(db: sqlite3.Connection, row: Row, tag: str, items: Prepared, other: tuple[str, Prepared] | None) -> None:
    """Write items to a collection and its partner. `row` is the collection. `items` have vectors with `tag`, and
    `other` contains a second tag and some of the same items with vectors of this tag.

    Raises:
        ModelMismatch, Conflict: not every item has a vector that fits the collection.
    """
    by_tag = {tag: items, **({other[0]: other[1]} if other else {})}
    live = by_tag.get(row.spec.tag, ())
    if len(live) < len(items):  # the writer knew only the model of the partner, or no vectors of the live model
        live = items
    check_match(row.info, tag=tag if live is items else row.spec.tag, dimension=len(live[0][1]))
    database.upsert(db, row.key, rows_of(row, live))
    partner = partner_of(db, row)
    if partner is None:
        return
    twins = by_tag.get(partner.spec.tag, ())
    fitting = [twin for twin in twins if len(twin[1]) == partner.spec.dimension]
    if fitting:
        database.upsert(db, partner.key, rows_of(partner, fitting))
    written = {item.id for item, _, _ in fitting}
    remove_ids(db, partner.key, [item.id for item, _, _ in items if item.id not in written])


def rows_of(row: Row, items: Prepared) -> list[tuple[Item, bytes, str]]:
    """Return prepared items as `database.upsert` expects them, with their vectors as bytes of the collection's type."""
    return [(item, vector.astype(row.dtype).tobytes(), text) for item, vector, text in items]


def remove_ids(db: sqlite3.Connection, key: int, ids: Sequence[str]) -> int:
    """Delete the items with these ids from one collection. Return the number of items that were deleted."""
    query = f"SELECT number FROM items_{key} WHERE id = ?"
    numbers = [db.execute(query, (item_id,)).fetchone() for item_id in dict.fromkeys(ids)]
    return database.remove(db, key, [number[0] for number in numbers if number is not None])


def remove(db: sqlite3.Connection, row: Row, ids: Sequence[str]) -> int:
    """Delete items from a collection and its partner. Return the number of items that the collection had."""
    if row.partner is not None:
        remove_ids(db, row.partner, ids)
    return remove_ids(db, row.key, ids)


def edit(db: sqlite3.Connection, row: Row, number: int, item_id: str, metadata: str, source: str | None) -> None:
    """Replace the metadata and the source of an item in a collection and its partner."""
    database.edit(db, row.key, number, metadata, source)
    if row.partner is not None:
        twin = db.execute(f"SELECT number FROM items_{row.partner} WHERE id = ?", (item_id,)).fetchone()
        if twin is not None:
            database.edit(db, row.partner, twin[0], metadata, source)


# ---- migrations


def _start(db: sqlite3.Connection, name: str, tag: str, size: int) -> Partnership:
    row = database.find(db, name)
    if row.spec.tag == tag:
        raise Conflict(f"collection {row.name!r} already has vectors of {tag!r}")
    partner = partner_of(db, row)
    if partner is None:
        spec = check_spec(dataclasses.replace(row.spec, tag=tag, dimension=size))
        made = database.make(db, f"{_PREFIX}{row.key}", spec)
        db.execute("UPDATE collections SET partner = ?, role = 'candidate' WHERE id = ?", (row.key, made.key))
        db.execute("UPDATE collections SET partner = ? WHERE id = ?", (made.key, row.key))
        row = database.by_key(db, row.key)
    elif partner.spec.tag != tag:
        raise Conflict(
            f"collection {row.name!r} already has a {partner.role} with vectors of {partner.spec.tag!r}: end it first"
        )
    return _partnership(db, row)


def _partnership(db: sqlite3.Connection, row: Row) -> Partnership:
    partner = partner_of(db, row)
    assert partner is not None
    return Partnership(row.info, partner.info, partner.role)


def _lacks(db: sqlite3.Connection, row: Row, partner: Row) -> int:
    """Return the number of items of a collection that its partner lacks."""
    query = f"""SELECT count(*) FROM items_{row.key} i
                WHERE NOT EXISTS (SELECT 1 FROM items_{partner.key} p WHERE p.id = i.id)"""
    (count,) = db.execute(query).fetchone()
    return int(count)


def _pending(db: sqlite3.Connection) -> int:
    pairs = [(row, partner_of(db, row)) for row in database.every(db)]
    return sum(
        max(0, row.count - other.count) for row, other in pairs if other is not None and other.role == "candidate"
    )


def _partnerships(db: sqlite3.Connection) -> list[Partnership]:
    return [_partnership(db, row) for row in database.every(db) if row.partner is not None]


def _missing(db: sqlite3.Connection, name: str, tag: str, after: int, limit: int) -> list[Missing]:
    row = database.find(db, name)
    partner = partner_of(db, row)
    condition = "1"
    if partner is not None and partner.spec.tag == tag:
        condition = f"NOT EXISTS (SELECT 1 FROM items_{partner.key} p WHERE p.id = i.id)"
    query = f"""SELECT i.number, i.id, i.source, i.digest FROM items_{row.key} i
                WHERE i.number > ? AND {condition} ORDER BY i.number LIMIT ?"""
    return [Missing(*columns) for columns in db.execute(query, (after, limit))]


def _fill(db: sqlite3.Connection, name: str, tag: str, vectors: Sequence[Filled]) -> int:
    row = database.find(db, name)
    partner = partner_of(db, row)
    if partner is None or partner.spec.tag != tag:
        raise Conflict(f"collection {row.name!r} has no partner with vectors of {tag!r}")
    current = f"SELECT metadata, source, digest FROM items_{row.key} WHERE id = ? AND number = ?"
    present = f"SELECT 1 FROM items_{partner.key} WHERE id = ?"
    rows = []
    for filled in vectors:
        columns = db.execute(current, (filled.id, filled.number)).fetchone()
        if columns is None or db.execute(present, (filled.id,)).fetchone():
            continue
        metadata, source, digest = columns
        check_match(partner.info, tag=tag, dimension=len(filled.vector))
        item = Item(filled.id, filled.vector, source=source, digest=digest)
        rows.append((item, filled.vector.astype(partner.dtype).tobytes(), metadata))
    database.upsert(db, partner.key, rows)
    return len(rows)


def _switch(db: sqlite3.Connection, tags: Mapping[str, str], may_lack: Mapping[str, int]) -> None:
    pairs = []
    for name, tag in tags.items():
        row = database.find(db, name)
        if row.spec.tag == tag:
            continue
        partner = partner_of(db, row)
        if partner is None or partner.spec.tag != tag:
            raise Conflict(f"collection {row.name!r} has no partner with vectors of {tag!r}")
        lacks = _lacks(db, row, partner)
        if lacks > may_lack.get(name, 0):
            raise Conflict(
                f"the vectors of {tag!r} lack {lacks} of the {row.count} items of collection {row.name!r}; at most "
                f"{may_lack.get(name, 0)} may be missing"
            )
        pairs.append((row, partner))
    for row, partner in pairs:
        _exchange(db, row, partner)


def _exchange(db: sqlite3.Connection, row: Row, partner: Row) -> None:
    earlier = {*row.info.earlier, (tag_parts(row.spec.tag).fingerprint, row.spec.dimension)}
    change = "UPDATE collections SET name = ?, role = ?, version = version + 1 WHERE id = ?"
    db.execute(change, (f"{_SWITCHING}{row.key}", "former", row.key))
    db.execute(change, (row.name, "live", partner.key))
    db.execute(change, (f"{_PREFIX}{partner.key}", "former", row.key))
    db.execute("UPDATE collections SET earlier = ? WHERE id = ?", (json.dumps(sorted(earlier)), partner.key))
    db.execute("UPDATE aliases SET collection = ? WHERE collection = ?", (partner.key, row.key))
    db.execute("UPDATE requests SET collection = ? WHERE collection = ?", (partner.key, row.key))


def _end(db: sqlite3.Connection, name: str, damaged: Container[int]) -> set[int]:
    row = database.find(db, name)
    if row.partner is None:
        return set()
    db.execute("UPDATE collections SET partner = NULL WHERE id = ?", (row.key,))
    database.drop_one(db, row.partner, damaged=damaged)
    return {row.partner}

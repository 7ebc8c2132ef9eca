"""Tests of snapshots that someone else made or changed: a restore refuses everything that a write would refuse."""

import sqlite3
import zlib
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from service.errors import InvalidRequest, NotFound
from service.search import snapshot_files
from service.search.embedded import EmbeddedStore
from service.search.store import Item

TAG = "f" * 64 + "/cls/l2/224x224/fp32"
D = 8
ZERO_CRC = 420107693  # of 8 zeros in float32


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    made = EmbeddedStore(tmp_path, threads=2, interval_s=60.0)
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (["UPDATE collections SET spec = replace(spec, '\"auto\"', '\"nonsense\"')"], "index.kind='nonsense' is not"),
        (["UPDATE collections SET spec = replace(spec, '0.98', '7')"], "target_recall=7 is not allowed: a number, 0.5"),
        (["UPDATE collections SET spec = replace(spec, '0.98', '\"x\"')"], "target_recall='x' is not allowed"),
        (["UPDATE collections SET spec = replace(spec, ': 8,', ': 1000000000,')"], "dimension=1000000000 is not"),
        (["UPDATE collections SET spec = replace(spec, '[]', '[\"a'') x\"]')"], "indexed: key"),
        (["UPDATE collections SET spec = '{'"], "settings cannot be read"),
        (["UPDATE collections SET spec = '[]'"], "settings cannot be read"),
        (['UPDATE collections SET spec = \'{"index": {"sort": 1}}\''], "settings cannot be read"),
        (["DELETE FROM collections"], "settings cannot be read"),
        (["UPDATE items_1 SET id = 'new' || char(10) || 'line' WHERE number = 7"], "item number 7: id 'new"),
        (["UPDATE items_1 SET id = x'00ff' WHERE number = 7"], "item number 7: its id"),
        (["UPDATE items_1 SET metadata = '[1]' WHERE number = 7"], "item number 7: its metadata is not a JSON object"),
        (["UPDATE items_1 SET metadata = '{' WHERE number = 7"], "item number 7: Expecting"),
        (["UPDATE items_1 SET metadata = '{\"a\": NaN}' WHERE number = 7"], "item number 7: metadata must be"),
        (['UPDATE items_1 SET metadata = \'{"a": "\\u0000"}\' WHERE number = 7'], "the character U+0000"),
        (["UPDATE items_1 SET metadata = x'7b7d' WHERE number = 7"], "item number 7: its id, metadata"),
        (["UPDATE items_1 SET source = '' WHERE number = 7"], "item number 7: source '' is not allowed"),
        (["UPDATE items_1 SET digest = 'DEADBEEF' WHERE number = 7"], "item number 7: digest 'DEADBEEF' is not"),
        (
            [f"UPDATE {table}_1 SET number = 9223372036854775807 WHERE number = 20" for table in ("items", "vectors")],
            "items and vectors differ",
        ),
        (
            [f"UPDATE vectors_1 SET vector = zeroblob(32), crc = {ZERO_CRC} WHERE number = 7"],
            "the length of a vector is not 1",
        ),
        (["UPDATE vectors_1 SET vector = zeroblob(32) WHERE number = 7"], "the vector of item number 7 is broken"),
        (["UPDATE vectors_1 SET crc = 'x' WHERE number = 7"], "the vector of item number 7 is broken"),
        (["UPDATE collections SET count = 'abc'"], "its number of items is 'abc'"),
    ],
)
async def test_a_crafted_snapshot_is_refused_and_leaves_nothing(
    store: EmbeddedStore, statement: list[str], words: str
) -> None:
    assert zlib.crc32(bytes(32)) == ZERO_CRC
    vectors = np.random.default_rng(0).normal(size=(20, D))
    await store.upsert("c", [Item(f"i{n}", vector, {"n": n}) for n, vector in enumerate(vectors)], tag=TAG)
    taken = await store.snapshot("c")
    with closing(sqlite3.connect(await store.snapshot_path("c", taken.name), isolation_level=None)) as db:
        for one in statement:
            assert db.execute(one).rowcount == 1
    with pytest.raises(InvalidRequest) as caught:
        await store.restore("again", "c", taken.name)
    assert words in caught.value.detail
    assert f"snapshot {taken.name} " in caught.value.detail
    path = await store.snapshot_path("c", taken.name)
    with pytest.raises(InvalidRequest, match="the uploaded snapshot") as caught:
        await store.add_snapshot("d", path)
    assert words in caught.value.detail
    assert await store.snapshots("d") == []
    (hidden,) = await store._read(lambda db: db.execute("SELECT count(*) FROM collections").fetchone())
    assert hidden == 1


ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x AS number, x, x, x, x FROM n"


@pytest.mark.parametrize(
    "statements",
    [
        ["ALTER TABLE items_1 RENAME TO old", f"CREATE VIEW items_1 AS {ENDLESS}"],
        ["CREATE TABLE more (x, y GENERATED ALWAYS AS (hex(zeroblob(100000000))))"],
        ["CREATE TABLE more (x CHECK (length(hex(zeroblob(100000000))) > 0))"],
        ["CREATE INDEX more ON items_1 (hex(zeroblob(100000000)))"],
        ["CREATE INDEX more ON items_1 (id) WHERE length(hex(zeroblob(100000000))) > 0"],
        ["CREATE VIRTUAL TABLE more USING fts5(x)"],
        ["CREATE TRIGGER more AFTER INSERT ON items_1 BEGIN DELETE FROM vectors_1; END"],
    ],
)
async def test_a_snapshot_contains_only_plain_tables(store: EmbeddedStore, statements: list[str]) -> None:
    """A view with an endless query would keep a restore busy forever."""
    await store.upsert("c", [Item("a", np.ones(D, np.float32))], tag=TAG)
    taken = await store.snapshot("c")
    with closing(sqlite3.connect(await store.snapshot_path("c", taken.name), isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)
    with pytest.raises(InvalidRequest, match="is not a plain table"):
        await store.restore("again", "c", taken.name)


async def test_an_endless_view_does_not_block_the_list_of_snapshots(store: EmbeddedStore) -> None:
    await store.upsert("c", [Item("a", np.ones(D, np.float32))], tag=TAG)
    taken = await store.snapshot("c")
    with closing(sqlite3.connect(await store.snapshot_path("c", taken.name), isolation_level=None)) as db:
        db.execute("ALTER TABLE collections RENAME TO old")
        db.execute(f"CREATE VIEW collections AS SELECT sum(number) AS count FROM ({ENDLESS})")
    [listed] = await store.snapshots("c")
    assert listed.count is None


@pytest.mark.parametrize(
    ("statements", "words"),
    [
        (
            [
                "CREATE TABLE more AS SELECT * FROM items_1",
                "DROP TABLE items_1",
                "ALTER TABLE more RENAME TO items_1",
                "UPDATE items_1 SET id = 'i3' WHERE number = 7",
            ],
            "two items have the",
        ),
        (
            [
                *(f"CREATE TABLE {name}_2 AS SELECT * FROM {name}_1" for name in ("items", "vectors")),
                *(f"DROP TABLE {name}_1" for name in ("items", "vectors")),
                *(f"ALTER TABLE {name}_2 RENAME TO {name}_1" for name in ("items", "vectors")),
                *(f"UPDATE {name}_1 SET number = 6 WHERE number = 7" for name in ("items", "vectors")),
            ],
            "two items have the same number",
        ),
    ],
)
async def test_items_that_occur_twice_are_the_fault_of_the_snapshot(
    store: EmbeddedStore, statements: list[str], words: str
) -> None:
    vectors = np.random.default_rng(0).normal(size=(20, D))
    await store.upsert("c", [Item(f"i{n}", vector) for n, vector in enumerate(vectors)], tag=TAG)
    taken = await store.snapshot("c")
    path = await store.snapshot_path("c", taken.name)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)
    with pytest.raises(InvalidRequest, match=f"snapshot .*is damaged: {words}"):
        await store.restore("again", "c", taken.name)
    with pytest.raises(InvalidRequest, match=f"the uploaded snapshot is damaged: {words}"):
        await store.add_snapshot("d", path)
    assert await store._read(lambda db: db.execute("SELECT count(*) FROM collections").fetchone()) == (1,)


@pytest.mark.parametrize("count", ["'abc'", "-1", "19", "20.5", "NULL"])
async def test_an_uploaded_snapshot_has_the_count_of_its_items(store: EmbeddedStore, count: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(20, D))
    await store.upsert("c", [Item(f"i{n}", vector) for n, vector in enumerate(vectors)], tag=TAG)
    path = await store.snapshot_path("c", (await store.snapshot("c")).name)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        if count == "NULL":
            db.execute("ALTER TABLE collections RENAME TO old")
            db.execute("CREATE TABLE collections AS SELECT * FROM old")
        db.execute(f"UPDATE collections SET count = {count}")
    with pytest.raises(InvalidRequest, match="the uploaded snapshot is damaged: "):
        await store.add_snapshot("d", path)


async def crafted(store: EmbeddedStore, *statements: str) -> Path:
    """Take a snapshot, run SQL statements on its file, and return the path."""
    vectors = np.random.default_rng(0).normal(size=(20, D))
    await store.upsert("c", [Item(f"i{n}", vector) for n, vector in enumerate(vectors)], tag=TAG)
    path = await store.snapshot_path("c", (await store.snapshot("c")).name)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)
    return path


async def test_a_snapshot_whose_reading_takes_too_long_is_refused(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its keys, each page of items needs a scan of the whole table."""
    path = await crafted(
        store,
        "ALTER TABLE items_1 RENAME TO old",
        "CREATE TABLE items_1 (number, id, metadata, source, digest)",
        "INSERT INTO items_1 SELECT * FROM old",
    )
    with closing(snapshot_files.opened(path)) as db, snapshot_files.reading("it"):
        assert len(db.rows("SELECT number FROM items_1")) == 20
    monkeypatch.setattr(snapshot_files, "_TIME_S", 0.0)
    monkeypatch.setattr(snapshot_files, "_BYTES_PER_S", 2**62)
    monkeypatch.setattr(snapshot_files, "_STEPS", 1)
    with pytest.raises(InvalidRequest, match="takes too long for its size"):
        await store.restore("again", "c", path.stem)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT load_extension('x')",
        "SELECT randomblob(10)",
        "ATTACH 'other' AS other",
        "PRAGMA writable_schema = ON",
        "DELETE FROM items_1",
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n",
    ],
)
async def test_the_file_of_a_snapshot_is_opened_with_few_rights(store: EmbeddedStore, statement: str) -> None:
    with closing(snapshot_files.opened(await crafted(store))) as db, pytest.raises(sqlite3.DatabaseError):
        db.rows(statement)


async def test_a_link_is_no_snapshot(store: EmbeddedStore, tmp_path: Path) -> None:
    path = await crafted(store)
    outside = tmp_path / "outside"
    outside.mkdir()
    path.rename(outside / "secret.sqlite3")
    path.symlink_to(outside / "secret.sqlite3")
    (tmp_path / "snapshots" / "d").symlink_to(outside)
    (outside / path.name).write_bytes((outside / "secret.sqlite3").read_bytes())
    for collection in ("c", "d"):
        assert await store.snapshots(collection) == []
        for use in (
            store.snapshot_path(collection, path.stem),
            store.restore("again", collection, path.stem),
            store.drop_snapshot(collection, path.stem),
        ):
            with pytest.raises(NotFound):
                await use
    with pytest.raises(InvalidRequest, match="is not a regular file"):
        await store.restore_files({"again": path}, {})
    assert len(list(outside.iterdir())) == 2

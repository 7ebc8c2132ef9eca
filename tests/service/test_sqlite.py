"""Tests of service/sqlite.py: creating, checking and upgrading the service's SQLite files."""

import errno
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from service.errors import InsufficientStorage, StorageBusy, StorageDamaged, StorageFailed, StorageReplaced
from service.sqlite import Schema, connect, prepare, transaction, translated

FIRST = Schema("a list of names", 0x74657374, ("\nCREATE TABLE names (name TEXT);\n",), first_version=3)
SECOND = replace(FIRST, scripts=(*FIRST.scripts, "ALTER TABLE names ADD COLUMN age INTEGER;\nCREATE TABLE more (x);\n"))


def columns(path: Path) -> list[str]:
    with closing(connect(path)) as db:
        return [name for _, name, *_ in db.execute("PRAGMA table_info(names)")]


def version(path: Path) -> int:
    with closing(connect(path)) as db:
        (number,) = db.execute("PRAGMA user_version").fetchone()
        return int(number)


def test_a_new_file_has_the_current_version(tmp_path: Path) -> None:
    prepare(tmp_path / "new.sqlite3", SECOND)
    assert columns(tmp_path / "new.sqlite3") == ["name", "age"]
    assert version(tmp_path / "new.sqlite3") == 4


def test_an_older_file_is_upgraded_and_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite3"
    prepare(path, FIRST)
    with closing(connect(path)) as db:
        db.execute("INSERT INTO names VALUES ('Ada')")
    prepare(path, SECOND)
    prepare(path, SECOND)  # a second time changes nothing
    with closing(connect(path)) as db:
        assert db.execute("SELECT * FROM names").fetchall() == [("Ada", None)]
    assert version(path) == 4


def test_a_failed_upgrade_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite3"
    prepare(path, FIRST)
    broken = replace(FIRST, scripts=(*FIRST.scripts, "CREATE TABLE more (x);\nCREATE TABLE broken (;\n"))
    with pytest.raises(StorageFailed):
        prepare(path, broken)
    with closing(connect(path)) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("names",)]
    assert version(path) == 3


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite3"
    prepare(path, SECOND)
    with pytest.raises(StorageFailed, match=r"not a list of names .*version 4; expected .*version 3"):
        prepare(path, FIRST)


def test_a_database_of_another_kind_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite3"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(StorageFailed, match="is not a list of names"):
        prepare(path, FIRST)
    assert path.read_bytes() == before


def test_a_file_that_is_gone_is_not_created_again(tmp_path: Path) -> None:
    prepare(tmp_path / "data" / "new.sqlite3", FIRST)
    (tmp_path / "data" / "new.sqlite3").unlink()
    with pytest.raises(StorageReplaced), translated("it"):
        connect(tmp_path / "data" / "new.sqlite3")
    assert not (tmp_path / "data" / "new.sqlite3").exists()


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_a_transaction_is_committed_only_to_the_file_at_its_path(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "names.sqlite3"
    prepare(path, FIRST)
    with closing(connect(path)) as db:
        with transaction(db):
            db.execute("INSERT INTO names VALUES ('Ada')")
        Path(f"{path}{suffix}").rename(tmp_path / "aside")
        with pytest.raises(StorageReplaced), transaction(db):
            db.execute("INSERT INTO names VALUES ('Bob')")
        assert db.execute("SELECT name FROM names").fetchall() == [("Ada",)]
        (tmp_path / "aside").rename(f"{path}{suffix}")
        with transaction(db):
            db.execute("INSERT INTO names VALUES ('Bob')")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (sqlite3.OperationalError("database is locked"), StorageBusy),
        (sqlite3.OperationalError("database or disk is full"), InsufficientStorage),
        (OSError(errno.ENOSPC, "No space left on device"), InsufficientStorage),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), InsufficientStorage),
        (OSError(errno.EIO, "Input/output error"), StorageFailed),
        (sqlite3.DatabaseError("database disk image is malformed"), StorageDamaged),
        (sqlite3.OperationalError("Could not decode to UTF-8 column 'id' with text 'secret'"), StorageDamaged),
        (sqlite3.OperationalError("disk I/O error"), StorageFailed),
        (sqlite3.IntegrityError("UNIQUE constraint failed: names.name"), StorageFailed),
        (sqlite3.ProgrammingError("Cannot operate on a closed database."), StorageFailed),
    ],
)
def test_each_kind_of_error_has_its_own_class(error: Exception, expected: type[StorageFailed]) -> None:
    with pytest.raises(StorageFailed, match=r"^it") as caught, translated("it"):
        raise error
    assert type(caught.value) is expected
    assert "secret" not in caught.value.detail

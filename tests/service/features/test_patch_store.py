"""Tests of the patch store: what it keeps, how it stays within its budget, and that nothing which happens to its file
makes a call fail.
"""

import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from service.errors import StorageFailed
from service.features import patch_store
from service.features.patch_store import PatchStore
from tests.conftest import ROOT

MIB = 2**20


def value_of(seed: int, size: int = 50_000) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def store(tmp_path: Path):
    store = PatchStore(tmp_path / "patches" / "patches.sqlite3", 64 * MIB)
    yield store
    store.close()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_values_come_back_in_the_order_of_the_keys(store: PatchStore) -> None:
    values = {f"k{i}": value_of(i, size) for i, size in enumerate([0, 1, 100, 16_384, 50_000, 1_000_000])}
    assert store.get_many(list(values)) == [None] * 6
    assert not store.file.exists()  # a read creates nothing
    store.set_many(values)
    assert store.get_many(["k5", "missing", "k0", "k3", "k5"]) == [values["k5"], None, b"", values["k3"], values["k5"]]
    store.set_many({"k0": b"new"})
    assert store.get_many(["k0"]) == [b"new"]


def test_more_keys_than_one_statement_takes(store: PatchStore) -> None:
    values = {f"k{i}": value_of(i, 10) for i in range(1000)}
    store.set_many(values)
    assert store.get_many(list(values)) == list(values.values())


def test_a_second_process_sees_the_entries(store: PatchStore) -> None:
    store.set_many({"a": value_of(1)})
    other = PatchStore(store.file, store.max_bytes)
    other.set_many({"b": value_of(2)})
    assert store.get_many(["a", "b"]) == other.get_many(["a", "b"]) == [value_of(1), value_of(2)]
    other.close()


def test_the_file_stays_within_its_budget_and_keeps_a_full_budget_of_entries(tmp_path: Path) -> None:
    store = PatchStore(tmp_path / "p", 8 * MIB)
    for i in range(400):  # 20 MB
        store.set_many({f"k{i}": value_of(i)})
        assert store.file.stat().st_size <= 8 * MIB
    kept = [value is not None for value in store.get_many([f"k{i}" for i in range(400)])]
    assert 60 <= sum(kept) <= 160
    assert kept[-1]  # a new entry is not the one that is deleted
    store.close()


def test_the_entries_that_are_deleted_are_random(tmp_path: Path) -> None:
    kept = []
    for name in ("a", "b"):
        store = PatchStore(tmp_path / name, 8 * MIB)
        for i in range(200):
            store.set_many({f"k{i}": value_of(i)})
        kept.append([value is None for value in store.get_many([f"k{i}" for i in range(200)])])
        store.close()
    assert kept[0] != kept[1]


def test_repeated_scans_of_more_entries_than_fit_still_find_most_of_them(tmp_path: Path) -> None:
    """With the oldest entry deleted first, each scan would delete the entries that it needs next."""
    store, keys = PatchStore(tmp_path / "p", 8 * MIB), [f"k{i}" for i in range(130)]  # 100 to 120 of them fit
    hits = 0
    for scan in range(4):
        for i, key in enumerate(keys):
            [value] = store.get_many([key])
            if value is None:
                store.set_many({key: value_of(i)})
            else:
                assert value == value_of(i)
                hits += scan > 0
    assert hits / (3 * len(keys)) > 0.3
    store.close()


def test_a_lower_budget_shrinks_the_file(tmp_path: Path) -> None:
    store = PatchStore(tmp_path / "p", 16 * MIB)
    store.set_many({f"k{i}": value_of(i) for i in range(200)})
    store.close()
    size = (tmp_path / "p").stat().st_size
    smaller = PatchStore(tmp_path / "p", 4 * MIB)
    smaller.set_many({"new": value_of(0)})
    assert smaller.get_many(["new"]) == [value_of(0)]
    smaller.close()
    assert size > 9 * MIB
    assert (tmp_path / "p").stat().st_size <= 4 * MIB


def test_a_value_larger_than_half_the_budget_is_not_stored(tmp_path: Path) -> None:
    store = PatchStore(tmp_path / "p", MIB)
    store.set_many({"small": b"x"})
    store.set_many({"large": bytes(MIB)})
    assert store.get_many(["small", "large"]) == [b"x", None]
    store.close()


def test_a_damaged_entry_is_a_miss(store: PatchStore) -> None:
    values = {f"k{i}": value_of(i) for i in range(4)}
    store.set_many(values)
    store.close()
    data = bytearray(store.file.read_bytes())
    at = data.index(value_of(2)[-1000:])  # within the last page of the entry
    data[at] ^= 1
    store.file.write_bytes(data)
    again = PatchStore(store.file, store.max_bytes)
    assert again.get_many(list(values)) == [values["k0"], values["k1"], None, values["k3"]]
    again.close()


@pytest.mark.parametrize("damage", ["noise", "cut", "empty"])
def test_a_damaged_file_is_replaced(store: PatchStore, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store.set_many({f"k{i}": value_of(i) for i in range(40)})
    store.close()
    data = store.file.read_bytes()
    store.file.write_bytes({"noise": value_of(9, len(data)), "cut": data[: len(data) // 3], "empty": b""}[damage])
    again = PatchStore(store.file, store.max_bytes)
    for i in range(40):
        assert again.get_many([f"k{i}"]) in ([None], [value_of(i)])
    again.set_many({"a": b"1"})
    again.set_many({"a": b"1"})  # the first write may find the damage
    assert again.get_many(["a"]) == [b"1"]
    assert damage == "empty" or warnings_of(caplog)
    again.close()


def test_a_file_that_is_cut_off_while_it_is_open_does_not_kill_the_process(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from service.features.patch_store import PatchStore
store = PatchStore(Path(sys.argv[1]), 2**26)
values = {f"k{i}": os.urandom(100_000) for i in range(100)}
store.set_many(values)
store.close()  # moves the entries from the write-ahead log into the file
store = PatchStore(Path(sys.argv[1]), 2**26)
assert store.get_many(list(values)) == list(values.values())
os.truncate(store.file, 100_000)
for _ in range(2):
    found = store.get_many(list(values))
    assert all(value in (None, values[key]) for key, value in zip(values, found))
store.set_many(values)
assert store.get_many(list(values)) == list(values.values())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "patches.sqlite3")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_entries_of_an_image_are_erased_for_all_models_and_processes(store: PatchStore) -> None:
    values = {f"{image}/{model}": value_of(i) for i, image in enumerate("abcd") for model in "12"}
    store.set_many(values)
    before = store.erasures()
    other = PatchStore(store.file, 0)  # of a process that keeps nothing
    other.erase(["a", "unknown", "c"])
    other.close()
    rest = {key: value for key, value in values.items() if key[0] in "bd"}
    assert store.get_many(list(values)) == [rest.get(key) for key in values]
    assert store.stored(list(values)) == set(rest)
    assert store.erasures() != before
    store.erase(["b"])
    assert store.stored(list(values)) == {"d/1", "d/2"}


def test_erasing_nothing_creates_nothing(store: PatchStore) -> None:
    store.erase([])
    assert (store.erasures(), store.file.parent.exists()) == (0, False)


def test_a_store_without_a_budget_keeps_nothing(tmp_path: Path) -> None:
    store = PatchStore(tmp_path / "p", 0)
    store.set_many({"a/1": b"x"})
    assert (store.get_many(["a/1"]), store.stored(["a/1"]), store.file.exists()) == ([None], set(), False)
    with pytest.raises(ValueError, match="max_bytes=-1 must be at least 0"):
        PatchStore(tmp_path / "p", -1)


def test_entries_that_cannot_be_erased_are_an_error(
    store: PatchStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_store, "_BUSY_MS", 50)
    store.set_many({"a/1": b"x"})
    store.close()
    again = PatchStore(store.file, store.max_bytes)
    writer = sqlite3.connect(store.file, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageFailed, match="the patch features of the image cannot be erased: database is locked"):
        again.erase(["a"])
    writer.execute("ROLLBACK")
    writer.close()
    assert again.stored(["a/1"]) == {"a/1"}
    again.close()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageFailed):
        PatchStore(tmp_path / "file" / "p", 0).erase(["a"])


@pytest.mark.parametrize("damage", ["PRAGMA user_version = 1", "noise"])
def test_erasing_deletes_a_file_that_cannot_be_used(store: PatchStore, damage: str) -> None:
    store.set_many({"a/1": b"x"})
    store.close()
    if damage == "noise":
        store.file.write_bytes(value_of(9))
    else:
        with closing(sqlite3.connect(store.file)) as db:
            db.execute(damage)
    again = PatchStore(store.file, store.max_bytes)
    again.erase(["a"])
    assert not store.file.exists()
    again.close()


def test_a_file_of_another_version_is_replaced(store: PatchStore) -> None:
    store.set_many({"a": b"1"})
    store.close()
    db = sqlite3.connect(store.file)
    db.execute("PRAGMA user_version = 99")
    db.close()
    again = PatchStore(store.file, store.max_bytes)
    assert again.get_many(["a"]) == [None]
    again.set_many({"b": b"2"})
    assert again.get_many(["a", "b"]) == [None, b"2"]
    again.close()


def test_the_database_of_another_program_is_left_alone(store: PatchStore, caplog: pytest.LogCaptureFixture) -> None:
    store.file.parent.mkdir()
    db = sqlite3.connect(store.file)
    db.execute("CREATE TABLE theirs (a)")
    db.close()
    before = store.file.read_bytes()
    store.set_many({"a": b"1"})
    assert store.get_many(["a"]) == [None]
    assert store.file.read_bytes() == before
    assert "another program" in warnings_of(caplog)[0]


def test_a_full_disk_is_a_warning(store: PatchStore, caplog: pytest.LogCaptureFixture) -> None:
    store.set_many({"a": value_of(0)})
    with store._connection() as db:  # the only connection, which the next calls use again
        db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
    store.set_many({"b": value_of(1)})
    store.set_many({"c": value_of(2)})
    assert store.get_many(["a", "b"]) == [value_of(0), None]
    assert [text for text in warnings_of(caplog) if "full" in text] == warnings_of(caplog)
    assert len(warnings_of(caplog)) == 1  # not one for each write


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = PatchStore(tmp_path / "file" / "patches.sqlite3", MIB)
    store.set_many({"a": b"1"})
    assert store.get_many(["a"]) == [None]
    assert len(warnings_of(caplog)) == 1
    store.close()


def test_a_closed_store_does_nothing(store: PatchStore, caplog: pytest.LogCaptureFixture) -> None:
    store.set_many({"a": b"1"})
    store.close()
    store.set_many({"b": b"1"})
    assert store.get_many(["a", "b"]) == [None, None]
    assert not warnings_of(caplog)


def test_threads_read_and_write_at_the_same_time(store: PatchStore, caplog: pytest.LogCaptureFixture) -> None:
    def work(thread: int) -> None:
        for i in range(25):
            store.set_many({f"{thread}/{i}": value_of(100 * thread + i)})
            for other in range(4):
                [value] = store.get_many([f"{other}/{i}"])
                assert value in (None, value_of(100 * other + i))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert all(store.get_many([f"{thread}/{i}" for thread in range(4) for i in range(25)]))
    assert not warnings_of(caplog)


def test_threads_that_create_the_file_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    at_once = threading.Barrier(8)

    def work(store: PatchStore, thread: int) -> None:
        at_once.wait()
        store.set_many({str(thread): b"value"})

    with ThreadPoolExecutor(8) as threads:
        for attempt in range(20):
            store = PatchStore(tmp_path / str(attempt), MIB)
            list(threads.map(work, [store] * 8, range(8)))
            assert store.get_many([str(thread) for thread in range(8)]) == [b"value"] * 8, attempt
            store.close()


class Refusing(sqlite3.Connection):
    """A connection that refuses the switch to write-ahead logging `refusals` times, as if another one was switching."""

    refusals = 0

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if "WAL" in sql and self.refusals:
            self.refusals -= 1
            raise sqlite3.OperationalError("database is locked")
        return super().execute(sql, *arguments)


@pytest.mark.parametrize(("refusals", "stored"), [(3, b"value"), (10**9, None)])
def test_a_refused_switch_to_write_ahead_logging_is_tried_again_for_a_while(
    store: PatchStore, monkeypatch: pytest.MonkeyPatch, refusals: int, stored: bytes | None
) -> None:
    monkeypatch.setattr(Refusing, "refusals", refusals)
    monkeypatch.setattr(patch_store, "_BUSY_MS", 100)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, factory=Refusing, **options))
    store.set_many({"a": b"value"})
    assert store.get_many(["a"]) == [stored]


def test_a_killed_process_leaves_whole_entries(tmp_path: Path) -> None:
    script = f"""
import itertools, random, sys
from pathlib import Path
from service.features.patch_store import PatchStore
store = PatchStore(Path({str(tmp_path / "p")!r}), {8 * MIB})
for i in itertools.count():
    store.set_many({{f"k{{j}}": random.Random(j).randbytes(50_000) for j in (2 * i, 2 * i + 1)}})
    print(i, flush=True)
"""
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, env=os.environ)
        assert process.stdout is not None
        for _ in range(20):
            assert process.stdout.readline()
        time.sleep(random.random() / 50)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = PatchStore(tmp_path / "p", 8 * MIB)
        found = [value for i, value in enumerate(store.get_many([f"k{i}" for i in range(40)])) if value == value_of(i)]
        assert len(found) == sum(value is not None for value in store.get_many([f"k{i}" for i in range(40)])) >= 20
        store.set_many({"after": b"1"})
        assert store.get_many(["after"]) == [b"1"]
        store.close()

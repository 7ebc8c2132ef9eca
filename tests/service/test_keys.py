"""Tests of API keys: their form, their file, and how soon other processes notice a change."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from service import keys
from service.errors import StorageFailed, StorageReplaced, Unauthenticated
from service.keys import FILE, KeyStore, granted, key_id_of
from service.security import KeyRing

DAY = 86_400.0
NEVER_CREATED = "dv2_0000000000_" + "A" * 43


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> KeyStore:
    return KeyStore(tmp_path, clock)


def ring(folder: Path, clock: Clock) -> KeyRing:
    """Return the keys of another process: nothing in memory is shared with `store`."""
    opened = KeyRing(KeyStore(folder, clock), frozenset({"open"}), clock)
    opened.refresh()
    return opened


def bearer(text: str) -> bytes:
    return f"Bearer {text}".encode()


def is_valid(opened: KeyRing, text: str) -> bool:
    opened.refresh()
    try:
        opened.principal(bearer(text))
    except Unauthenticated:
        return False
    return True


def test_a_key_has_an_id_a_secret_and_a_checksum(store: KeyStore) -> None:
    text, key = store.create("shop", ["write", "read"])
    prefix, key_id, secret, checksum = text.split("_")
    assert (prefix, key_id, key.name, key.scopes) == ("dv2", key.id, "shop", ("read", "write"))
    assert (len(key_id), len(secret), len(checksum)) == (10, 43, 6)
    assert key_id_of(text.encode()) == key.id
    assert store.all_keys() == [key]


def test_the_form_and_the_checksum_never_change() -> None:
    text = f"{NEVER_CREATED}_{keys._checksum(NEVER_CREATED.encode())}"
    assert text == NEVER_CREATED + "_28Uloz"
    assert key_id_of(text.encode()) == "0000000000"


def test_keys_are_different_and_have_256_random_bits(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {store.create("a", ["read"])[0] for _ in range(20)}
    assert len(made) == 20
    monkeypatch.setattr(keys.secrets, "token_bytes", lambda size: b"\xff" * size)
    largest = store.create("a", ["read"])[0].split("_")[2]
    number = 0
    for digit in largest:
        number = number * 62 + keys._DIGITS.index(digit)
    assert number == 2**256 - 1


@pytest.mark.parametrize("position", range(4, 65))
def test_every_mistyped_character_is_noticed(position: int) -> None:
    text = f"{NEVER_CREATED}_{keys._checksum(NEVER_CREATED.encode())}"
    wrong = "1" if text[position] != "1" else "2"
    assert key_id_of((text[:position] + wrong + text[position + 1 :]).encode()) is None


@pytest.mark.parametrize(
    "change", [str.lower, str.upper, lambda text: text[:-1], lambda text: text + "0", str.swapcase]
)
def test_a_key_in_another_case_or_length_is_malformed(store: KeyStore, change) -> None:
    assert key_id_of(change(store.create("a", ["read"])[0]).encode()) is None


def test_neither_the_key_nor_a_part_of_its_secret_is_stored(store: KeyStore, tmp_path: Path) -> None:
    text, _ = store.create("shop", ["admin"])
    store.rotate("shop", 10.0)
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert text.split("_")[1].encode() in stored
    assert text.split("_")[2].encode() not in stored
    assert text.split("_")[3].encode() not in stored


@pytest.mark.parametrize(
    ("name", "scopes", "expires", "message"),
    [
        ("", ["read"], None, "name '' is not allowed: 1 to 64 letters"),
        ("a b", ["read"], None, "name 'a b' is not allowed"),
        (".hidden", ["read"], None, "name '.hidden' is not allowed"),
        ("n" * 65, ["read"], None, "is not allowed: 1 to 64"),
        ("a\n", ["read"], None, "is not allowed"),
        ("a", [], None, "scopes must be one or more of read, write, admin, not none"),
        ("a", ["read", "root"], None, "not 'root'"),
        ("a", ["read"], 0.0, "after more than 0 s"),
        ("a", ["read"], -5.0, "after more than 0 s"),
        ("a", ["read"], float("nan"), "after more than 0 s"),
    ],
)
def test_bad_arguments_are_refused(store: KeyStore, name: str, scopes: list[str], expires, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        store.create(name, scopes, expires)
    assert store.all_keys() == []


def test_a_scope_includes_the_lower_ones() -> None:
    assert granted(["read"]) == {"read"}
    assert granted(["write"]) == {"read", "write"}
    assert granted(["admin"]) == {"read", "write", "admin"}
    assert granted([]) == frozenset()


def test_a_revocation_is_noticed_by_the_next_request_of_another_process(
    store: KeyStore, clock: Clock, tmp_path: Path
) -> None:
    first, key = store.create("a", ["read"])
    second, _ = store.create("b", ["read"])
    opened = ring(tmp_path, clock)
    assert is_valid(opened, first)
    store.revoke(key.id)
    assert not is_valid(opened, first)
    assert is_valid(opened, second)
    store.revoke(key.id)  # again
    assert [key.revoked for key in store.all_keys()] == [clock.now, None]
    third, _ = store.create("c", ["read"])
    assert is_valid(opened, third)


def test_a_revocation_by_a_process_of_its_own(store: KeyStore, clock: Clock, tmp_path: Path) -> None:
    text, key = store.create("a", ["read"])
    opened = ring(tmp_path, clock)
    assert is_valid(opened, text)
    code = f"import pathlib, service.keys as keys; keys.KeyStore(pathlib.Path({str(tmp_path)!r})).revoke({key.id!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)
    assert not is_valid(opened, text)


def test_a_revocation_without_a_new_stamp_is_noticed_within_a_second(
    store: KeyStore, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was killed after it revoked a key, and before it changed the stamp."""
    seconds = [100.0]
    monkeypatch.setattr("service.security.time.monotonic", lambda: seconds[0])
    text, key = store.create("a", ["read"])
    opened = ring(tmp_path, clock)
    assert is_valid(opened, text)
    monkeypatch.setattr(store.stamp, "bump", lambda: None)
    store.revoke(key.id)
    assert is_valid(opened, text)  # not yet
    seconds[0] += 1.0
    assert not is_valid(opened, text)


def test_replaced_files_are_noticed_within_a_second_and_never_let_everyone_in(
    store: KeyStore, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [100.0]
    monkeypatch.setattr("service.security.time.monotonic", lambda: seconds[0])
    text, _ = store.create("a", ["read"])
    opened = ring(tmp_path, clock)
    assert is_valid(opened, text)
    for path in tmp_path.iterdir():
        path.unlink()
    seconds[0] += 1.0
    with pytest.raises(StorageReplaced):
        is_valid(opened, text)
    assert not (tmp_path / FILE).exists()
    new, key = KeyStore(tmp_path, clock).create("b", ["read"])
    assert not is_valid(opened, text)
    assert is_valid(opened, new)
    KeyStore(tmp_path, clock).revoke(key.id)
    seconds[0] += 1.0
    assert not is_valid(opened, new)
    (tmp_path / FILE).unlink()
    KeyStore(tmp_path, clock)
    seconds[0] += 1.0
    opened.refresh()
    assert opened.has_keys


def test_a_whole_key_can_be_revoked(store: KeyStore, tmp_path: Path) -> None:
    text, key = store.create("a", ["read"])
    assert store.revoke(text).id == key.id
    with pytest.raises(ValueError, match="there is no key with the id 'nobody'"):
        store.revoke("nobody")
    (tmp_path / "other").mkdir()
    other, _ = KeyStore(tmp_path / "other").create("a", ["read"])
    with pytest.raises(ValueError, match="there is no key with the id") as caught:
        store.revoke(other)
    assert other[15:20] not in str(caught.value)


def test_a_name_is_enough_if_one_valid_key_has_it(store: KeyStore, clock: Clock) -> None:
    first, second, expired = (store.create("shop_1", ["read"], seconds)[1] for seconds in (None, None, 5))
    clock.now += 5
    with pytest.raises(ValueError, match=f"2 valid keys are named 'shop_1': .* {first.id}, {second.id}$"):
        store.revoke("shop_1")
    assert all(key.revoked is None for key in store.all_keys())
    store.revoke(first.id)
    assert store.revoke("shop_1").id == second.id
    with pytest.raises(ValueError, match="no valid key with this name"):
        store.revoke("shop_1")
    assert [key.revoked for key in store.all_keys() if key.id == expired.id] == [None]


def test_an_id_counts_before_a_name(store: KeyStore) -> None:
    _, key = store.create("a", ["read"])
    store.create(key.id, ["read"])  # a key whose name is the id of the other
    assert store.revoke(key.id).id == key.id


def test_a_key_expires_while_it_is_remembered(store: KeyStore, clock: Clock, tmp_path: Path) -> None:
    text, _ = store.create("a", ["read"], 90 * DAY)
    opened = ring(tmp_path, clock)
    clock.now += 90 * DAY - 1
    assert is_valid(opened, text)
    clock.now += 1
    assert not is_valid(opened, text)


def test_rotation_overlaps(store: KeyStore, clock: Clock, tmp_path: Path) -> None:
    old, _ = store.create("a", ["write"], 90 * DAY)
    clock.now += DAY
    new, key, older = store.rotate("a", 7 * DAY)
    assert (key.name, key.scopes, key.expires) == ("a", ("write",), clock.now + 90 * DAY)
    assert [one.expires for one in older] == [clock.now + 7 * DAY]
    opened = ring(tmp_path, clock)
    assert is_valid(opened, old)
    assert is_valid(opened, new)
    clock.now += 7 * DAY
    assert not is_valid(opened, old)
    assert is_valid(opened, new)


def test_a_rotation_never_prolongs_a_key(store: KeyStore, clock: Clock) -> None:
    store.create("a", ["read"], DAY)
    expired_at = clock.now + DAY
    _, _, older = store.rotate("a", 7 * DAY, expires_in_s=30 * DAY)
    assert [one.expires for one in older] == [expired_at]
    with pytest.raises(ValueError, match="no valid key is named 'b'; valid keys are named: a"):
        store.rotate("b", DAY)
    for one in store.all_keys():
        store.revoke(one.id)
    with pytest.raises(ValueError, match="valid keys are named: none"):
        store.rotate("a", DAY)


async def test_the_last_use_is_stored_later_and_no_earlier_time_replaces_it(
    store: KeyStore, clock: Clock, tmp_path: Path
) -> None:
    text, key = store.create("a", ["read"])
    one, other = ring(tmp_path, clock), ring(tmp_path, clock)
    seen = store.stamp.read()
    assert is_valid(one, text)
    clock.now += 5
    assert is_valid(other, text)
    assert store.all_keys() == [key]
    await other.save_last_used()
    await one.save_last_used()
    assert store.all_keys()[0].last_used == clock.now
    assert store.stamp.read() == seen, "other processes would forget what they have verified"


def test_a_request_with_a_remembered_key_reads_no_file_and_computes_no_hash(
    store: KeyStore, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, _ = store.create("a", ["read"])
    opened = ring(tmp_path, clock)
    assert is_valid(opened, text)
    calls: list[str] = []
    monkeypatch.setattr("service.security.digest_of_key", lambda text: calls.append("hash"))
    monkeypatch.setattr(KeyStore, "all_keys", lambda self: calls.append("file"))
    assert is_valid(opened, text)
    assert calls == []


@pytest.mark.parametrize("text", ["dv2_x", "sk-123", NEVER_CREATED + "_000000", "none"])
def test_a_malformed_key_is_told_from_its_text_alone(
    store: KeyStore, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    store.create("a", ["read"])
    opened = ring(tmp_path, clock)
    opened._keys = None  # type: ignore[assignment]  # a look-up would fail
    with pytest.raises(Unauthenticated, match="the API key is malformed") as refused:
        opened.principal(bearer(text))
    assert refused.value.reason == "malformed"


def test_headers_that_are_remembered_are_limited(
    store: KeyStore, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.security._MAX_REMEMBERED", 3)
    text, _ = store.create("a", ["read"])
    opened = ring(tmp_path, clock)
    for spaces in range(1, 9):
        assert opened.principal(b"Bearer" + b" " * spaces + text.encode()).name == "a"
        assert len(opened._verified) <= 3
    for number in range(9):
        with pytest.raises(Unauthenticated):
            opened.principal(f"Bearer {number}".encode())
    assert len(opened._verified) <= 3


def test_keys_that_cannot_be_read_let_nobody_in_until_they_can(store: KeyStore, clock: Clock, tmp_path: Path) -> None:
    text, _ = store.create("a", ["read"])
    opened = ring(tmp_path, clock)
    assert is_valid(opened, text)
    file = tmp_path / FILE
    content = sqlite3.connect(file)
    content.execute("ALTER TABLE keys RENAME TO gone")
    content.close()
    store.stamp.bump()
    for _ in range(2):
        with pytest.raises(StorageFailed):
            is_valid(opened, text)
    content = sqlite3.connect(file)
    content.execute("ALTER TABLE gone RENAME TO keys")
    content.close()
    assert is_valid(opened, text)


def test_a_file_of_another_kind_is_not_touched(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / FILE)
    other.execute("CREATE TABLE other (x)")
    other.close()
    with pytest.raises(StorageFailed, match="is not a file of API keys of this version"):
        KeyStore(tmp_path)

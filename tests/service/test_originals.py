"""Tests of images stored under their sha256: in a local folder, in any fsspec file system, and over HTTP."""

import asyncio
import base64
import errno
import hashlib
import os
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from service.errors import InsufficientStorage, NotFound, QuotaExceeded, StorageFailed, StorageReplaced
from service.originals import THREADS, Originals, digest_of, photo_digest, source_of
from service.search.store import Item
from service.settings import Settings, load_settings
from tests.dict_store import DictStore
from tests.fakes import photo, running

SHOP = "/v1/collections/shop"
ITEMS = f"{SHOP}/items"


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def place(folder: Path, data: bytes) -> Path:
    digest = sha256(data)
    return folder / digest[:2] / digest[2:4] / digest


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ---- the store itself


@pytest.mark.parametrize("kind", ["path", "url", "relative", "memory"])
async def test_what_is_put_is_got_and_stored_once(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    places = {
        "path": tmp_path / "kept",
        "url": f"file://{tmp_path}/kept/",
        "relative": "kept",
        "memory": "memory://kept",
    }
    originals = Originals(places[kind])
    assert files(tmp_path) == []  # nothing is made before it is needed
    data = [os.urandom(n) for n in (0, 1, 1000, 300_000)]
    digests = [await originals.put(one) for one in data]
    assert digests == [sha256(one) for one in data]
    assert await asyncio.gather(*(originals.get(digest) for digest in digests)) == data
    if kind != "memory":
        assert files(tmp_path) == sorted(place(tmp_path / "kept", one) for one in data)
        before = place(tmp_path / "kept", data[2]).stat()
        await originals.put(data[2])
        assert place(tmp_path / "kept", data[2]).stat() == before
    else:
        stored = fsspec.filesystem("memory").find("/kept")
        assert sorted(stored) == sorted(f"/kept/{d[:2]}/{d[2:4]}/{d}" for d in digests)
    with pytest.raises(NotFound):
        await originals.get("0" * 64)
    await originals.close()


async def test_the_same_photo_from_many_at_once(tmp_path):
    originals = Originals(tmp_path)
    data = os.urandom(200_000)
    assert set(await asyncio.gather(*(originals.put(data) for _ in range(40)))) == {sha256(data)}
    assert files(tmp_path) == [place(tmp_path, data)]
    assert await originals.get(sha256(data)) == data
    await originals.close()


@pytest.mark.parametrize("damage", [b"", b"half", b"other bytes than 1"])
async def test_a_damaged_photo_is_never_handed_out(tmp_path, damage):
    originals = Originals(tmp_path)
    data = b"the bytes of a pic"
    digest = await originals.put(data)
    place(tmp_path, data).write_bytes(damage)
    with pytest.raises(StorageFailed, match=f"{digest} is damaged"):
        await originals.get(digest)
    await originals.put(data)
    if len(damage) != len(data):  # a part is replaced
        assert await originals.get(digest) == data
    await originals.close()


async def test_a_full_disk_leaves_nothing_behind_and_no_path_in_the_message(tmp_path, monkeypatch):
    originals = Originals(tmp_path)

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "secret"))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InsufficientStorage) as caught:
        await originals.put(b"photo")
    assert caught.value.detail == "the image cannot be stored: No space left on device"
    assert files(tmp_path) == []
    monkeypatch.undo()
    await originals.put(b"photo")
    assert await originals.get(sha256(b"photo")) == b"photo"
    await originals.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
async def test_a_file_that_cannot_be_written_to(tmp_path, monkeypatch):
    originals, real = Originals(tmp_path), Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: path.symlink_to("/dev/full") or real(path, data))
    with pytest.raises(StorageFailed, match="No space left on device"):
        await originals.put(b"p" * 100_000)
    assert files(tmp_path) == []
    await originals.close()


@pytest.mark.parametrize("moved", ["data", "data/originals"])
@pytest.mark.parametrize("is_empty", [False, True])
async def test_nothing_is_stored_or_erased_in_a_folder_that_was_replaced(tmp_path, moved, is_empty):
    (tmp_path / "data").mkdir()
    originals = Originals(tmp_path / "data" / "originals")
    digest = await originals.put(b"photo")
    (tmp_path / moved).rename(tmp_path / "gone")
    if is_empty:
        (tmp_path / "data" / "originals").mkdir(parents=True)
    before = files(tmp_path)
    assert not originals.is_in_place()
    for work in (
        originals.put(b"photo"),
        originals.put(b"another"),
        originals.erase(digest),
        originals.stored_before(time.time()),
    ):
        with pytest.raises(StorageReplaced):
            await work
    assert files(tmp_path) == before
    await originals.close()


async def test_a_folder_that_is_replaced_before_the_first_image(tmp_path):
    (tmp_path / "data").mkdir()
    originals = Originals(tmp_path / "data" / "originals")
    assert originals.is_in_place()
    (tmp_path / "data").rename(tmp_path / "gone")
    (tmp_path / "data").mkdir()
    with pytest.raises(StorageReplaced):
        await originals.put(b"photo")
    assert files(tmp_path) == []
    await originals.close()


@pytest.mark.parametrize("kind", ["path", "memory"])
async def test_the_quota_counts_what_is_stored(tmp_path, monkeypatch, kind):
    where = tmp_path / "kept" if kind == "path" else f"memory://quota-{tmp_path.name}"
    first = Originals(where)
    digest = await first.put(bytes(60))
    originals = Originals(where, max_bytes=100)
    await originals.put(bytes(60))  # stored already
    with pytest.raises(QuotaExceeded, match="have 60 bytes, and max_originals_bytes=100 has no room for 50 more"):
        await originals.put(bytes(50))
    await originals.put(bytes(40))
    await originals.erase(digest)
    await originals.put(bytes(50))
    await first.put(bytes(30))  # by another process
    monkeypatch.setattr("service.originals.COUNT_AGAIN_S", 0.0)
    with pytest.raises(QuotaExceeded, match="have 120 bytes"):
        await originals.put(bytes(1))
    for one in (first, originals):
        await one.close()


async def test_everything_is_synced_before_it_is_told(tmp_path, monkeypatch):
    order = []
    real_sync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (order.append(os.readlink(f"/proc/self/fd/{handle}")), real_sync(handle))
    )
    monkeypatch.setattr(Path, "replace", lambda path, to: (order.append(f"rename {to}"), real_replace(path, to))[1])
    originals = Originals(tmp_path / "kept")
    digest = await originals.put(b"photo")
    path = place(tmp_path / "kept", b"photo")
    assert order[0].endswith(".part")
    assert order[1:] == [f"rename {path}", *map(str, path.parents[:4])]
    assert digest == path.name
    order.clear()
    await originals.put(b"photo")  # whoever stored it may have died before it synced the names
    assert order == list(map(str, path.parents[:3]))
    await originals.close()


async def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    originals = Originals(Path("kept"))
    digest = await originals.put(b"photo")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert await originals.get(digest) == b"photo"
    await originals.close()


async def test_a_remote_storage_is_not_sent_what_it_has(tmp_path):
    originals = Originals("memory://sent")
    sent = []
    real = originals._fs

    class Counting:
        info, cat_file, modified = map(staticmethod, (real.info, real.cat_file, real.modified))

        @staticmethod
        def pipe_file(path: str, data: bytes) -> None:
            sent.append(path)
            real.pipe_file(path, data)

    originals._fs = Counting()
    for _ in range(2):
        digest = await originals.put(b"photo")
    assert len(sent) == 1
    real.pipe_file(sent[0], b"pho")  # a write that was cut off
    await originals.put(b"photo")
    assert len(sent) == 2
    assert await originals.get(digest) == b"photo"
    await originals.close()


async def test_few_calls_are_under_way_at_one_time(tmp_path):
    """Each call holds an image in memory."""
    originals = Originals("memory://few")
    gate, lock, under_way, most = threading.Event(), threading.Lock(), 0, 0

    def slow(_path: str) -> bytes:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
            if under_way == THREADS:
                gate.set()
        gate.wait(10)
        time.sleep(0.01)
        with lock:
            under_way -= 1
        return b"photo"

    originals._fs = type("Slow", (), {"cat_file": staticmethod(slow)})()
    await asyncio.gather(*(originals.get(sha256(b"photo")) for _ in range(4 * THREADS)))
    assert most == THREADS
    await originals.close()
    with pytest.raises(RuntimeError):
        await originals.get(sha256(b"photo"))


def test_which_places_are_the_same(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    kept = Originals(tmp_path / "kept")
    assert kept.is_same_place(Originals(f"file://{tmp_path}/kept/"))
    assert kept.is_same_place(Originals(tmp_path / "link"))
    assert not kept.is_same_place(Originals(tmp_path / "other"))
    assert not kept.is_same_place(Originals(f"memory://{tmp_path}/kept"))
    assert Originals("memory://a").is_same_place(Originals("memory://a"))
    assert not Originals("memory://a").is_same_place(Originals("memory://b"))


def test_an_item_leads_to_the_photo_that_its_source_names():
    named, own = "a" * 64, "b" * 64
    for source, digest, wanted in (
        (source_of(named), own, named),
        (source_of(named), None, named),
        ("https://example.com/x.png", own, own),
        (None, own, own),
        (None, None, None),
    ):
        assert photo_digest(Item("x", np.ones(2), source=source, digest=digest)) == wanted


async def test_a_storage_that_raises_anything(tmp_path):
    class Strange(Exception): ...

    originals = Originals("memory://strange")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise Strange("bucket arn:secret is gone")

    class Failing:
        info = pipe_file = cat_file = staticmethod(fail)

    originals._fs = Failing()
    for call in (originals.put(b"x"), originals.get("0" * 64)):
        with pytest.raises(StorageFailed) as caught:
            await call
        assert "secret" not in caught.value.detail
        assert isinstance(caught.value.__cause__, Strange)
    await originals.close()


async def test_storage_with_folders_of_its_own(tmp_path):
    """On sftp, smb and hdfs `pipe_file` fails if the folder is missing. The folder must then be created."""
    originals = Originals(f"dir::file://{tmp_path}/kept")  # not recognised as local: the way of a remote one
    assert type(originals._fs).__name__ == "DirFileSystem"
    originals._root = ""
    assert await originals.get(await originals.put(b"photo")) == b"photo"
    await originals.close()


async def test_four_photos_at_a_time_are_read(tmp_path):
    originals, lock = Originals("memory://many"), threading.Lock()
    now = most = 0
    four = threading.Event()

    def count(path: str) -> bytes:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == 4:
                four.set()
        four.wait(10)
        time.sleep(0.005)
        with lock:
            now -= 1
        return b"photo"

    digest = await originals.put(b"photo")
    originals._fs = type("Counting", (), {"cat_file": staticmethod(count)})()
    assert await asyncio.gather(*(originals.get(digest) for _ in range(12))) == [b"photo"] * 12
    assert most == 4
    await originals.close()


async def test_slow_storage_does_not_hold_up_the_event_loop(tmp_path):
    originals = Originals("memory://slow")
    gate = threading.Event()
    real = originals._fs.cat_file

    def slow(path: str) -> bytes:
        gate.wait(10)
        return real(path)

    digest = await originals.put(b"photo")
    originals._fs = type("Slow", (), {"cat_file": staticmethod(slow)})()
    reading = asyncio.create_task(originals.get(digest))
    await asyncio.sleep(0.01)
    assert not reading.done()
    gate.set()
    assert await reading == b"photo"
    await originals.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nowhere://user:secret@host/x", "nowhere cannot be opened"),
        ("ssh://user:secret@host/x", "ssh needs a package that is not installed"),
        ("s3://secret-bucket/x", "s3 needs a package that is not installed"),
    ],
)
async def test_an_address_that_cannot_be_opened_is_told_at_the_start_without_its_secrets(tmp_path, url, words):
    with pytest.raises(ValueError, match=words) as caught:
        Originals(url)
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match=words):
        async with running(tmp_path, store=DictStore(), originals_url=url):
            pass


def test_the_setting_is_shown_without_its_secrets(monkeypatch):
    monkeypatch.setenv("DINOV2_ORIGINALS_URL", "ftp://user:secret@host/x?token=secret")
    assert load_settings().shown()["originals_url"] == "ftp://..."
    monkeypatch.setenv("DINOV2_ORIGINALS_URL", "")
    assert load_settings().shown()["originals_url"] is None
    assert Settings(originals_url="folder/x").shown()["originals_url"] == "folder/x"


@pytest.mark.parametrize(
    ("source", "digest"),
    [
        (source_of("a" * 64), "a" * 64),
        (None, None),
        ("", None),
        ("a" * 64, None),
        ("original:" + "A" * 64, None),
        ("original:" + "a" * 63, None),
        ("original:" + "a" * 65, None),
        ("original:" + "a" * 64 + "\n", None),
        ("original:../../etc/passwd", None),
        ("https://original:" + "a" * 64, None),
    ],
)
def test_what_a_source_says(source, digest):
    assert digest_of(source) == digest


def test_the_photo_that_a_source_names_comes_before_the_items_own_digest():
    named, own = "a" * 64, "b" * 64
    vector = np.ones(2, np.float32)
    assert photo_digest(Item("x", vector, {}, source_of(named), own)) == named
    assert photo_digest(Item("x", vector, {}, "erp:17", own)) == own
    assert photo_digest(Item("x", vector, {}, None, None)) is None


# ---- over HTTP


@pytest.mark.parametrize(
    ("kind", "media_type"),
    [
        ("PNG", "image/png"),
        ("JPEG", "image/jpeg"),
        ("WEBP", "image/webp"),
        ("GIF", "image/gif"),
        ("BMP", "image/bmp"),
        ("TIFF", "image/tiff"),
    ],
)
async def test_a_photo_comes_back_as_it_was_sent(tmp_path, kind, media_type):
    image = photo(3, kind=kind)
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put(SHOP, json={"originals": True})
        by_json = await run.client.post(ITEMS, json={"items": [{"id": "a/b", "image": text(image)}]})
        by_form = await run.client.post(ITEMS, files={"file": image})
        item = (await run.client.get(f"{ITEMS}/a/b")).json()
        answers = [await run.client.get(f"{ITEMS}/{name}/image") for name in ("a/b", "a%2Fb", sha256(image))]
    assert (by_json.status_code, by_form.status_code) == (200, 200)
    assert (item["source"], item["digest"]) == (f"original:{sha256(image)}", sha256(image))
    for answer in answers:
        assert answer.status_code == 200
        assert answer.content == image
        assert answer.headers["Content-Type"] == media_type
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert files(tmp_path / "originals") == [place(tmp_path / "originals", image)]


async def test_bytes_that_are_no_photo_are_never_shown_as_one(tmp_path):
    page = b"<script>alert(1)</script>"
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put(SHOP, json={"originals": True})
        await run.service.originals.put(page)
        vector = {"id": "x", "vector": [1.0] * 8, "source": source_of(sha256(page))}
        await run.client.post(ITEMS, json={"items": [vector]})
        answer = await run.client.get(f"{ITEMS}/x/image")
    assert (answer.status_code, answer.content) == (200, page)
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_when_there_is_no_photo(tmp_path):
    image = photo()
    async with running(tmp_path, store=DictStore()) as run:
        missing = await run.client.get(f"{ITEMS}/x/image")
        await run.client.post(ITEMS, json={"items": [{"id": "x", "image": text(image)}]})
        not_kept = await run.client.get(f"{ITEMS}/x/image")
        await run.client.delete(SHOP)
        await run.client.put(SHOP, json={"originals": True})
        vectors = [
            {"id": "v", "vector": [1.0] * 8},
            {"id": "s", "vector": [1.0] * 8, "source": "https://example.com/x.png"},
            {"id": "o", "vector": [1.0] * 8, "source": source_of("0" * 64)},
        ]
        await run.client.post(ITEMS, json={"items": vectors})
        others = [await run.client.get(f"{ITEMS}/{name}/image") for name in ("v", "s", "o", "nobody")]
    assert not (tmp_path / "originals").exists()
    assert (missing.status_code, missing.json()["code"]) == (404, "collection_not_found")
    assert (not_kept.status_code, not_kept.json()["code"]) == (404, "not_found")
    codes = ["not_found"] * 3 + ["item_not_found"]
    assert [(answer.status_code, answer.json()["code"]) for answer in others] == [(404, code) for code in codes]


async def test_a_source_of_ones_own_is_kept_beside_the_photo(tmp_path):
    image = photo()
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put(SHOP, json={"originals": True})
        await run.client.post(ITEMS, json={"items": [{"id": "x", "image": text(image), "source": "erp:17"}]})
        item = (await run.client.get(f"{ITEMS}/x")).json()
        answer = await run.client.get(f"{ITEMS}/x/image")
    assert item["source"] == "erp:17"
    assert answer.content == image


async def test_a_collection_that_keeps_no_photos_gives_none_out_though_another_one_has_it(tmp_path):
    image = photo()
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put(SHOP, json={"originals": True})
        for name in ("shop", "other"):
            added = await run.client.post(
                f"/v1/collections/{name}/items", json={"items": [{"id": "x", "image": text(image)}]}
            )
            assert added.status_code == 200
        kept = await run.client.get(f"{ITEMS}/x/image")
        refused = await run.client.get("/v1/collections/other/items/x/image")
    assert (kept.status_code, kept.content) == (200, image)
    assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
    assert "stores no image" in refused.json()["detail"]


async def test_photos_stay_when_items_go(tmp_path):
    image = photo()
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put(SHOP, json={"originals": True})
        items = [{"id": name, "image": text(image)} for name in "xy"]
        await run.client.post(ITEMS, json={"items": items})
        await run.client.delete(f"{ITEMS}/x")
        gone = await run.client.get(f"{ITEMS}/x/image")
        other = await run.client.get(f"{ITEMS}/y/image")
        await run.client.delete(SHOP)
    assert gone.status_code == 404
    assert other.content == image
    assert files(tmp_path / "originals") == [place(tmp_path / "originals", image)]


async def test_a_photo_that_cannot_be_embedded_is_not_stored(tmp_path):
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put(SHOP, json={"originals": True})
        items = [{"id": "x", "image": text(photo()[:80])}, {"id": "y", "image": text(photo(1))}]
        answer = await run.client.post(ITEMS, json={"items": items, "on_error": "partial"})
    assert [error["index"] for error in answer.json()["errors"]] == [0]
    assert files(tmp_path / "originals") == [place(tmp_path / "originals", photo(1))]


async def test_a_photo_that_cannot_be_stored_is_its_items_fault_and_its_vector_is_not_written(tmp_path):
    images = [photo(seed) for seed in range(3)]
    blocked = place(tmp_path / "originals", images[1]).parent.parent
    blocked.parent.mkdir()
    blocked.write_bytes(b"")  # a file where a folder should be
    items = [{"id": f"{i}", "image": text(image)} for i, image in enumerate(images)]
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put(SHOP, json={"originals": True})
        failed = await run.client.post(ITEMS, json={"items": items})
        nothing = (await run.client.get(SHOP)).json()["count"]
        partial = await run.client.post(ITEMS, json={"items": items, "on_error": "partial"})
        count = (await run.client.get(SHOP)).json()["count"]
    assert (failed.status_code, failed.json()["code"]) == (500, "storage_failed")
    assert nothing == 0
    assert [(error["index"], error["code"]) for error in partial.json()["errors"]] == [(1, "storage_failed")]
    assert count == 2
    for answer in (failed, partial):
        assert str(tmp_path) not in answer.text


async def test_a_damaged_photo_is_reported_over_http(tmp_path):
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put(SHOP, json={"originals": True})
        await run.client.post(ITEMS, json={"items": [{"id": "x", "image": text(photo())}]})
        path = place(tmp_path / "originals", photo())
        path.write_bytes(path.read_bytes()[::-1])
        answer = await run.client.get(f"{ITEMS}/x/image")
    assert (answer.status_code, answer.json()["code"]) == (500, "storage_failed")
    assert "damaged" in answer.json()["detail"]
    assert str(tmp_path) not in answer.text


async def test_photos_in_another_place(tmp_path):
    image = photo(8)
    async with running(tmp_path, store=DictStore(), originals_url="memory://elsewhere") as run:
        await run.client.put(SHOP, json={"originals": True})
        await run.client.post(ITEMS, json={"items": [{"id": "x", "image": text(image)}]})
        answer = await run.client.get(f"{ITEMS}/x/image")
    assert answer.content == image
    assert not (tmp_path / "originals").exists()

"""Tests of the erasure of stored images: which images go, which stay, and what happens at the same time."""

import asyncio
import base64
import hashlib
import os
import time
from pathlib import Path

import numpy as np
import pytest

from service import erasure
from service.erasure import erase_image, erase_unreferenced
from service.errors import Conflict, InvalidRequest, NotFound, StorageFailed
from service.features.patch_store import PatchStore
from service.originals import Originals, source_of
from service.search.embedded import EmbeddedStore
from service.search.store import CollectionSpec, Item
from service.search.transfer import Photos, copy_photos
from tests.dict_store import DictStore
from tests.fakes import photo, running

TAG = "e" * 64 + "/cls/l2/224x224/fp32"
DAY = 86_400.0


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stored_at(folder: Path, digest: str) -> Path:
    return folder / digest[:2] / digest[2:4] / digest


def make_old(folder: Path, digest: str, age_s: float = 2 * DAY) -> None:
    os.utime(stored_at(folder, digest), (time.time() - age_s,) * 2)


def item(item_id: str, *, source: str | None = None, digest: str | None = None) -> Item:
    return Item(item_id, np.ones(8, np.float32), {}, source, digest)


@pytest.fixture
def originals(tmp_path: Path) -> Originals:
    return Originals(tmp_path / "originals")


@pytest.fixture
def patches(tmp_path: Path):
    """A store of patch features with two entries of each of ten images, of two models."""
    opened = PatchStore(tmp_path / "patches" / "patches.sqlite3", 2**24)
    digests = [sha256(f"image {number}".encode()) for number in range(10)]
    opened.set_many({f"{digest}/{model}": b"features" for digest in digests for model in "ab"})
    yield opened
    opened.close()


def entries(patches: PatchStore, *numbers: int) -> list[int]:
    """Return the number of entries of each of these images."""
    digests = [sha256(f"image {number}".encode()) for number in numbers]
    return [len(patches.stored([f"{digest}/{model}" for model in "ab"])) for digest in digests]


@pytest.fixture
async def store(tmp_path: Path):
    """A store with one collection that stores images and one that does not."""
    opened = EmbeddedStore(tmp_path, threads=1, interval_s=60.0)
    for name, stores in (("shop", True), ("plain", False)):
        await opened.create(name, CollectionSpec(TAG, 8, originals=stores))
    yield opened
    await opened.close()


async def put_old(originals: Originals, tmp_path: Path, number: int) -> str:
    digest = await originals.put(f"image {number}".encode())
    make_old(tmp_path / "originals", digest)
    return digest


async def is_stored(originals: Originals, digest: str) -> bool:
    try:
        await originals.get(digest)
    except NotFound:
        return False
    return True


async def test_images_that_no_item_needs_are_erased_and_all_others_stay(store, originals, patches, tmp_path):
    digests = [await put_old(originals, tmp_path, number) for number in range(6)]
    recent = await originals.put(b"recent")
    await store.upsert("shop", [item("a", source=source_of(digests[0]))], tag=TAG)
    await store.upsert("shop", [item("b", source="https://x.example/b.jpg", digest=digests[1])], tag=TAG)
    await store.upsert("plain", [item("c", source=source_of(digests[2]))], tag=TAG)
    await store.upsert("plain", [item("d", digest=digests[3])], tag=TAG)  # this collection stores no images
    await store.upsert("shop", [item("e", source=source_of(digests[4]), digest=digests[5])], tag=TAG)
    assert await erase_unreferenced(store, originals, patches, only_count=True) == erasure.Unreferenced(2, 14)
    assert all([await is_stored(originals, digest) for digest in (*digests, recent)])
    assert entries(patches, 0, 1, 2, 3, 4, 5, 6) == [2] * 7
    assert await erase_unreferenced(store, originals, patches) == erasure.Unreferenced(2, 14)
    assert [await is_stored(originals, digest) for digest in (*digests, recent)] == [
        True,
        True,
        True,
        False,
        True,
        False,
        True,
    ]
    assert entries(patches, 0, 1, 2, 3, 4, 5, 6) == [2, 2, 2, 0, 2, 0, 2]
    assert await erase_unreferenced(store, originals, patches) == erasure.Unreferenced(0, 0)
    await store.drop("shop")
    assert (await erase_unreferenced(store, originals, patches)).images == 3


async def test_nothing_was_ever_stored(store, originals, patches):
    assert await erase_unreferenced(store, originals, patches) == erasure.Unreferenced(0, 0)


async def test_an_image_that_is_stored_again_during_the_search_stays(store, originals, patches, tmp_path, monkeypatch):
    """The race: a request finds the image stored, then the image is erased, then the request writes its item."""
    digest = await put_old(originals, tmp_path, 1)
    real = erasure._digests

    async def reading(store, info):
        async for one in real(store, info):
            yield one
        await originals.put(b"image 1")

    monkeypatch.setattr(erasure, "_digests", reading)
    assert (await erase_unreferenced(store, originals, patches)).images == 0
    await store.upsert("shop", [item("late", source=source_of(digest))], tag=TAG)
    assert await is_stored(originals, digest)


async def test_images_that_are_stored_and_erased_at_once_are_never_lost(originals, tmp_path):
    """An image whose `put` has returned stays, whatever the order of the two calls."""
    folder = tmp_path / "originals"
    data = b"shared image"
    digest = await originals.put(data)
    other = Originals(folder)  # of another process
    erased = 0
    for number in range(300):
        make_old(folder, digest)
        calls = [other.erase(digest, unless_since=time.time() - DAY), originals.put(data)]
        outcomes = await asyncio.gather(*(calls if number % 2 else reversed(calls)), return_exceptions=True)
        erased += any(isinstance(outcome, int) for outcome in outcomes)
        assert await originals.get(digest) == data
    assert list(folder.rglob("*.erasing")) == []
    await other.close()
    assert erased > 0


async def test_a_collection_that_is_copied_during_the_search_is_read_too(
    store, originals, patches, tmp_path, monkeypatch
):
    digest = await put_old(originals, tmp_path, 1)
    await store.upsert("shop", [item("a", source=source_of(digest))], tag=TAG)
    real, calls = erasure._digests, []

    async def reading(store, info):
        calls.append(info.name)
        if calls == ["plain"]:  # renamed while another collection is read
            await store.create("copy", CollectionSpec(TAG, 8))
            await store.upsert("copy", [item("a", source=source_of(digest))], tag=TAG)
            await store.drop("shop")
        async for one in real(store, info):
            yield one

    monkeypatch.setattr(erasure, "_digests", reading)
    assert (await erase_unreferenced(store, originals, patches)).images == 0
    assert await is_stored(originals, digest)
    assert calls == ["plain", "shop", "copy"]


async def test_a_killed_erasure_leaves_no_image_behind_and_loses_none(store, originals, patches, tmp_path):
    needed, rest = await put_old(originals, tmp_path, 1), await put_old(originals, tmp_path, 2)
    await store.upsert("shop", [item("a", source=source_of(needed))], tag=TAG)
    for digest in (needed, rest):
        path = stored_at(tmp_path / "originals", digest)
        path.rename(path.with_name(path.name + ".erasing"))
    assert (await erase_unreferenced(store, originals, patches)).images == 1
    assert await is_stored(originals, needed)
    assert [path.name for path in (tmp_path / "originals").rglob("*") if path.is_file()] == [needed]


async def test_a_named_image_is_erased_only_if_no_item_needs_it(store, originals, patches, tmp_path):
    digest = await put_old(originals, tmp_path, 1)
    await store.upsert("shop", [item("a", source=source_of(digest)), item("b", digest=digest)], tag=TAG)
    await store.upsert("plain", [item("c", source=source_of(digest)), item("d", digest=digest)], tag=TAG)
    with pytest.raises(Conflict, match="the items 'c' of 'plain', 'a' of 'shop', 'b' of 'shop' refer to the image"):
        await erase_image(store, originals, patches, digest)
    assert await is_stored(originals, digest)
    assert entries(patches, 1) == [2]
    erased = await erase_image(store, originals, patches, digest, "keep")
    assert erased.bytes == 7
    assert {tuple(one) for one in erased.items} == {("plain", "c"), ("shop", "a"), ("shop", "b")}
    assert not await is_stored(originals, digest)
    assert entries(patches, 1, 2) == [0, 2]
    assert await store.count("shop") == 2
    with pytest.raises(NotFound, match="is not stored"):
        await erase_image(store, originals, patches, digest)


async def test_the_items_of_a_named_image_can_be_deleted_too(store, originals, patches, tmp_path):
    digest = await put_old(originals, tmp_path, 1)
    await store.upsert("shop", [item("a", source=source_of(digest)), item("x")], tag=TAG)
    assert len((await erase_image(store, originals, patches, digest, "delete")).items) == 1
    assert (await store.get("shop", ["a", "x"]))[0] is None
    assert await store.count("shop") == 1


async def test_a_new_image_is_spared_because_its_item_may_not_be_written_yet(store, originals, patches):
    digest = await originals.put(b"new")
    with pytest.raises(Conflict, match="was stored less than 600 s ago"):
        await erase_image(store, originals, patches, digest)
    assert await is_stored(originals, digest)
    assert (await erase_image(store, originals, patches, digest, "keep")).items == []
    assert not await is_stored(originals, digest)


@pytest.mark.parametrize("digest", ["", "all", "A" * 64, "../" * 21 + "a", "0" * 63])
async def test_what_is_not_a_digest_is_refused(store, originals, patches, digest):
    with pytest.raises(InvalidRequest, match="is not the sha256 of an image: 64 hex digits"):
        await erase_image(store, originals, patches, digest, "keep")


async def test_putting_an_image_again_renews_its_time_stamp_at_most_once_a_minute(originals, tmp_path):
    digest = await put_old(originals, tmp_path, 1)
    path = stored_at(tmp_path / "originals", digest)
    assert await originals.put(b"image 1") == digest
    first = path.stat().st_mtime
    assert time.time() - first < 30
    await originals.put(b"image 1")
    assert path.stat().st_mtime == first
    make_old(tmp_path / "originals", digest)
    await copy_photos([item("a", digest=digest)], Originals(tmp_path / "originals"), originals, photos := Photos())
    assert photos.present == 1
    assert time.time() - path.stat().st_mtime < 30


async def test_a_remote_storage(store, patches, monkeypatch):
    originals = Originals("memory://erasure")
    digest = await originals.put(b"remote")
    assert (await erase_unreferenced(store, originals, patches)).images == 0
    sent = []
    real = originals._fs.pipe_file
    monkeypatch.setattr(originals._fs, "pipe_file", lambda path, data: (sent.append(path), real(path, data)))
    await originals.put(b"remote")
    assert sent == []
    path = originals._path(digest)
    originals._fs.store[path].modified = originals._fs.store[path].modified.replace(year=2020)
    await originals.put(b"remote")  # sent again, because this is the only way to renew its time stamp
    assert sent == [path]
    originals._fs.store[path].modified = originals._fs.store[path].modified.replace(year=2020)
    assert await originals.renew(digest) is False
    assert await erase_unreferenced(store, originals, patches) == erasure.Unreferenced(1, 6)
    assert not await is_stored(originals, digest)
    await originals.close()


async def test_a_storage_without_time_stamps_stores_but_does_not_erase(store, patches, monkeypatch):
    originals = Originals("memory://timeless")

    def modified(path):
        raise NotImplementedError

    monkeypatch.setattr(originals._fs, "modified", modified)
    digest = await originals.put(b"timeless")
    await originals.put(b"timeless")
    with pytest.raises(StorageFailed, match="the image cannot be listed: NotImplementedError"):
        await erase_unreferenced(store, originals, patches)
    assert await is_stored(originals, digest)
    await originals.close()


async def test_over_http(tmp_path):
    image = photo()
    digest = sha256(image)
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put("/v1/collections/shop", json={"originals": True})
        items = [{"id": name, "image": base64.b64encode(image).decode()} for name in "xy"]
        await run.client.post("/v1/collections/shop/items", json={"items": items})
        refused = await run.client.delete(f"/v1/originals/{digest}")
        unknown = await run.client.delete(f"/v1/originals/{digest}?items=none")
        none = await run.client.post("/v1/originals/erase-unreferenced", json={})
        await run.client.delete("/v1/collections/shop/items/x")
        make_old(tmp_path / "originals", digest)
        erased = await run.client.delete(f"/v1/originals/{digest}?items=keep")
        gone = await run.client.get("/v1/collections/shop/items/y/image")
        again = await run.client.delete(f"/v1/originals/{digest}")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert "'x' of 'shop', 'y' of 'shop' refer to the image" in refused.json()["detail"]
    assert (unknown.status_code, again.status_code) == (422, 404)
    assert none.json() == {"images": 0, "bytes": 0, "erased": True}
    assert erased.json() == {
        "digest": digest,
        "erased": True,
        "bytes": len(image),
        "references": 1,
        "items": [{"collection": "shop", "id": "y"}],
        "items_deleted": False,
    }
    assert gone.status_code == 404

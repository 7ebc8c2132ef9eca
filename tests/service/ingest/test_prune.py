"""Tests of `dinov2 index --prune`: which items count as gone."""

import io
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest

from service.ingest.prune import Sources, find_folders, gone_items
from service.ingest.sources import find_photos
from service.search.store import CollectionSpec, Item
from tests.dict_store import DictStore
from tests.fakes import photo

SPEC = CollectionSpec("tag", 2)


def write_tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(photo())
            tar.addfile(info, io.BytesIO(photo()))


async def store_of(source: str) -> DictStore:
    """Return a store with an item for every image in a source."""
    store = DictStore()
    await store.create("shop", SPEC)
    images = [image for image in find_photos([source]) if hasattr(image, "id")]
    items = [
        Item(image.id if image.id.isprintable() else "odd", np.ones(2, np.float32), source=image.source)
        for image in images
    ]
    await store.upsert("shop", items, tag="tag")
    return store


async def gone(store: DictStore, source: str) -> set[str]:
    found = Sources()
    for _ in found.recorded(find_photos([source])):
        pass
    return {item_id async for item_id in gone_items(store, "shop", find_folders([source]), found)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "shelf").mkdir(parents=True)
    for name in ("a.png", "b.png", "shelf/c.png", "ü\u2028.png"):
        (folder / name).write_bytes(photo())
    write_tar(folder / "x.tar", ["d.png", "e.png"])
    write_tar(folder / "y.tar", ["f.png"])
    return folder


async def test_only_items_of_this_folder_whose_file_is_missing_are_gone(folder: Path, tmp_path: Path) -> None:
    store = await store_of(str(folder))
    others = [None, "memory://photos/a.png", str(tmp_path / "photos2" / "a.png"), str(tmp_path / "a.png"), "nope://x"]
    items = [Item(f"other{i}", np.ones(2, np.float32), source=source) for i, source in enumerate(others)]
    await store.upsert("shop", items, tag="tag")
    assert await gone(store, str(folder)) == set()
    (folder / "b.png").unlink()
    (folder / "ü\u2028.png").unlink()
    (folder / "shelf" / "c.png").unlink()
    (folder / "shelf").rmdir()
    assert await gone(store, str(folder)) == {"b.png", "odd", "shelf/c.png"}
    assert await gone(store, f"{folder}/") == {"b.png", "odd", "shelf/c.png"}
    (folder / "shelf").write_text("a file where the folder was")
    assert "shelf/c.png" in await gone(store, str(folder))


async def test_files_that_exist_but_are_not_indexed_any_more_stay(folder: Path) -> None:
    store = await store_of(str(folder))
    (folder / "b.png").unlink()
    (folder / "b.png").mkdir()
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(folder / "nowhere")  # reported as a problem of this run
    assert await gone(store, str(folder)) == set()


async def test_members_of_archives(folder: Path) -> None:
    store = await store_of(str(folder))
    write_tar(folder / "x.tar", ["e.png"])
    (folder / "y.tar").unlink()
    assert await gone(store, str(folder)) == {"x.tar/d.png", "y.tar/f.png"}
    whole = (folder / "x.tar").read_bytes()
    (folder / "x.tar").write_bytes(whole[:100])  # a damaged archive says nothing about its members
    assert await gone(store, str(folder)) == {"y.tar/f.png"}


async def test_members_of_an_archive_that_was_not_opened_stay(folder: Path) -> None:
    store = await store_of(str(folder))
    found = Sources()
    images = [image for image in find_photos([str(folder)]) if "x.tar" not in image.source]  # as if it were unlisted
    for _ in found.recorded(images):
        pass
    assert [item_id async for item_id in gone_items(store, "shop", find_folders([str(folder)]), found)] == []


async def test_folders_of_an_object_store() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/prune/a.png": photo(), "/prune/b.png": photo()})
    store = await store_of("memory://prune")
    memory.rm("/prune/b.png")
    assert await gone(store, "memory://prune") == {"b.png"}


def test_only_folders_can_be_compared(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.tar is not a folder"):
        find_folders([str(folder), str(folder / "x.tar")])

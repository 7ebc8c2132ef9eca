"""Tests of `dinov2 index --prune`: which items count as gone."""

import io
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest

from service.ingest.folders import Problem
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


async def store_of(*sources: str) -> DictStore:
    """Return a store with an item for every image in a source."""
    store = DictStore()
    await store.create("shop", SPEC)
    images = [image for image in find_photos(sources) if hasattr(image, "id")]
    items = [
        Item(image.id if image.id.isprintable() else "odd", np.ones(2, np.float32), source=image.source)
        for image in images
    ]
    await store.upsert("shop", items, tag="tag")
    return store


async def gone(store: DictStore, *sources: str) -> set[str]:
    found = Sources()
    for _ in found.recorded(find_photos(sources)):
        pass
    return {item_id async for item_id in gone_items(store, "shop", find_folders(sources), found)}


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


async def test_a_source_without_images_keeps_its_items(folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "d.png").write_bytes(photo())
    store = await store_of(str(folder), str(disk))
    (folder / "b.png").unlink()
    (disk / "d.png").unlink()
    assert await gone(store, str(folder), str(disk)) == {"b.png"}
    (disk / "notes.txt").write_text("")
    assert await gone(store, str(folder), str(disk)) == {"b.png"}


@pytest.mark.parametrize("left", [".", "2024", ".DS_Store", "2024/.hidden/a.txt"])
async def test_an_empty_folder_keeps_its_items(folder: Path, left: str) -> None:
    disk = folder / "disk"
    (disk / "2024" / "may").mkdir(parents=True)
    for name in ("g.png", "2024/may/h.png"):
        (disk / name).write_bytes(photo())
    store = await store_of(str(folder))
    shutil.rmtree(disk)
    if left in (".", "2024"):
        (disk / left).mkdir(parents=True)
    else:
        (disk / left).parent.mkdir(parents=True)
        (disk / left).write_text("")
    assert await gone(store, str(folder)) == set()
    (disk / "other").mkdir()
    (disk / "other" / "i.txt").write_text("")
    shutil.rmtree(disk / "2024", ignore_errors=True)
    assert await gone(store, str(folder)) == {"disk/g.png", "disk/2024/may/h.png"}


@pytest.mark.parametrize("name", ["link", "link.zip"])
async def test_items_below_a_broken_link_to_a_folder_stay(folder: Path, tmp_path: Path, name: str) -> None:
    disk = tmp_path / "disk"
    (disk / "2024").mkdir(parents=True)
    (disk / "2024" / "g.png").write_bytes(photo())
    (folder / name).symlink_to(disk)
    store = await store_of(str(folder))
    disk.rename(tmp_path / "away")
    (folder / "b.png").unlink()
    assert await gone(store, str(folder)) == {"b.png"}


async def test_items_below_a_folder_that_was_a_problem_of_the_run_stay(folder: Path) -> None:
    (folder / "shelf" / "deep").mkdir()
    (folder / "shelf" / "deep" / "g.png").write_bytes(photo())
    store = await store_of(str(folder))
    shutil.rmtree(folder / "shelf")
    found = Sources()
    for _ in found.recorded([*find_photos([str(folder)]), Problem(str(folder / "shelf"), "cannot be read")]):
        pass
    assert [item_id async for item_id in gone_items(store, "shop", find_folders([str(folder)]), found)] == []


async def test_an_archive_that_changes_after_the_first_check_keeps_its_items(folder: Path) -> None:
    store = await store_of(str(folder))
    write_tar(folder / "x.tar", ["e.png"])
    found, folders = Sources(), find_folders([str(folder)])
    for _ in found.recorded(find_photos([str(folder)])):
        pass
    for _ in range(2):
        assert [item_id async for item_id in gone_items(store, "shop", folders, found)] == ["x.tar/d.png"]
    write_tar(folder / "x.tar", ["d.png", "e.png", "more.png", *"0123456789abcdef"])
    assert [item_id async for item_id in gone_items(store, "shop", folders, found)] == []


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


async def test_folders_of_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/prune/a.png": photo(), "/prune/b.png": photo()})
    store = await store_of("memory://prune")
    other = Item("other", np.ones(2, np.float32), source="nope://prune/a.png")
    await store.upsert("shop", [other], tag="tag")
    memory.rm("/prune/b.png")
    forgotten: list[bool] = []
    monkeypatch.setattr(type(memory), "invalidate_cache", lambda system, path=None: forgotten.append(True))
    assert await gone(store, "memory://prune") == {"b.png"}
    assert forgotten  # otherwise, a file system such as s3fs answers from the listings that the run has read


def test_only_folders_can_be_compared(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.tar is not a folder"):
        find_folders([str(folder), str(folder / "x.tar")])

"""Tests of the frozen set: which images are chosen, that the list stays, and that a changed image is an error."""

import json
import shutil
from pathlib import Path

import pytest

from model.decode import DecodeLimits
from service.jobs.frozen_set import FrozenSet, open_frozen_set
from tests.fakes import photo


def fill(folder: Path, *names: str, seed: int = 0) -> None:
    """Write an image for each name, all different."""
    for at, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo(seed + at))


def labels_of(frozen: FrozenSet) -> dict[str, str | None]:
    return {image.path: image.label for image in frozen.images}


def test_the_list_stays_when_images_are_added(tmp_path: Path) -> None:
    folder, file = tmp_path / "images", tmp_path / "gate" / "set.json"
    fill(folder, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    first = open_frozen_set(file, folder)
    assert labels_of(first) == {"a/1.png": "a", "a/2.png": "a", "b/1.png": "b", "b/2.png": "b"}
    fill(folder, "a/3.png", "c/1.png", seed=10)
    assert open_frozen_set(file, folder) == first
    assert str(tmp_path) not in file.read_text()
    assert len(open_frozen_set(tmp_path / "new.json", folder).images) == 6


@pytest.mark.parametrize("damage", ["changed", "missing", "missing folder"])
def test_a_changed_or_missing_image_is_named(tmp_path: Path, damage: str) -> None:
    folder, file = tmp_path / "images", tmp_path / "set.json"
    fill(folder, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    open_frozen_set(file, folder)
    if damage == "changed":
        (folder / "b" / "2.png").write_bytes(photo(99))
    elif damage == "missing":
        (folder / "b" / "2.png").unlink()
    else:
        shutil.rmtree(folder / "b")
    word = "has changed: its sha256 is" if damage == "changed" else "cannot be read: No such file"
    with pytest.raises(ValueError, match=rf"b/[12]\.png: an image of the frozen set {word}"):
        open_frozen_set(file, folder)


def test_the_choice_depends_on_the_content_only(tmp_path: Path) -> None:
    for name, order in (("one", range(40)), ("two", reversed(range(40)))):
        for at, seed in enumerate(order):
            fill(tmp_path / name, f"{at:02}.png", seed=seed)
    limit = {"most": 15}
    one, two = (open_frozen_set(tmp_path / f"{name}.json", tmp_path / name, **limit) for name in ("one", "two"))
    assert one.digest == two.digest
    assert {image.path for image in one.images} != {image.path for image in two.images}
    assert len(one.images) == 15
    fill(tmp_path / "one", *(f"new/{at}.png" for at in range(10)), seed=100)
    grown = open_frozen_set(tmp_path / "grown.json", tmp_path / "one", **limit)
    kept = {image.sha256 for image in one.images} & {image.sha256 for image in grown.images}
    assert len(kept) == 15 - sum(image.path.startswith("new/") for image in grown.images)
    assert len(kept) >= 9


def test_duplicates_and_unreadable_files_are_left_out(tmp_path: Path) -> None:
    told: list[str] = []
    fill(tmp_path, "a.png", "b.png", "c.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    (tmp_path / "broken.png").write_bytes(photo(5)[:60])
    (tmp_path / "notes.txt").write_text("no image")
    file = tmp_path / "lists" / "set.json"
    frozen = open_frozen_set(file, tmp_path, tell=told.append)
    assert sorted(image.path for image in frozen.images) == ["a.png", "b.png", "c.png"]
    assert len(told) == 1
    assert told[0].startswith("left out broken.png: ")
    with pytest.raises(ValueError, match="0 usable images"):
        open_frozen_set(tmp_path / "small.json", tmp_path, limits=DecodeLimits(max_pixels=100))
    assert not (tmp_path / "small.json").exists()


def test_train_and_val_become_two_parts(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/1.png", "train/a/2.png", "train/b/1.png", "val/a/deep/1.png", "val/b/1.png", "val/2.png")
    frozen = open_frozen_set(tmp_path / "set.json", tmp_path)
    assert {image.path for image in frozen.part("index")} == {"train/a/1.png", "train/a/2.png", "train/b/1.png"}
    assert {image.path: image.label for image in frozen.part("query")} == {"val/a/deep/1.png": "a", "val/b/1.png": "b"}


def test_without_classes_the_held_out_images_are_used(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "train/2.png", "val/1.png", "val/2.png")
    frozen = open_frozen_set(tmp_path / "set.json", tmp_path)
    assert not frozen.has_labels
    assert labels_of(frozen) == {"val/1.png": None, "val/2.png": None}
    assert frozen.part("query") == []


def test_folders_need_not_be_classes(tmp_path: Path) -> None:
    fill(tmp_path, "monday/1.png", "monday/2.png", "tuesday/1.png")
    assert not open_frozen_set(tmp_path / "set.json", tmp_path, labels=False).has_labels
    fill(tmp_path / "one", "only/1.png", "only/2.png", "3.png")
    frozen = open_frozen_set(tmp_path / "one.json", tmp_path / "one")
    assert not frozen.has_labels
    assert len(frozen.images) == 3


def test_a_file_that_is_not_a_list_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "1.png", "2.png")
    file = tmp_path / "set.json"
    file.write_text(json.dumps({"format_version": 1, "images": [{"path": "1.png", "sha256": "0"}]}))
    with pytest.raises(ValueError, match=r"set\.json: not the list of a frozen set"):
        open_frozen_set(file, tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        open_frozen_set(tmp_path / "other.json", tmp_path / "nowhere")

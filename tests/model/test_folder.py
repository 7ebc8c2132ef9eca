"""Tests of the rule for the files of a folder: which are images, how they are counted, and what splits are called."""

import os
from pathlib import Path

import pytest

from model.folder import (
    HELD_OUT,
    IMAGE_SUFFIXES,
    OTHER_SUFFIXES,
    Account,
    ignored_as,
    sample_names,
    split_folder,
    split_folders,
    split_names,
    suffix_of,
    walk,
)

PNG = b"\x89PNG\r\n\x1a\n"


def unread() -> bytes:
    raise AssertionError("the file was opened")


@pytest.mark.parametrize("name", ["a.jpg", "A.JPEG", "a.b.Jfif", "a.heic"])
def test_a_suffix_of_images_decides_without_opening_the_file(name: str) -> None:
    assert ignored_as(name, unread) is None


@pytest.mark.parametrize(
    ("name", "kind"), [("a.TXT", ".txt"), ("a.jpg.json", ".json"), ("._a.jpg", "hidden"), (".jpg", "hidden")]
)
def test_what_is_certainly_no_image_is_not_opened(name: str, kind: str) -> None:
    assert ignored_as(name, unread) == kind


@pytest.mark.parametrize(
    ("name", "kind"), [("README", "without suffix"), ("a.", "without suffix"), ("a.XYZ", ".xyz"), ("a.jpg~", ".jpg~")]
)
def test_the_first_bytes_decide_about_other_names(name: str, kind: str) -> None:
    assert ignored_as(name, lambda: PNG) is None
    assert ignored_as(name, lambda: b"text") == kind
    assert ignored_as(name, lambda: b"") == kind


def test_the_two_tables_have_nothing_in_common() -> None:
    assert not IMAGE_SUFFIXES & OTHER_SUFFIXES
    assert all(suffix_of(f"a{suffix}") == suffix for suffix in IMAGE_SUFFIXES | OTHER_SUFFIXES)


def test_a_folder_is_walked_in_the_order_of_path_components(tmp_path: Path) -> None:
    names = ["a/z.png", "a-b/y.png", "a.png", "a b/ü ñ.png", "日本/ä.PNG", "B/x.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    assert [Path(listed.path) for listed in walk(tmp_path)] == sorted(tmp_path / name for name in names)


def test_a_root_may_be_hidden_or_a_link_and_a_folder_may_be_linked_twice(tmp_path: Path) -> None:
    (tmp_path / ".hidden" / "a").mkdir(parents=True)
    (tmp_path / ".hidden" / "a" / "1.png").write_bytes(PNG)
    (tmp_path / ".hidden" / "b").symlink_to("a")
    (tmp_path / "root").symlink_to(".hidden")
    (tmp_path / ".hidden" / "a" / "up").symlink_to(tmp_path / "root")
    for root in (tmp_path / ".hidden", tmp_path / "root"):
        found = list(walk(root))
        assert [os.path.relpath(listed.path, root) for listed in found if listed.is_image] == ["a/1.png", "b/1.png"]
        assert [listed.ignored for listed in found if listed.ignored] == ["links to a folder above"] * 2


def test_a_folder_that_is_missing_is_a_problem(tmp_path: Path) -> None:
    (listed,) = walk(tmp_path / "none")
    assert (listed.is_folder, listed.is_image, listed.problem) == (True, False, "No such file or directory")


@pytest.mark.parametrize("held_out", [*HELD_OUT, "Val", "TEST"])
def test_names_of_splits(tmp_path: Path, held_out: str) -> None:
    assert split_names(["other", held_out, "Train"]) == ("Train", held_out)
    assert split_names([held_out]) is None
    assert split_names(["train", "trainval", "other"]) is None
    for name in ("train", held_out):
        (tmp_path / name).mkdir()
    assert split_folders(tmp_path) == (tmp_path / "train", tmp_path / held_out)
    assert split_folder(tmp_path, "val") == tmp_path / held_out
    assert split_folder(tmp_path / "train", "val") == tmp_path / "train" / "val"
    assert split_folders(tmp_path / "none") is None


def test_the_first_of_several_splits_is_used() -> None:
    assert split_names(["Train", "train", "test", "validation", "VAL", "val"]) == ("train", "val")
    assert split_names(["train", "test", "validation"]) == ("train", "validation")


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ("cats/2.left.png", ["cats/2.left", "cats/2"]),
        ("v1.5/a.png", ["v1.5/a"]),
        ("img.0001.x.jpg", ["img.0001.x", "img.0001", "img"]),
        ("a", ["a"]),
    ],
)
def test_names_of_samples(member: str, expected: list[str]) -> None:
    assert sample_names(member) == expected


def test_an_account_is_one_line() -> None:
    account = Account()
    assert str(account) == "0 files: 0 used, 0 ignored, 0 failed"
    account.used = 1
    assert str(account) == "1 file: 1 used, 0 ignored, 0 failed"
    account.ignored.update({".txt": 3, "hidden": 1, "hidden folders": 2, "links to a folder above": 1, ".\nb\udcff": 1})
    for index in range(2000):
        account.fail(f"{index}\n.jpg", "broken")
    account.archives = 2
    assert str(account) == (
        "2006 files: 1 used, 5 ignored (3 .txt, 1 .\\nb\\xff, 1 hidden), 2000 failed (0\\n.jpg, 1\\n.jpg, 2\\n.jpg, "
        "others); hidden folders: 2; links to a folder above: 1; archives: 2"
    )
    assert len(account.problems) == 1000
    account.ignored.update({f".{index}": 1 for index in range(100)})
    assert ", 91 of other kinds)" in str(account)

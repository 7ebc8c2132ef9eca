"""Tests of the images of a retraining's gate: the training must see none of them, nor copies of them."""

import shutil
from pathlib import Path

import pytest

from service.jobs.gate_images import GateImages, gate_images
from tests.fakes import photo


def fill(folder: Path, count: int, seed: int = 0) -> Path:
    """Write images of two classes, which are numbered from `seed`."""
    for n in range(seed, seed + count):
        path = folder / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(n))
    return folder


def chosen(tmp_path: Path, data: list[Path], folder: Path, least: int = 3, *, write: bool = True) -> GateImages:
    lines.clear()
    return gate_images(tmp_path / "data", [str(each) for each in data], folder, least, lines.append, write=write)


lines: list[str] = []


def test_a_share_of_the_images_is_held_out(tmp_path: Path) -> None:
    shop = fill(tmp_path / "shop", 40)
    images = chosen(tmp_path, [shop], shop)
    assert images.held_out
    assert len(images.frozen.images) == 4  # a tenth
    assert images.frozen.has_labels
    assert sorted(images.excluded) == sorted(str(shop / image.path) for image in images.frozen.images)
    assert len(chosen(tmp_path, [shop], shop, 12).frozen.images) == 4  # the list is kept


def test_the_choice_stays_when_images_are_added(tmp_path: Path) -> None:
    shop = fill(tmp_path / "shop", 30)
    first = chosen(tmp_path, [shop], shop)
    fill(shop, 30, seed=30)
    assert chosen(tmp_path, [shop], shop) == first


@pytest.mark.parametrize(("count", "least", "expected"), [(30, 10, 10), (29, 10, None), (12, 1, 2), (5, 1, None)])
def test_the_least_number_is_held_out_if_it_is_at_most_a_third(
    tmp_path: Path, count: int, least: int, expected: int | None
) -> None:
    shop = fill(tmp_path / "shop", count)
    images = chosen(tmp_path, [shop], shop, least)
    if expected is None:
        assert (images.held_out, images.excluded, len(images.frozen.images)) == (False, (), count)
        assert f"too few to hold out {least}" in lines[-1]
    else:
        assert (images.held_out, len(images.excluded)) == (True, expected)


def test_copies_of_held_out_images_are_left_out_too(tmp_path: Path) -> None:
    shop, other = fill(tmp_path / "shop", 30), fill(tmp_path / "other", 3, seed=100)
    first = chosen(tmp_path, [shop, other], shop)
    copy = other / "a" / "copy.png"
    shutil.copy(shop / first.frozen.images[0].path, copy)
    assert set(chosen(tmp_path, [shop, other], shop).excluded) == {*first.excluded, str(copy)}


def test_images_of_another_folder_are_left_out_where_the_training_has_copies(tmp_path: Path) -> None:
    shop, gate = fill(tmp_path / "shop", 10), fill(tmp_path / "gate", 6, seed=8)  # 8 and 9 are in both folders
    images = chosen(tmp_path, [shop], gate)
    assert images.held_out
    assert len(images.frozen.images) == 6
    assert sorted(images.excluded) == [str(shop / "a" / "8.png"), str(shop / "b" / "9.png")]


def test_a_folder_within_the_data_is_left_out_as_a_whole(tmp_path: Path) -> None:
    shop = fill(tmp_path / "shop", 10)
    gate = fill(shop / "gate", 4, seed=50)
    assert len(chosen(tmp_path, [shop], gate).excluded) == 4


def test_a_held_out_part_is_used_instead(tmp_path: Path) -> None:
    shop = tmp_path / "shop"
    fill(shop / "train", 12)
    fill(shop / "val", 6, seed=10)  # 10 and 11 are in both parts
    images = chosen(tmp_path, [shop], shop)
    assert images.held_out
    assert len(images.frozen.part("query")) == 4  # a file that is in both parts belongs to the index
    assert not any("/val/" in path for path in images.excluded)  # the training holds these out by itself


def test_nothing_is_written_in_a_dry_run(tmp_path: Path) -> None:
    shop, gate = fill(tmp_path / "shop", 40), fill(tmp_path / "gate", 4, seed=50)
    planned = chosen(tmp_path, [shop], shop, write=False), chosen(tmp_path, [shop], gate, write=False)
    assert not (tmp_path / "data").exists()
    assert planned == (chosen(tmp_path, [shop], shop), chosen(tmp_path, [shop], gate))
    assert planned[0] == chosen(tmp_path, [shop], shop, write=False)

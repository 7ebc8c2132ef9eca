"""Folders of photos: depth, splits, broken files, and the order of a run."""

import numpy as np
import pytest
import torch
from PIL import Image

from training.dataset import batch_indices, find_images, load_photos, read_photo, split_folder


def save(path, size=(20, 10), color=(200, 10, 10), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def test_images_are_found_at_any_depth_and_other_files_ignored(tmp_path):
    expected = [save(tmp_path / "a.png"), save(tmp_path / "x" / "y" / "z" / "b.JPG", format="jpeg")]
    (tmp_path / "notes.txt").write_text("no image")
    assert find_images(tmp_path) == sorted(expected)


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_images_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=name):
        find_images(tmp_path / name)


def test_broken_files_are_skipped_and_listed(tmp_path):
    good = save(tmp_path / "good.jpg")
    whole = save(tmp_path / "whole.png", size=(300, 300)).read_bytes()
    bad = {
        "empty.jpg": b"",
        "text.png": b"hello",
        "cut.png": whole[: len(whole) // 2],
        "half.jpg": good.read_bytes()[:90],
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.jpg").mkdir()
    cache = load_photos(find_images(tmp_path), 16)
    assert [p.name for p in cache.paths] == ["good.jpg", "whole.png"]
    assert {s.path.name for s in cache.skipped} == set(bad)
    assert all(s.reason for s in cache.skipped)


def test_only_broken_files_is_an_error(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"bad\.jpg"):
        load_photos(find_images(tmp_path), 16)


def test_photos_are_upright_rgb_squares_with_their_aspect(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    save(tmp_path / "turned.jpg", size=(40, 10), exif=exif)
    Image.new("L", (30, 10), 7).save(tmp_path / "gray.png")
    cache = load_photos(find_images(tmp_path), 16)
    assert cache.pixels.shape == (2, 3, 16, 16)
    assert cache.pixels.dtype == torch.uint8
    assert cache.aspect.tolist() == [3.0, 0.25]
    assert (cache.pixels[0] == 7).all()
    assert read_photo(tmp_path / "turned.jpg").shape == (40, 10, 3)


def test_a_folder_with_train_and_val_is_taken_at_its_word(tmp_path):
    train, val = save(tmp_path / "train" / "a" / "1.png"), save(tmp_path / "val" / "a" / "2.png")
    split = split_folder(tmp_path, 0.1, seed=0)
    assert (split.train, split.held_out) == ([train], [val])


def test_otherwise_a_share_is_held_out_by_seed(tmp_path):
    paths = {save(tmp_path / "a" / f"{i}.png") for i in range(20)}
    split = split_folder(tmp_path, 0.25, seed=0)
    assert len(split.held_out) == 5
    assert {*split.train, *split.held_out} == paths
    assert split == split_folder(tmp_path, 0.25, seed=0)
    assert split != split_folder(tmp_path, 0.25, seed=1)


def test_an_epoch_shows_every_photo_once_and_the_next_in_another_order():
    def epoch(number):
        return torch.cat([batch_indices(12, 4, step, seed=3) for step in range(3 * number, 3 * number + 3)])

    assert sorted(epoch(0).tolist()) == list(range(12))
    assert sorted(epoch(1).tolist()) == list(range(12))
    assert epoch(0).tolist() != epoch(1).tolist()
    assert np.array_equal(batch_indices(12, 4, 4, seed=3), epoch(1)[4:8])


def test_a_photo_too_thin_for_the_evaluation_is_skipped_at_loading(tmp_path):
    save(tmp_path / "good.png")
    save(tmp_path / "thin.png", size=(300, 2))
    cache = load_photos(find_images(tmp_path), 16)
    assert [p.name for p in cache.paths] == ["good.png"]
    assert [s.path.name for s in cache.skipped] == ["thin.png"]

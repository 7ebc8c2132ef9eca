"""The images of a run are listed before its settings are final: what is listed, how it is divided, what is refused."""

import pytest
from PIL import Image

from tests.training.tiny import ALONE, QUIET
from training.data.listing import SourceSettings, list_images


def save(path, color=(200, 10, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), color).save(path)
    return path


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_images_are_listed_and_divided_without_a_batch_size(tmp_path):
    for i in range(10):
        save(tmp_path / "images" / "a" / f"{i}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    listing = list_images(SourceSettings((str(tmp_path / "images"),), tmp_path / "run", 0, 0.3), ALONE, QUIET)
    assert (len(listing.train), len(listing.held_out)) == (7, 3)
    assert sorted(names(listing.train) + names(listing.held_out)) == names(listing.source)
    assert listing.ignored == {".txt": 1}
    assert [item.name for item in listing.skipped] == ["gone.png"]


def test_data_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match="missing does not exist"):
        list_images(SourceSettings((str(tmp_path / "missing"),), tmp_path / "run", 0, 0.3), ALONE, QUIET)

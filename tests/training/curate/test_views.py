"""Tests of the views of evaluation images: crops, mixtures of colours, and their store."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.artifact import bundled_artifact
from tests.training.curate.small_images import FakeEmbedder, picture
from training.curate import views
from training.curate.copies.hashes import perceptual_hash
from training.curate.progress import in_lines
from training.curate.scan import Scanned, ScanSettings, scan
from training.curate.views import Views, crops, mixture_hashes, stored_views
from training.curate.workers import Workers


def test_crops_are_the_corners_and_the_centre() -> None:
    pixels = np.arange(100 * 200 * 3, dtype=np.uint32).reshape(100, 200, 3)
    parts = crops(pixels)  # type: ignore[arg-type]
    assert [part.shape for part in parts] == [(87, 174, 3)] * 5
    assert (parts[0] == pixels[:87, :174]).all()
    assert (parts[3] == pixels[13:, 26:]).all()
    assert (parts[4] == pixels[6:93, 13:187]).all()
    assert [part.shape for part in crops(pixels[:1, :1])] == [(1, 1, 3)] * 5  # type: ignore[arg-type]


def test_mixtures_are_of_one_and_of_two_channels() -> None:
    rng = np.random.default_rng(0)
    pixels = np.asarray(Image.fromarray(rng.integers(256, size=(9, 9, 3), dtype=np.uint8)).resize((64, 64)))
    hashes = mixture_hashes(pixels)
    assert [int(one) for one in hashes[:3]] == [perceptual_hash(pixels[..., channel]) for channel in range(3)]
    mean = (pixels[..., 0].astype(np.uint16) + pixels[..., 2] + 1) // 2
    assert int(hashes[4]) == perceptual_hash(mean.astype(np.uint8))


@pytest.fixture
def scanned(tmp_path: Path, embedder: type[FakeEmbedder]) -> Scanned:
    (tmp_path / "images").mkdir()
    for number in range(20):
        picture(number).save(tmp_path / "images" / f"{number:02}.png")
    settings = ScanSettings((str(tmp_path / "images"),), tmp_path / "scan", bundled_artifact(), "cls", 8)
    return scan(settings, Workers(1), in_lines(print), "scan")


def make(scanned: Scanned, cache: Path) -> Views:
    return stored_views(scanned, bundled_artifact(), "cls", cache, Workers(1), in_lines(print))


def test_views_are_made_once(scanned: Scanned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(scanned, tmp_path / "cache")
    n, dimension = scanned.images.embedding.shape
    assert made.embedding.shape == (n, 6, dimension)
    assert made.phash.shape == (n, 7)
    assert (made.embedding[:, 0] == scanned.images.embedding).all()
    assert (made.phash[:, 0] == scanned.images.phash).all()
    embed = FakeEmbedder(bundled_artifact(), "cls", tmp_path)
    for number in (0, 17):  # of the first and of the last part
        pixels = scanned.pixels(number)
        assert (made.embedding[number, 1:] == [embed(crop) for crop in crops(pixels)]).all()
        assert (made.phash[number, 1:] == mixture_hashes(pixels)).all()
    monkeypatch.setattr(views, "Embedder", None)
    again = make(scanned, tmp_path / "cache")
    assert again.embedding.tobytes() == made.embedding.tobytes()
    assert again.phash.tobytes() == made.phash.tobytes()


def test_an_image_that_has_vanished_is_named(scanned: Scanned, tmp_path: Path) -> None:
    (tmp_path / "images" / "13.png").unlink()
    with pytest.raises(OSError, match=r"13\.png"):
        make(scanned, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))

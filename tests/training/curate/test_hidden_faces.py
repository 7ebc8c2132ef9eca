"""Tests of hiding faces when images are read, with a stand-in for the detector."""

from pathlib import Path

import numpy as np
import pytest

from model.artifact import bundled_artifact
from tests.training.curate.small_images import fill_folder, picture
from tests.training.curate.test_scan import ONE, TRACK
from training.curate import hidden_faces
from training.curate.faces import FaceSettings
from training.curate.scan import Scanned, ScanSettings, scan
from training.curate.settings import load_settings
from training.data.dataset import decode


class OneFace:
    """Finds a face in the upper left corner of pictures whose first pixel is brighter than the given one."""

    runs = 0

    def __init__(self, *args: object) -> None: ...

    def find(self, pixels: np.ndarray) -> np.ndarray:
        type(self).runs += 1
        is_face = pixels[0, 0, 0] > 127
        return np.array([[0, 0, 16, 16]], np.float32) if is_face else np.zeros((0, 4), np.float32)


@pytest.fixture
def detector(monkeypatch) -> type[OneFace]:
    OneFace.runs = 0
    monkeypatch.setattr(hidden_faces, "find_model", lambda: Path("centerface.onnx"))
    monkeypatch.setattr(hidden_faces, "FaceDetector", OneFace)
    return OneFace


def run(source: Path, folder: Path, faces: FaceSettings | None) -> Scanned:
    return scan(ScanSettings((str(source),), folder, bundled_artifact(), "cls", 8, faces), ONE, TRACK, "scan")


def test_the_scan_sees_hidden_faces_and_the_detector_runs_once(tmp_path: Path, embedder, detector) -> None:
    source = fill_folder(tmp_path / "in", 6)
    plain = run(source, tmp_path / "plain", None)
    hidden = run(source, tmp_path / "hidden", FaceSettings())
    has_face = [int(np.asarray(picture(seed))[0, 0, 0]) > 127 for seed in (0, 2, 4, 1, 3, 5)]
    assert 0 < sum(has_face) < 6
    changed = (plain.images.sha256 != hidden.images.sha256).any(1)
    assert changed.tolist() == has_face
    face = has_face.index(True)
    assert not np.array_equal(hidden.pixels(face)[:16, :16], plain.pixels(face)[:16, :16])
    assert np.array_equal(hidden.pixels(face)[24:, 24:], plain.pixels(face)[24:, 24:])
    assert np.array_equal(decode(hidden.encoded(face)), hidden.pixels(face))
    assert detector.runs == 6


def test_other_settings_of_the_detector_need_another_scan(tmp_path: Path, embedder, detector) -> None:
    source = fill_folder(tmp_path / "in", 3)
    first = run(source, tmp_path / "work", FaceSettings())
    assert not run(source, tmp_path / "work", FaceSettings()).is_new
    assert run(source, tmp_path / "work", FaceSettings(grow=2.0)).folder != first.folder


def test_faces_cannot_be_hidden_in_images_that_stay_where_they_are() -> None:
    with pytest.raises(ValueError, match=r"faces.hide needs write.form=shards"):
        load_settings(None, ["faces.hide=true", "write.form=list"])

"""Tests of hiding faces when images are read, with a stand-in for the detector."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import cli
from model.artifact import bundled_artifact
from tests.training.curate.small_images import fill_folder, picture
from tests.training.curate.test_scan import ONE, TRACK
from training.curate import hidden_faces
from training.curate.faces import FaceSettings
from training.curate.manifest import read_manifest
from training.curate.run import Curation, Tools, curate
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


def test_the_certificate_of_a_dataset_with_hidden_faces_is_that_of_its_files(
    tmp_path: Path, embedder, detector
) -> None:
    source = fill_folder(tmp_path / "in", 8)
    evaluation = fill_folder(tmp_path / "evaluation", 2, first=50)
    picture(50).save(source / "a" / "leak.png")
    out = tmp_path / "out"
    settings = load_settings(
        None,
        [
            *("faces.hide=true", "scan.min_side=8", "stages=['copies', 'leaks', 'write']"),
            *(f"leaks.evaluation={evaluation}", "copies.neighbours=2", "leaks.candidates=2"),
        ],
    )
    curate(Curation((str(source),), out, settings), Tools(ONE, ONE, TRACK, lambda line: None))
    originals = {hashlib.sha256(path.read_bytes()).hexdigest() for path in source.rglob("*.png")}
    kept = [entry for entry in read_manifest(out) if entry.part is not None]
    assert 0 < len([entry for entry in kept if entry.sha256 not in originals]) < len(kept)
    assert next(entry.stage for entry in read_manifest(out) if entry.key == "1/a/leak.png") == "leaks"
    verify = ["curation", "verify", str(out), "--evaluation", str(evaluation)]
    verified = CliRunner().invoke(cli.app, verify)
    assert verified.exit_code == 0, verified.output
    assert f"no leaks: {len(kept)} images" in verified.stdout
    shard = next(out.glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes().replace(b"IHDR", b"IHDS", 1))
    changed = CliRunner().invoke(cli.app, verify)
    assert changed.exit_code == 2
    assert "1 of 8 images were changed or added" in changed.output

"""Tests of the artifact that `--model` selects."""

import shutil

import pytest

from model.artifact import MANIFEST, ArtifactError, bundled_artifact, describe_file, read_manifest
from service import artifact_choice as models
from service.artifact_choice import choose_artifact
from tests.fakes import plain_photo


def put(data_dir, *, name="mine", created="2026-01-01T00:00:00+00:00"):
    """Create a folder with the bundled artifact's manifest under another name and time."""
    manifest = read_manifest(bundled_artifact()).model_copy(update={"name": name, "created": created})
    folder = data_dir / "artifacts" / f"{name}-{created[:10]}"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


def test_auto_is_the_bundled_one_until_the_data_folder_has_one_and_then_its_newest(tmp_path):
    assert choose_artifact("auto", tmp_path) == bundled_artifact()
    put(tmp_path)
    newest = put(tmp_path, created="2026-03-01T00:00:00+00:00")
    put(tmp_path, created="2026-02-01T00:00:00+00:00")
    assert choose_artifact("auto", tmp_path) == newest


def test_a_folder_a_folders_name_and_a_models_name(tmp_path):
    mine = put(tmp_path)
    assert choose_artifact(str(mine), tmp_path / "elsewhere") == mine
    assert choose_artifact(mine.name, tmp_path) == mine
    assert choose_artifact("mine", tmp_path) == mine


def test_a_published_name_takes_its_export_when_there_is_one(tmp_path):
    exported = put(tmp_path, name="dinov2_vits14")
    assert choose_artifact("dinov2_vits14", tmp_path) == exported
    assert choose_artifact("facebook/dinov2-small", tmp_path) == exported


def test_what_names_nothing_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not an artifact folder"):
        choose_artifact(str(tmp_path / "empty"), tmp_path)
    with pytest.raises(ValueError, match="dinov2_vits14"):
        choose_artifact("dinov2_vits41", tmp_path)


def test_images_are_taken_from_all_over_a_folder(tmp_path):
    for i in range(12):
        (tmp_path / f"class{i // 6}").mkdir(exist_ok=True)
        (tmp_path / f"class{i // 6}" / f"{i:02}.png").write_bytes(plain_photo(10 * i))
    greys = [int(image[0, 0, 0]) // 10 for image in models.read_photos(tmp_path, 4)]
    assert greys == [0, 3, 6, 9]
    (tmp_path / "class1" / "06.png").write_bytes(b"no image")
    told = []
    greys = [int(image[0, 0, 0]) // 10 for image in models.read_photos(tmp_path, 4, told.append)]
    assert greys == [0, 3, 9, 1]  # another in the place of the one that cannot be read
    assert len(told) == 1
    assert "06.png" in told[0]


def test_one_image_is_too_few_to_compare_engines_on(tmp_path):
    (tmp_path / "a.png").write_bytes(plain_photo(1))
    with pytest.raises(ValueError, match="at least two readable images, found 1"):
        models.read_photos(tmp_path, 4)
    (tmp_path / "b.png").write_bytes(plain_photo(2))
    assert len(models.read_photos(tmp_path, 4)) == 2


def test_an_artifact_from_a_url_whose_graph_was_swapped_does_not_get_its_name(tmp_path):
    there = tmp_path / "there"
    shutil.copytree(bundled_artifact(), there)
    assert choose_artifact(there.as_uri(), tmp_path / "honest").is_dir()
    (there / "model.onnx").write_bytes(b"another graph")
    manifest = read_manifest(there)
    files = {**manifest.files, "model.onnx": describe_file(there / "model.onnx")}
    (there / MANIFEST).write_text(manifest.model_copy(update={"files": files}).model_dump_json())
    with pytest.raises(ArtifactError, match=r"model\.onnx: not the graph"):
        choose_artifact(there.as_uri(), tmp_path / "data")
    assert list((tmp_path / "data" / "artifacts").iterdir()) == []

"""Tests of adding dino.txt to an artifact and opening it: wrong, changed and foreign files are refused."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from model.artifact import Artifact, bundled_artifact, load_artifact, read_manifest
from model.config import ViTConfig
from model.dinotxt.store import (
    RECORD,
    TEXT_ENCODER,
    VISION_HEAD,
    VOCABULARY,
    DinoTxtError,
    DinoTxtNotFound,
    Sources,
    add_dinotxt,
    list_dinotxt,
    open_dinotxt,
)
from tests.model.dinotxt_files import VOCAB_SIZE, random_tensors, text_encoder_shapes, write_sources
from tests.model.torch_files import write_torch_file


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_at(tmp_path / "artifacts" / "small")


def artifact_at(path: Path, fingerprint: str = "ab" * 32, registers: int = 4) -> Artifact:
    config = ViTConfig(embed_dim=64, depth=2, num_heads=1, img_size=70, num_register_tokens=registers)
    manifest = read_manifest(bundled_artifact()).model_copy(
        update={"config": config, "fingerprint": fingerprint, "name": "small"}
    )
    path.mkdir(parents=True, exist_ok=True)
    return Artifact(path, manifest, {})


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    folder = tmp_path / "downloads"
    folder.mkdir()
    return write_sources(folder)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_added_can_be_opened(artifact: Artifact, tmp_path: Path, suffix: str) -> None:
    sources = write_sources(tmp_path, suffix=suffix)
    folder = add_dinotxt(artifact, sources)
    assert folder == artifact.path / "heads" / "dinotxt"
    assert sorted(path.name for path in folder.iterdir()) == sorted([RECORD, TEXT_ENCODER, VISION_HEAD, VOCABULARY])
    expected = random_tensors(text_encoder_shapes(), seed=2)
    stored = load_file(folder / TEXT_ENCODER)
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(tensor, expected[name])

    [record] = list_dinotxt(artifact)
    opened = open_dinotxt(artifact)
    assert opened.record == record
    assert record.sources.keys() == {path.name for path in sources}
    assert opened.tokenizer.end == VOCAB_SIZE - 1
    assert opened.text_encoder.encode([opened.tokenizer.prompt("a cat")]).shape == (1, 128)
    assert opened.vision_head.refine(np.ones((1, 30, 64), np.float32)).shape == (1, 30, 64)
    assert open_dinotxt(artifact, "dinotxt") is opened
    assert [path.name for path in folder.parent.iterdir()] == ["dinotxt"]  # no temporary folder remains


def test_half_precision_files_are_stored_as_float32(artifact: Artifact, sources: Sources) -> None:
    tensors = {name: array.astype(np.float16) for name, array in random_tensors(text_encoder_shapes()).items()}
    write_torch_file(sources.text_encoder, tensors)
    stored = load_file(add_dinotxt(artifact, sources) / TEXT_ENCODER)
    for name, tensor in stored.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, tensors[name])


def test_a_name_is_used_once_unless_replaced(artifact: Artifact, sources: Sources) -> None:
    folder = add_dinotxt(artifact, sources)
    first = open_dinotxt(artifact)
    with pytest.raises(DinoTxtError, match=f"{folder}: exists already"):
        add_dinotxt(artifact, sources)
    write_torch_file(sources.text_encoder, random_tensors(text_encoder_shapes(), seed=9))
    add_dinotxt(artifact, sources, replace=True)
    second = open_dinotxt(artifact)
    prompts = [[1, 2, 3]]
    assert np.abs(first.text_encoder.encode(prompts) - second.text_encoder.encode(prompts)).max() > 0.1
    add_dinotxt(artifact, sources, "other")
    with pytest.raises(DinoTxtNotFound, match=r"a single dino.txt head: it has dinotxt, other"):
        open_dinotxt(artifact)
    assert open_dinotxt(artifact, "other").record.name == "other"


def test_an_artifact_without_dinotxt_says_how_to_get_it(artifact: Artifact) -> None:
    with pytest.raises(DinoTxtNotFound, match=r"it has none\. Add Meta's files for dinov2_vitl14_reg"):
        open_dinotxt(artifact)


def test_a_read_only_artifact_is_not_changed(
    artifact: Artifact, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert add_dinotxt(artifact, sources).is_relative_to(artifact.derived)


def test_the_bundled_artifact_is_not_changed(sources: Sources, tmp_path: Path) -> None:
    bundled = load_artifact(bundled_artifact(), derived_dir=tmp_path)
    with pytest.raises(DinoTxtError, match="vision head has width 64, but this backbone has width 192"):
        add_dinotxt(bundled, sources)
    relative = Path(os.path.relpath(bundled.path))
    fitting = Artifact(relative, artifact_at(tmp_path / "x").manifest, {}, tmp_path / "derived")
    assert add_dinotxt(fitting, sources).is_relative_to(tmp_path / "derived")
    assert open_dinotxt(fitting).record.name == "dinotxt"
    assert not (bundled.path / "heads").exists()


def test_files_in_the_wrong_order_are_refused(artifact: Artifact, sources: Sources) -> None:
    swapped = sources._replace(vision_head=sources.text_encoder, text_encoder=sources.vision_head)
    with pytest.raises(DinoTxtError, match="this is a vision head"):
        add_dinotxt(artifact, swapped)
    assert not (artifact.path / "heads").exists()


def test_values_that_are_not_finite_are_refused(artifact: Artifact, sources: Sources) -> None:
    tensors = random_tensors(text_encoder_shapes())
    tensors["backbone.ln_final.bias"][3] = np.nan
    write_torch_file(sources.text_encoder, tensors)
    with pytest.raises(DinoTxtError, match=r"tensor backbone\.ln_final.bias has values that are not finite"):
        add_dinotxt(artifact, sources)
    assert list((artifact.path / "heads").iterdir()) == []


def test_a_backbone_without_registers_is_refused(tmp_path: Path, sources: Sources) -> None:
    with pytest.raises(DinoTxtError, match="4 registers, but this backbone has 0"):
        add_dinotxt(artifact_at(tmp_path / "plain", registers=0), sources)


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "a" * 65])
def test_a_name_that_is_not_a_plain_folder_is_refused(artifact: Artifact, sources: Sources, name: str) -> None:
    with pytest.raises(DinoTxtError, match="name"):
        add_dinotxt(artifact, sources, name)


def test_missing_files_are_named(artifact: Artifact, sources: Sources, tmp_path: Path) -> None:
    for field in Sources._fields:
        wrong = sources._replace(**{field: tmp_path / "absent"})
        with pytest.raises(DinoTxtError, match="absent"):
            add_dinotxt(artifact, wrong)


@pytest.mark.parametrize("name", [TEXT_ENCODER, VISION_HEAD, VOCABULARY])
def test_a_changed_file_is_refused(artifact: Artifact, sources: Sources, name: str) -> None:
    path = add_dinotxt(artifact, sources) / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DinoTxtError, match=f"{name}: its size or hash differs"):
        open_dinotxt(artifact)
    path.unlink()
    with pytest.raises(DinoTxtError, match=f"{name}: No such file"):
        open_dinotxt(artifact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "cd" * 32}, "it belongs to the model with fingerprint cdcdcdcd, not to abababab"),
        ({"name": "else"}, "it names other files, or another folder than dinotxt"),
        ({"files": {}}, "it names other files"),
        ({"more": 1}, "not a record of dino.txt: .*more"),
    ],
)
def test_a_wrong_record_is_refused_and_not_listed(
    artifact: Artifact, sources: Sources, caplog: pytest.LogCaptureFixture, change: dict[str, object], message: str
) -> None:
    path = add_dinotxt(artifact, sources) / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DinoTxtError, match=message):
        open_dinotxt(artifact)
    with caplog.at_level(logging.WARNING):
        assert list_dinotxt(artifact) == []
    assert "dino.txt left out" in caplog.text

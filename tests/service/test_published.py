"""Tests that a published model is downloaded, exported and chosen, without torch, whatever the network does."""

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from model import config as model_config
from model import zoo
from model.artifact import MANIFEST, ArtifactError, bundled_artifact, load_artifact, read_manifest
from model.config import CONFIGS, ViTConfig
from model.convert import HUGGING_FACE, _file_names, backbone_shapes
from model.files import lock_file
from service.artifact_choice import choose_artifact
from tests.model.torch_files import torch_file
from tests.model.weights_server import Server, weights_server

NAME = "dinov2_vits14_reg"  # a name without a known hash
CONFIG = ViTConfig(embed_dim=24, depth=2, num_heads=2, num_register_tokens=4, pos_embed_rule="antialias")


def weights(config: ViTConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in backbone_shapes(config).items()}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of random weights for a published name, which stands for a small network here."""
    monkeypatch.setitem(model_config.CONFIGS, NAME, CONFIG)
    with weights_server(torch_file(weights(CONFIG))) as running:
        monkeypatch.setenv("DINOV2_META_URL", running.url)
        monkeypatch.setenv("DINOV2_HUGGING_FACE_URL", f"{running.url}/hf")
        yield running


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing torch fails, and find_spec finds none


@pytest.mark.usefixtures("no_torch")
def test_a_published_model_is_downloaded_exported_and_verified_without_torch(server: Server, tmp_path: Path) -> None:
    steps: list[str] = []
    path = choose_artifact(NAME, tmp_path, steps.append)
    artifact = load_artifact(path)
    assert path.parent == tmp_path / "artifacts"
    assert artifact.manifest.name == NAME
    assert artifact.manifest.licence == "Apache-2.0"
    assert artifact.manifest.provenance["url"] == f"{server.url}/{zoo.ENTRIES[NAME].path}"
    assert [record.reference for record in artifact.manifest.parity] == ["numpy float64"]
    assert artifact.manifest.parity[0].max_abs_error < 1e-4
    for name, array in weights(CONFIG).items():
        np.testing.assert_array_equal(artifact.weights[name], array)
    assert steps[0].startswith(f"downloading {NAME}: 0 of")
    assert steps[-1] == f"exporting {NAME}: writing the graph and comparing it with a reference"
    assert [file.name for file in (tmp_path / "downloads").iterdir() if not file.name.endswith(".lock")] == []
    assert choose_artifact(NAME, tmp_path) == choose_artifact("facebook/dinov2-with-registers-small", tmp_path) == path
    assert len(server.requests) == 1


@pytest.mark.usefixtures("no_torch")
def test_broken_connections_and_wrong_bytes_are_survived(server: Server, tmp_path: Path) -> None:
    server.sent_per_connection = [30_000, 20_000]
    server.wrong_answers = 1
    assert load_artifact(choose_artifact(NAME, tmp_path)).manifest.name == NAME
    assert len(server.requests) == 4  # the first with a wrong byte, two that continue it, and one from the start


def test_torch_is_the_reference_where_it_is_installed(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="this is about an installation with torch: pip install '.[train]'")
    manifest = read_manifest(choose_artifact(NAME, tmp_path))
    assert [record.reference for record in manifest.parity] == ["torch float32"]


@pytest.mark.usefixtures("no_torch")
def test_two_services_download_and_export_once(server: Server, tmp_path: Path) -> None:
    server.pause_s = 0.005
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(choose_artifact(NAME, tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2
    assert len(set(paths)) == 1
    assert len(server.requests) == 1


@pytest.mark.usefixtures("no_torch")
def test_offline_the_message_names_the_file_and_its_place(server: Server, tmp_path: Path) -> None:
    server.statuses = [403, 403]
    with pytest.raises(OSError, match=f"cannot download {NAME}") as caught:
        choose_artifact(NAME, tmp_path)
    place = tmp_path / "downloads" / "dinov2_vits14_reg4_pretrain.pth"
    assert f"put the file at {place}" in str(caught.value)
    place.write_bytes(server.content)  # the user does so
    assert load_artifact(choose_artifact(NAME, tmp_path)).manifest.name == NAME
    assert len(server.requests) == 2


@pytest.mark.usefixtures("no_torch")
def test_weights_of_another_model_are_refused(server: Server, tmp_path: Path) -> None:
    server.content = torch_file(weights(replace(CONFIG, num_register_tokens=0)))
    with pytest.raises(ValueError, match=r"missing keys: 1 \(register_tokens\)"):
        choose_artifact(NAME, tmp_path)
    assert not list((tmp_path / "artifacts").glob("*"))


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("name", zoo.ENTRIES)
def test_both_publishers_files_give_the_same_artifact(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIGS[name], embed_dim=24, depth=2, num_heads=2)
    monkeypatch.setitem(model_config.CONFIGS, name, config)
    entry = replace(zoo.ENTRIES[name], size_bytes=None, sha256=None)  # the weights are random
    for other in (name, *entry.aliases):
        monkeypatch.setitem(zoo._BY_ANY_NAME, other, entry)
    monkeypatch.setitem(zoo.ENTRIES, name, entry)
    arrays = weights(config)
    files = {}
    for key, array in arrays.items():
        names = _file_names(key, HUGGING_FACE)
        files |= dict(zip(names, np.split(array, len(names)), strict=True))
    fingerprints = set()
    for content, statuses, alias in (
        (torch_file(arrays), [], entry.timm_name),
        (safetensors.numpy.save(files), [404], entry.hf_name),
    ):
        with weights_server(content) as running:
            monkeypatch.setenv("DINOV2_META_URL", running.url)
            monkeypatch.setenv("DINOV2_HUGGING_FACE_URL", running.url)
            running.statuses = statuses
            artifact = load_artifact(choose_artifact(alias, tmp_path / alias.replace("/", "-")))
        assert artifact.manifest.config == config
        fingerprints.add(artifact.fingerprint)
    assert len(fingerprints) == 1


# An artifact at a URL


@pytest.mark.usefixtures("no_torch")
def test_an_artifact_is_copied_from_a_url_once(server: Server, tmp_path: Path) -> None:
    remote = choose_artifact(NAME, tmp_path / "elsewhere")
    steps: list[str] = []
    path = choose_artifact(f"file://{remote}/", tmp_path, steps.append)
    assert path == tmp_path / "artifacts" / remote.name
    assert load_artifact(path).fingerprint == load_artifact(remote).fingerprint
    assert [step.split(" ")[1] for step in steps] == ["weights.safetensors", "model.onnx"]
    assert choose_artifact(f"file://{remote}", tmp_path, steps.append) == path
    assert len(steps) == 2
    shutil.rmtree(path)
    (remote / "model.onnx").unlink()  # a derived file may be absent
    assert choose_artifact(f"file://{remote}", tmp_path) == path
    assert not (path / "model.onnx").exists()
    assert load_artifact(path).name == remote.name


@pytest.mark.usefixtures("no_torch")
def test_a_damaged_artifact_at_a_url_leaves_nothing_and_no_other_artifact_is_replaced(
    server: Server, tmp_path: Path
) -> None:
    remote = choose_artifact(NAME, tmp_path / "elsewhere")
    whole = (remote / "model.onnx").read_bytes()
    (remote / "model.onnx").write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        choose_artifact(f"file://{remote}", tmp_path)
    assert not list((tmp_path / "artifacts").glob("*"))
    (remote / "model.onnx").write_bytes(whole)
    other = tmp_path / "artifacts" / remote.name
    shutil.copytree(bundled_artifact(), other)
    with pytest.raises(ArtifactError, match="is another artifact than file://"):
        choose_artifact(f"file://{remote}", tmp_path)
    assert load_artifact(other).fingerprint == load_artifact(bundled_artifact()).fingerprint


@pytest.mark.usefixtures("no_torch")
def test_weights_that_do_not_fit_are_not_used_again(server: Server, tmp_path: Path) -> None:
    right = server.content
    server.content = torch_file({"norm.bias": np.ones(24, np.float32), "cls_token": np.ones((1, 1, 24), np.float32)})
    with pytest.raises(ValueError, match="missing keys"):
        choose_artifact(NAME, tmp_path)
    server.content = right
    assert load_artifact(choose_artifact(NAME, tmp_path)).manifest.name == NAME


@pytest.mark.usefixtures("no_torch")
def test_a_file_put_there_by_hand_stays(server: Server, tmp_path: Path) -> None:
    place = tmp_path / "downloads" / "dinov2_vits14_reg4_pretrain.pth"
    place.parent.mkdir()
    place.write_bytes(torch_file({"cls_token": np.ones((1, 1, 24), np.float32)}))
    with pytest.raises(ValueError, match=f"To download the weights again, delete {place}"):
        choose_artifact(NAME, tmp_path)
    place.write_bytes(server.content)
    assert load_artifact(choose_artifact(NAME, tmp_path)).manifest.name == NAME
    assert place.exists()
    assert server.requests == []


@pytest.mark.usefixtures("no_torch")
def test_what_a_killed_export_left_is_deleted(server: Server, tmp_path: Path) -> None:
    left = tmp_path / "artifacts" / ".exporting-killed"
    left.mkdir(parents=True)
    (left / "weights.safetensors").write_bytes(b"x")
    os.utime(left, (0, 0))
    running = tmp_path / "artifacts" / ".exporting-running"
    running.mkdir()
    with lock_file(running / ".lock"):
        os.utime(running, (0, 0))
        choose_artifact(NAME, tmp_path)
    assert not left.exists()
    assert running.exists()


def test_urls_without_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nosuch://x/y: cannot be opened: "):
        choose_artifact("nosuch://x/y", tmp_path)
    with pytest.raises(FileNotFoundError):
        choose_artifact(f"file://{tmp_path}/none", tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / MANIFEST).write_text("{}")
    with pytest.raises(ArtifactError, match="not a manifest"):
        choose_artifact(f"file://{tmp_path}/bad", tmp_path)
    assert not list((tmp_path / "artifacts").glob("*"))

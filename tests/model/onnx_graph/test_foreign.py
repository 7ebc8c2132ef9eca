"""A graph that does not come from the weights next to it is refused, even if the manifest lists its hash."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from model.artifact import ONNX, ArtifactError, StoredWeights, bundled_artifact, describe_file, load_artifact
from model.onnx_graph import build
from model.onnx_graph.build import graph_digests, write_onnx
from model.onnx_graph.spec import GraphSpec


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return shutil.copytree(bundled_artifact(), tmp_path / "artifact")


def edit(artifact: Path, **changes: Any) -> None:
    """Change the manifest, and describe the files in it as they are now."""
    manifest = json.loads((artifact / "manifest.json").read_text()) | changes
    files = {name: describe_file(artifact / name).model_dump() for name in {*manifest["files"]} if name != "README.md"}
    manifest["files"] |= files
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def listed(artifact: Path, name: str) -> dict[str, Any]:
    """The manifest's list of files with one more file."""
    return json.loads((artifact / "manifest.json").read_text())["files"] | {name: {}}


def poisoned(path: Path) -> None:
    """Change one weight of a graph, so that it still runs and gives other features."""
    model = onnx.load(path)
    tensor = next(each for each in model.graph.initializer if each.name == "norm.bias")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 0.01, tensor.name))
    path.write_bytes(model.SerializeToString())


def test_a_swapped_graph_is_refused_although_the_manifest_lists_its_hash(artifact: Path) -> None:
    load_artifact(artifact)
    poisoned(artifact / ONNX)
    edit(artifact)
    with pytest.raises(
        ArtifactError, match=r"model\.onnx: not the graph that weights\.safetensors gives.*dinov2 export"
    ):
        load_artifact(artifact)


def test_a_swapped_graph_that_claims_to_be_derived_is_refused_too(artifact: Path, tmp_path: Path) -> None:
    edit(artifact)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"][ONNX] |= {"derived": True, "sha256": "0" * 64}
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    (artifact / ONNX).unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx: not the graph"):
        load_artifact(artifact, derived_dir=tmp_path / "derived")
    assert not (tmp_path / "derived").exists()


@pytest.mark.parametrize("name", ["model-dynamic-fp32.onnx", "model.onnx.data"])
def test_a_graph_without_a_description_is_refused(artifact: Path, name: str) -> None:
    """The second engine for other input sizes is found by its name."""
    shutil.copy(artifact / ONNX, artifact / name)
    edit(artifact, files=listed(artifact, name))
    with pytest.raises(ArtifactError, match=rf"{name}: not the graph"):
        load_artifact(artifact)


def described(file: str, **spec: Any) -> dict[str, Any]:
    return {"file": file, "outputs": ["cls", "patches", "registers"], "attention": "standard"} | spec


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (
            described("model-224-fp32.onnx", size=[224, 224], precision="int8"),
            "the name of this graph is model-224-int8",
        ),
        (described("model-140000-fp32.onnx", size=[140000, 140000], precision="fp32"), "more than 65536 patches"),
        (described("model-225-fp32.onnx", size=[225, 225], precision="fp32"), "must be multiples of the patch size 14"),
        (described("model-224-fp8.onnx", size=[224, 224], precision="fp8"), "fp8 needs the largest input"),
    ],
)
def test_a_description_that_cannot_be_right_is_refused(artifact: Path, graph: dict[str, Any], said: str) -> None:
    shutil.copy(artifact / ONNX, artifact / graph["file"])
    edit(artifact, files=listed(artifact, graph["file"]), graphs=[graph])
    with pytest.raises(ArtifactError, match=said):
        load_artifact(artifact)


@pytest.mark.parametrize("threshold", [1000, build.EXTERNAL_ABOVE_BYTES])
def test_digests_are_those_of_the_written_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: int
) -> None:
    monkeypatch.setattr(build, "EXTERNAL_ABOVE_BYTES", threshold)
    weights = StoredWeights(bundled_artifact() / "weights.safetensors")
    config = json.loads((bundled_artifact() / "manifest.json").read_text())["config"]
    for precision in ("fp32", "fp16", "bf16", "int8"):
        spec = GraphSpec(size=(28, 42), precision=precision)  # type: ignore[arg-type]
        names = write_onnx(weights, build.ViTConfig(**config), spec, tmp_path / "x.onnx")
        digests = graph_digests(weights, build.ViTConfig(**config), spec, "x.onnx")
        assert len(names) == (2 if threshold == 1000 else 1)
        assert sorted(digests) == sorted(names)
        for name, digest in digests.items():
            written = describe_file(tmp_path / name)
            assert (digest.sha256, digest.bytes) == (written.sha256, written.bytes)

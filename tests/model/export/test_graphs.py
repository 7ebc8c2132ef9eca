"""Tests of the graphs in addition to `model.onnx`: their selection, their manifest records, and the int8 gate."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from model.artifact import Artifact, ArtifactError, bundled_artifact, load_artifact, read_manifest
from model.engines import knn_gate, parity
from model.engines.knn_gate import LabelledImages
from model.engines.onnxruntime_engine import OnnxEngine
from model.export.artifact import export_artifact
from model.export.graphs import wanted_graphs
from model.export.options import ExportOptions, GraphOptions
from model.onnx_graph.spec import GraphSpec
from tests.disk_log import DiskLog
from tests.model.tiny import CONFIG, backbone

pytest.importorskip("torch", reason="the export checks parity against torch: pip install '.[train]'")

PHOTOS = parity.sample_photos(12)
FILES = [(Path(f"{i}.jpg"), "ab"[i % 2]) for i in range(12)]
LABELLED = LabelledImages(FILES[:8], FILES[8:], lambda path: PHOTOS[int(path.stem)])
EXTRAS = ("cls", "patches", "registers", "attention", "layer.0")


def export(out: Path, *, graphs: Sequence[GraphSpec] = (), **options) -> Artifact:
    return export_artifact(backbone(), out, ExportOptions(images=PHOTOS[:3], **options), graphs)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    graphs = [
        GraphSpec(size=(98, 84), outputs=EXTRAS),
        GraphSpec(size=None),
        *(GraphSpec(size=(70, 70), precision=precision) for precision in ("fp16", "bf16", "int8")),
    ]
    return export(tmp_path_factory.mktemp("artifacts"), graphs=graphs, labelled=LABELLED)


def test_every_graph_has_its_figures_or_a_reason(exported: Artifact) -> None:
    manifest = exported.manifest
    compared = {(record.file, record.size, record.precision) for record in manifest.parity}
    assert compared == {
        ("model.onnx", (70, 70), "fp32"),
        ("model-98x84-fp32.onnx", (98, 84), "fp32"),
        ("model-dynamic-fp32.onnx", (70, 70), "fp32"),
        ("model-dynamic-fp32.onnx", (84, 112), "fp32"),  # a larger one that is not square
        ("model-70-fp16.onnx", (70, 70), "fp16"),
        ("model-70-int8.onnx", (70, 70), "int8"),
    }
    assert all(record.min_cosine_cls > 0.99999 for record in manifest.parity if record.precision == "fp32")
    reasons = {graph.file: graph.not_compared for graph in manifest.graphs if graph.not_compared}
    assert list(reasons) == ["model-70-bf16.onnx"]
    assert "ONNX Runtime cannot run it on the CPU: " in reasons["model-70-bf16.onnx"]
    assert "exporting" not in reasons["model-70-bf16.onnx"]  # no temporary folder
    (record,) = [record for record in manifest.parity if record.precision == "int8"]
    assert record.gate is not None
    assert record.gate.val_photos == 4
    assert record.gate.train_photos == 8
    assert load_artifact(exported.path).manifest == manifest


def test_further_outputs_and_sizes_are_torch_s(exported: Artifact) -> None:
    from model.engines.torch_engine import TorchEngine

    torch_engine = TorchEngine(exported.file("weights.safetensors"), CONFIG, threads=1, device="cpu")
    onnx_engine = OnnxEngine(exported.file("model-98x84-fp32.onnx"), threads=1)
    pixels = np.random.default_rng(0).normal(size=(3, 3, 98, 84)).astype(np.float32)
    ours, theirs = (engine.run_outputs(pixels, EXTRAS) for engine in (onnx_engine, torch_engine))
    assert ours["attention"].shape == (3, 3, 1 + 2 + 42)
    assert ours["layer.0"].shape == (3, 1 + 2 + 42, 48)
    for name in EXTRAS:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=name)
    with pytest.raises(
        ValueError, match=r"no output 'layer\.1'; its outputs are cls, patches, registers, attention, layer\.0"
    ):
        onnx_engine.run_outputs(pixels, ["layer.1"])


def test_a_wrong_further_output_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = OnnxEngine.run_outputs

    def wrong(self, pixels, names):
        found = right(self, pixels, names)
        return {name: -array if name == "layer.0" else array for name, array in found.items()}

    monkeypatch.setattr(OnnxEngine, "run_outputs", wrong)
    with pytest.raises(parity.ParityError, match=r"patch cosine -1\.0"):
        export(tmp_path, graphs=[GraphSpec(size=(70, 70), precision="fp16", outputs=EXTRAS)])
    assert list(tmp_path.iterdir()) == []


def test_graphs_are_derived_like_the_first(exported: Artifact, tmp_path: Path) -> None:
    changed = GraphSpec(size=(84, 84), precision="int8", int8_weights="u8", float_layers=("mlp.fc2",), outputs=EXTRAS)
    other = export(tmp_path / "other", graphs=[changed], keep_onnx=False).path
    assert load_artifact(other).manifest.graphs[0].spec == changed  # derived as it was written, or refused
    specs = [graph.spec for graph in exported.manifest.graphs if graph.precision in ("int8", "fp16")]
    lean = export(tmp_path / "lean", graphs=specs, keep_onnx=False).path
    assert sorted(path.name for path in lean.iterdir()) == ["manifest.json", "weights.safetensors"]
    loaded = load_artifact(lean, derived_dir=tmp_path / "derived")
    for spec in specs:
        name = f"model-70-{spec.precision}.onnx"
        assert loaded.file(name).read_bytes() == exported.file(name).read_bytes()
    assert loaded.derived == tmp_path / "derived" / lean.name


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("model.export.artifact.save_file", full)
    with pytest.raises(OSError, match=r"weights\.safetensors: cannot be written: .*No space left"):
        export(tmp_path)
    assert not list(tmp_path.iterdir())


def test_int8_without_labelled_photos_has_no_passed_gate(tmp_path: Path) -> None:
    (_, record) = export(tmp_path, graphs=[GraphSpec(size=(70, 70), precision="int8")]).manifest.parity
    assert record.gate is not None
    assert record.gate.status != "passed"


@pytest.mark.parametrize(("cosine", "status"), [(0.9981, "passed"), (0.9979, "failed"), (float("nan"), "failed")])
def test_int8_needs_its_cosines_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cosine: float, status: str
) -> None:
    measure = parity.measure

    def measured(*arguments, **named):
        record = measure(*arguments, **named)
        figures = {"min_cosine_cls": cosine, "min_cosine_patches": 0.999}
        return record.model_copy(update=figures) if record.precision == "int8" else record

    monkeypatch.setattr(parity, "measure", measured)
    monkeypatch.setattr(knn_gate, "MAX_VAL_LOSS", 4)
    monkeypatch.setattr(knn_gate, "MAX_TRAIN_LOSS", 1.0)
    monkeypatch.setattr(knn_gate, "MIN_VAL", 0)
    monkeypatch.setattr(knn_gate, "MIN_TRAIN", 0)
    (_, record) = export(
        tmp_path, graphs=[GraphSpec(size=(70, 70), precision="int8")], labelled=LABELLED
    ).manifest.parity
    assert record.gate is not None
    assert record.gate.status == status
    assert ("class cosine" in record.gate.reason) == (status == "failed")
    assert "k-NN (k=20) on val" in record.gate.reason


def test_the_bundled_manifest_is_older_and_loads() -> None:
    manifest = read_manifest(bundled_artifact())
    assert manifest.graphs == []
    assert (manifest.parity[0].file, manifest.parity[0].gate) == ("model.onnx", None)


def test_a_graph_that_is_no_file_is_refused(exported: Artifact, tmp_path: Path) -> None:
    manifest = json.loads((exported.path / "manifest.json").read_text())
    manifest["graphs"][0]["file"] = "model-1-fp32.onnx"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"describes model-1-fp32\.onnx, which is not in its list of files"):
        read_manifest(tmp_path)


def test_what_is_asked_for() -> None:
    def names(**asked: list[str]) -> list[tuple]:
        return [(s.size, s.precision) for s in wanted_graphs(CONFIG, (70, 70), GraphOptions(**asked))]

    assert names() == []
    assert names(sizes=["70"], precisions=["fp32"]) == []  # model.onnx itself
    assert names(precisions=["fp32", "int8", "int8"]) == [((70, 70), "int8")]
    assert names(sizes=["70", "84x98", "dynamic"], precisions=["fp32", "fp16"]) == [
        ((70, 70), "fp16"), ((84, 98), "fp32"), ((84, 98), "fp16"), (None, "fp32"), (None, "fp16"),
    ]  # fmt: skip
    half, eight = wanted_graphs(
        CONFIG, (70, 70), GraphOptions(precisions=["fp16", "int8"], int8_weights="u8", float_layers=["mlp.fc2"])
    )
    assert half == GraphSpec(size=(70, 70), precision="fp16")
    assert eight == GraphSpec(size=(70, 70), precision="int8", int8_weights="u8", float_layers=("mlp.fc2",))
    (eight,) = wanted_graphs(CONFIG, (70, 70), GraphOptions(precisions=["int8"]))
    assert eight.float_layers == ("attn.proj", "mlp.fc2", "blocks.1")
    (eight,) = wanted_graphs(replace(CONFIG, ffn="swiglu"), (70, 70), GraphOptions(precisions=["int8"]))
    assert eight.float_layers == ("attn.proj", "mlp.w3", "blocks.1")
    (eight,) = wanted_graphs(CONFIG, (70, 70), GraphOptions(precisions=["int8"], float_layers=[]))
    assert eight.float_layers == ()
    (spec,) = wanted_graphs(CONFIG, (70, 70), GraphOptions(outputs=list(EXTRAS)))
    assert spec == GraphSpec(size=(70, 70), outputs=EXTRAS)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sizes": ["100"]}, r"size '100': must be a multiple of the patch size 14 \(e\.g\. 224\), .* or dynamic"),
        ({"sizes": ["224x"]}, "size '224x'"),
        ({"sizes": ["0"]}, "size '0'"),
        ({"sizes": ["-14"]}, "size '-14'"),
        ({"precisions": ["fp8"]}, "precision 'fp8': one of fp32, fp16, bf16, int8"),
        ({"float_layers": ["mlp.fc2"]}, r"float layers mlp\.fc2 apply to int8, which is not a chosen precision"),
        ({"outputs": ["cls", "patches"]}, "outputs cls,patches: registers must be included"),
        ({"outputs": ["cls", "tokens"]}, r"output 'tokens': one of cls, patches, registers, attention, layer\.0 to"),
        ({"outputs": ["layer.2"]}, r"output 'layer\.2': .* layer\.0 to layer\.1"),
        ({"outputs": ["cls", "patches", "registers", "cls"]}, "output 'cls' is given twice"),
    ],
)
def test_what_cannot_be_asked_for_is_named(asked: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wanted_graphs(CONFIG, (70, 70), GraphOptions(**asked))


def test_the_manifest_is_on_the_disk_before_the_artifact_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = DiskLog(monkeypatch)
    manifest = export(tmp_path).path / "manifest.json"
    assert ("flushed", manifest.stat().st_ino, "") in log.events  # a rename keeps the inode


def test_an_export_over_an_older_one_replaces_it_and_leaves_nothing_else(tmp_path: Path) -> None:
    first = export(tmp_path)
    (first.path / "old.txt").write_text("older")
    again = export(tmp_path)
    assert again.path == first.path
    assert not (again.path / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == [again.path.name]

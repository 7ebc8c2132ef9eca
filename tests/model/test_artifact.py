"""Tests of exporting and loading artifacts: files, manifest, and the errors for damaged artifacts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.artifact import (
    ArtifactError,
    bundled_artifact,
    find_artifacts,
    fingerprint,
    load_artifact,
    read_manifest,
)
from model.cpus import available_cpus
from model.engines import parity
from model.engines.choice import load_engine
from model.engines.protocol import Features
from model.export.artifact import export_artifact
from model.export.options import ExportOptions
from model.preprocess import PreprocessSpec, preprocess
from tests.model.tiny import CONFIG, SPEC, backbone

torch = pytest.importorskip("torch", reason="the export checks parity against torch: pip install '.[train]'")


def export(out: Path, *, preprocess: PreprocessSpec = SPEC, **options):
    tiny = backbone(preprocess=preprocess, provenance={"recipe": "none"})
    return export_artifact(tiny, out, ExportOptions(**options))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("artifacts"), model_card="# tiny\n").path


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / exported.name)


def test_export_writes_what_it_promises(exported: Path) -> None:
    artifact = load_artifact(exported)
    assert exported.name == f"tiny-{artifact.fingerprint[:8]}"
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "manifest.json",
        "model.onnx",
        "weights.safetensors",
    ]
    (record,) = artifact.manifest.parity
    assert record.max_abs_error < 1e-4
    assert record.min_cosine_cls > 0.999999
    assert record.neighbour_agreement == 1.0
    assert artifact.manifest.input_size == (70, 70)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_engines_agree_on_the_weights_as_stored(tmp_path: Path, dtype: str) -> None:
    artifact = export(tmp_path, weights_dtype=dtype)
    pixels = np.stack([preprocess(photo, SPEC) for photo in parity.sample_photos(3)])
    onnx, reference = (load_engine(artifact, name, threads=1).run(pixels) for name in ("onnxruntime", "torch"))
    assert reference.cls.shape == (3, 48)
    assert reference.patches.shape == (3, 25, 48)
    assert reference.registers.shape == (3, 2, 48)
    for ours, theirs in zip(onnx, reference, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_fingerprint_changes_with_everything_that_decides_a_vector(exported: Path, tmp_path: Path) -> None:
    prints = {
        load_artifact(exported).fingerprint,
        export(tmp_path / "half", weights_dtype="float16").fingerprint,
        export(tmp_path / "spec", preprocess=PreprocessSpec(resize=70, crop=70)).fingerprint,
        export(tmp_path / "pad", preprocess=PreprocessSpec(resize=None, crop=70, fit="pad")).fingerprint,
        export(tmp_path / "squash", preprocess=PreprocessSpec(resize=None, crop=70, fit="squash")).fingerprint,
    }
    assert len(prints) == 5
    assert export(tmp_path / "again").fingerprint in prints


def test_the_setting_fit_left_existing_fingerprints_as_they_were() -> None:
    bundled = load_artifact(bundled_artifact())
    assert bundled.fingerprint == "2608a6a314958e2e01afd464a38daad20759f4f3fd79924a5bd6072b56f446b7"
    assert bundled.manifest.preprocess.fit == "crop"
    assert "fit" not in json.loads((bundled.path / "manifest.json").read_text())["preprocess"]
    assert "fit" not in json.loads(bundled.manifest.model_dump_json())["preprocess"]


def test_each_part_of_the_identity_is_in_the_fingerprint() -> None:
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.float32)}
    others = [
        ({**weights, "a": weights["a"].reshape(3, 2)}, CONFIG, SPEC),
        ({**weights, "a": weights["a"].view(np.int32)}, CONFIG, SPEC),
        ({"a": weights["a"], "c": weights["b"]}, CONFIG, SPEC),
        (weights, replace(CONFIG, pos_embed_rule="size"), SPEC),
        (weights, replace(CONFIG, num_heads=1), SPEC),
        (weights, CONFIG, SPEC.model_copy(update={"mean": (0.5, 0.5, 0.5)})),
        (weights, CONFIG, SPEC.model_copy(update={"resize": 81})),
    ]
    same = fingerprint(weights, CONFIG, SPEC)
    assert fingerprint(dict(reversed(weights.items())), CONFIG, SPEC) == same
    assert len({same, *(fingerprint(*other) for other in others)}) == 1 + len(others)


def test_artifacts_are_found_newest_first_and_the_bundled_one_last(exported: Path, tmp_path: Path) -> None:
    days = {"b": "2026-03-01", "a": "2026-02-01", "c": "2026-01-01", ".exporting-x": "2026-04-01"}
    for name, day in days.items():
        shutil.copytree(exported, tmp_path / "artifacts" / name)
        edit_manifest(tmp_path / "artifacts" / name, created=f"{day}T00:00:00+00:00")
    (tmp_path / "artifacts" / "broken").mkdir()
    (tmp_path / "artifacts" / "broken" / "manifest.json").write_text("{}")
    (tmp_path / "artifacts" / "no artifact").mkdir()
    names = [path.name for path in find_artifacts(tmp_path)]
    assert names == ["b", "a", "c", "broken", bundled_artifact().name]


def test_nothing_is_derived_from_weights_that_were_changed(tmp_path: Path) -> None:
    lean = export(tmp_path / "lean", keep_onnx=False).path
    weights = lean / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors: has .* the file was changed or truncated"):
        load_artifact(lean, derived_dir=tmp_path / "derived")
    assert not list(tmp_path.glob("derived/**/*.onnx"))


@pytest.mark.parametrize("name", ["weights.safetensors", "model.onnx", "README.md"])
def test_a_flipped_byte_is_refused_and_named(artifact: Path, name: str) -> None:
    data = bytearray((artifact / name).read_bytes())
    data[len(data) // 2] ^= 1
    (artifact / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{name}.*sha256"):
        load_artifact(artifact)


def test_a_missing_file_is_named(artifact: Path) -> None:
    (artifact / "README.md").unlink()
    with pytest.raises(ArtifactError, match=r"README\.md: No such file"):
        load_artifact(artifact)


def edit_manifest(artifact: Path, **changes) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps(manifest | changes))


def test_a_manifest_that_describes_other_preprocessing_is_refused(artifact: Path) -> None:
    edit_manifest(artifact, preprocess=PreprocessSpec(resize=90, crop=70).model_dump())
    with pytest.raises(ArtifactError, match="fingerprint"):
        load_artifact(artifact)


def test_unknown_fields_and_versions_are_refused(artifact: Path) -> None:
    edit_manifest(artifact, format_version=2, surprise=1)
    with pytest.raises(ArtifactError, match=r"(?s)format_version.*surprise"):
        load_artifact(artifact)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", ".."])
def test_a_file_outside_the_folder_is_refused(artifact: Path, name: str) -> None:
    record = read_manifest(artifact).files["README.md"].model_dump()
    edit_manifest(artifact, files={name: record})
    with pytest.raises(ArtifactError, match="points outside the artifact's folder"):
        load_artifact(artifact)


def test_a_folder_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"not an artifact: manifest\.json"):
        load_artifact(tmp_path)


def test_the_graph_is_derived_byte_for_byte(tmp_path: Path) -> None:
    lean = export(tmp_path / "lean", keep_onnx=False).path
    assert not (lean / "model.onnx").exists()
    artifact = load_artifact(lean, derived_dir=tmp_path / "derived")
    first = artifact.file("model.onnx")
    assert first.is_relative_to(tmp_path / "derived")
    stamp = first.stat().st_mtime_ns
    assert load_artifact(lean, derived_dir=tmp_path / "derived").file("model.onnx").stat().st_mtime_ns == stamp
    first.write_bytes(b"torn")  # a derived file that was damaged is made again
    load_artifact(lean, derived_dir=tmp_path / "derived")
    assert first.stat().st_size == artifact.manifest.files["model.onnx"].bytes


def test_a_graph_of_several_files_must_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.onnx_graph.build.EXTERNAL_ABOVE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"needs 2 files and cannot be derived"):
        export(tmp_path, keep_onnx=False)
    assert list(tmp_path.iterdir()) == []
    kept = export(tmp_path).path
    assert load_artifact(kept).file("model.onnx.data").stat().st_size > 1000


def test_failed_parity_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = parity.measure

    def wrong(*arguments, **named):
        return build(*arguments, **named).model_copy(update={"min_cosine_cls": 0.9})

    monkeypatch.setattr(parity, "measure", wrong)
    with pytest.raises(parity.ParityError, match=r"class cosine 0\.900000 \(at least 0\.99999\)"):
        export(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_parity_sees_a_dropped_layerscale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import model.export.artifact as module

    def forgetful(weights, *rest):
        forgotten = {key: np.ones_like(value) if "gamma" in key else value for key, value in weights.items()}
        return original(forgotten, *rest)

    original = module.write_onnx
    monkeypatch.setattr(module, "write_onnx", forgetful)
    with pytest.raises(parity.ParityError):
        export(tmp_path)


def test_nan_never_passes_parity() -> None:
    record = parity.ParityRecord(
        engine="x",
        precision="fp32",
        images=2,
        max_abs_error=float("nan"),
        min_cosine_cls=1,
        min_cosine_patches=1,
        neighbour_agreement=1,
    )
    with pytest.raises(parity.ParityError):
        parity.check(record)


def test_compare_measures_what_it_says() -> None:
    rng = np.random.default_rng(0)
    cls, patches = rng.standard_normal((8, 16), dtype=np.float32), rng.standard_normal((8, 5, 16), dtype=np.float32)
    registers = np.zeros((8, 0, 16), np.float32)
    reference = Features(cls, patches, registers)
    assert parity.compare(reference, reference) == pytest.approx((0.0, 1.0, 1.0, 1.0))
    turned = patches.copy()
    turned[3, 2] = -turned[3, 2]
    error, cos_cls, cos_patches, agreement = parity.compare(reference, Features(cls[::-1].copy(), turned, registers))
    assert error > 0.5
    assert cos_patches == pytest.approx(-1)
    assert cos_cls < 0.9
    assert agreement < 1


def test_engine_names_and_threads_are_checked(exported: Path) -> None:
    artifact = load_artifact(exported)
    with pytest.raises(ValueError, match="unknown engine 'cuda9'"):
        load_engine(artifact, "cuda9")
    with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
        load_engine(artifact, threads=0)
    with pytest.raises(ValueError, match=r"this model takes \[B, 3, 70, 70\]"):
        load_engine(artifact, threads=1).run(np.zeros((1, 3, 84, 84), np.float32))
    assert available_cpus() >= 1


def test_the_bundled_artifact_is_whole_and_small(tmp_path: Path) -> None:
    path = bundled_artifact()
    artifact = load_artifact(path, derived_dir=tmp_path)
    assert sum(file.stat().st_size for file in path.iterdir()) <= 16 * 2**20
    pixels = preprocess(parity.sample_photos(1)[0], artifact.manifest.preprocess)[None]
    assert load_engine(artifact, threads=1).run(pixels).cls.shape == (1, artifact.manifest.config.embed_dim)

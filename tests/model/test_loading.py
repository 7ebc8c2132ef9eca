"""Tests that one function loads every kind of model, and that each mistake gets a message that says what to do."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="weights are loaded into torch: pip install '.[train]'")

import torch
from safetensors.numpy import load_file, save_file

from model import config as model_config
from model.artifact import WEIGHTS, ArtifactError, bundled_artifact, describe_file, fingerprint, load_artifact
from model.artifact import read_manifest as manifest_of
from model.checkpoint import load_checkpoint, load_model, save_checkpoint
from model.config import ViTConfig
from model.convert import CheckpointError, finite_problem
from model.loading import looks_like_path, read_model, run_checkpoint
from model.vit import DinoVisionTransformer

SMOKE = ViTConfig(embed_dim=24, depth=2, num_heads=2, img_size=42, pos_embed_rule="size", layerscale_init=0.3)
NAMED = ViTConfig(embed_dim=16, depth=2, num_heads=2, img_size=56)


@pytest.fixture(autouse=True)
def small_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_config.CONFIGS, "small", NAMED)


def weights(config: ViTConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = DinoVisionTransformer(config)
    return {key: torch.randn_like(tensor) for key, tensor in model.state_dict().items()}


def checkpoint(path: Path, seed: int = 0, **provenance: object) -> Path:
    save_checkpoint(path, weights(SMOKE, seed), SMOKE, provenance)
    return path


def same(model: DinoVisionTransformer, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())


def test_a_checkpoint_needs_no_name_because_it_contains_its_architecture(tmp_path: Path) -> None:
    model = load_model(checkpoint(tmp_path / "c.safetensors"))
    assert model.config == SMOKE
    assert not model.training
    assert same(model, weights(SMOKE))
    assert load_model(str(tmp_path / "c.safetensors"), pos_embed_rule="offset").config.pos_embed_rule == "offset"


def test_a_run_gives_its_best_checkpoint_or_its_last_one(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint.safetensors", seed=1, preprocess={"resize": 56, "crop": 42}, name="recipe")
    assert same(load_model(tmp_path), weights(SMOKE, 1))
    checkpoint(tmp_path / "checkpoint.best.safetensors", seed=2)
    assert same(load_model(str(tmp_path)), weights(SMOKE, 2))
    assert run_checkpoint(tmp_path) == tmp_path / "checkpoint.best.safetensors"
    assert read_model(tmp_path).name == tmp_path.name
    (tmp_path / "checkpoint.best.safetensors").unlink()
    loaded = read_model(tmp_path)
    assert (loaded.name, loaded.preprocess.resize, loaded.preprocess.crop) == ("recipe", 56, 42)


def test_an_artifact_gives_its_weights_and_nothing_is_written(tmp_path: Path) -> None:
    folder = shutil.copytree(bundled_artifact(), tmp_path / "artifact")
    (folder / "model.onnx").unlink()  # graphs are not needed
    before = sorted(folder.iterdir())
    stored, manifest = load_file(folder / WEIGHTS), manifest_of(folder)
    model = load_model(folder)
    assert model.config == manifest.config
    assert all(
        np.array_equal(model.state_dict()[key].numpy(), array.astype(np.float32)) for key, array in stored.items()
    )
    loaded = read_model(folder)
    assert (loaded.name, loaded.fingerprint) == (manifest.name, manifest.fingerprint)
    assert (loaded.preprocess, loaded.licence) == (manifest.preprocess, manifest.licence)
    assert sorted(folder.iterdir()) == before


def test_a_changed_artifact_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(bundled_artifact(), tmp_path / "artifact")
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ArtifactError, match="was changed or truncated"):
        load_model(folder)


def test_the_named_architecture_must_be_that_of_the_folder(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint.safetensors")
    with pytest.raises(CheckpointError, match=r"not a small: embed_dim 24 instead of 16\. .* load it without a name"):
        load_model("small", weights=tmp_path)
    with pytest.raises(CheckpointError, match=r"not a dinov2_vitt14: depth 4 instead of 12"):
        load_model("dinov2_vitt14", weights=bundled_artifact())


def test_a_file_without_its_architecture_names_the_ones_that_fit(tmp_path: Path) -> None:
    torch.save(weights(NAMED), tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"w\.pth does not record its architecture: add --arch, e\.g\. --arch small"
    ) as e:
        load_model(tmp_path / "w.pth")
    assert "its tensors have the shapes of small" in str(e.value)
    assert same(load_model("small", weights=tmp_path / "w.pth"), weights(NAMED))


@pytest.mark.parametrize(
    "source",
    ["/nonexistent.pth", "runs/none", "./none", "~/none-such-model", "none.safetensors", "NONE.PTH", "x.pt", "x.ckpt"],
)
def test_a_missing_path_is_no_unknown_model(source: str) -> None:
    assert looks_like_path(source)
    with pytest.raises(FileNotFoundError, match="no such file or folder") as caught:
        load_model(source)
    assert "unknown model" not in str(caught.value)


def test_names_are_looked_up_and_paths_of_similar_names_get_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown model 'dinov2_vits15': did you mean dinov2_vits14") as caught:
        load_model("dinov2_vits15")
    assert "Other models are named by the path of their file or folder" in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"did you mean the published model facebook/dinov2-small\?"):
        load_model("facebook/dinov2-smal")
    with pytest.raises(FileNotFoundError, match=r"dinov2_vits14: no such file"):
        load_model("small", weights="dinov2_vits14")  # a weights file, never a name


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "a folder without a model: not an artifact .* and not a run's folder"),
        (["states/000000010.pt"], "the run has not written a checkpoint yet"),
        (["model.safetensors"], r"another project: give its file .*/model\.safetensors and the architecture"),
    ],
)
def test_folders_without_a_model(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


# Wrappers of training code


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def compiled_blocks(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("blocks.0.", "blocks.0._orig_mod."): tensor for key, tensor in state.items()}


def hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from model.convert import HUGGING_FACE, to_dialect

    arrays = to_dialect({key: tensor.numpy() for key, tensor in state.items()}, NAMED, HUGGING_FACE)
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


HEADS = {"dino_head.mlp.0.weight": torch.ones(2), "ibot_head.last_layer.weight_v": torch.ones(2)}
WRAPPED = {
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"step": 3}}}, "epoch": 4},
    "state_dict": lambda s: {"state_dict": s, "epoch": 4},
    "teacher": lambda s: {"teacher": s, "student": {}, "optimizer": {}},
    "nested": lambda s: {"model": {"state_dict": s}},
    "module": lambda s: prefixed("module.", s),
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "both": lambda s: {"model": prefixed("module._orig_mod.", s)},
    "compiled blocks": compiled_blocks,
    "backbone": lambda s: prefixed("backbone.", s),
    "lightning": lambda s: {"state_dict": prefixed("model.", s), "pytorch-lightning_version": "2.5"},
    "a whole model of Meta's": lambda s: {
        "model": prefixed("student.backbone.", {key: 0 * t for key, t in s.items()})
        | prefixed("teacher.backbone.", s)
        | prefixed("teacher.", HEADS)
    },
    "dump of a sharded teacher": lambda s: {"teacher": prefixed("backbone._fsdp_wrapped_module.", s) | HEADS},
    "Hugging Face in a wrapper": lambda s: {"model": prefixed("module.backbone.", hugging_face(s))},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_removed(kind: str, tmp_path: Path) -> None:
    torch.save(WRAPPED[kind](weights(NAMED)), tmp_path / "w.pth")
    model = load_model("small", weights=tmp_path / "w.pth")
    assert same(model, weights(NAMED))
    assert model.config.pos_embed_rule == ("size" if "Hugging" in kind else "offset")


class Foreign:
    """An object that only code can restore, like the slices of a sharded state."""


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("model_0001.rank_0.pth", {"model": Foreign()}, r"load teacher_checkpoint\.pth instead, .* eval/training_"),
        (
            "w.pth",
            {"model": {}, "args": Foreign()},
            r"NEWOBJ, .*: if you trust the file, load it with torch in your own code",
        ),
        (
            "w.pth",
            {"model": {"a": torch.ones(1)}, "model_ema": {"a": torch.ones(1)}},
            "contains several models, model and",
        ),
        ("w.pth", {"student": {}, "ema": {}, "optimizer": {}}, "a training state: give the folder of the run"),
        ("w.pth", {"mlp.0.weight": torch.ones(1), "last_layer.weight_g": torch.ones(1)}, "only a projection head"),
        ("w.pth", {"teacher": HEADS}, "only a projection head"),
        (
            "w.pth",
            {"cls_token": torch.ones(1), "_orig_mod.cls_token": torch.ones(1)},
            "two tensors get the name cls_token",
        ),
    ],
)
def test_what_cannot_be_stripped_says_what_to_do(tmp_path: Path, name: str, content: object, advice: str) -> None:
    torch.save(content, tmp_path / name)
    with pytest.raises(CheckpointError, match=advice) as caught:
        load_model("small", weights=tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert str(caught.value).count(str(tmp_path)) == 1


# Weights that are not finite


def poisoned(state: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    state["blocks.1.mlp.fc1.weight"].flatten()[5] = value
    return state


POISON = r"blocks\.1\.mlp\.fc1\.weight contains 1 of \d+ values that are NaN or infinite"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_names_its_tensor(tmp_path: Path, value: float) -> None:
    save_checkpoint(tmp_path / "checkpoint.safetensors", poisoned(weights(SMOKE), value), SMOKE, {})
    torch.save(poisoned(weights(NAMED), value), tmp_path / "w.pth")
    for load in (
        lambda: load_model(tmp_path / "checkpoint.safetensors"),
        lambda: load_model(tmp_path),
        lambda: load_checkpoint(tmp_path / "checkpoint.safetensors"),
        lambda: load_model("small", weights=tmp_path / "w.pth"),
    ):
        with pytest.raises(CheckpointError, match=POISON):
            load()


def test_an_artifact_with_nan_is_neither_loaded_nor_served(tmp_path: Path) -> None:
    folder = shutil.copytree(bundled_artifact(), tmp_path / "artifact")
    manifest, stored = manifest_of(folder), load_file(folder / WEIGHTS)
    stored["blocks.1.mlp.fc1.weight"].flat[5] = np.nan
    save_file(stored, folder / WEIGHTS)
    changed = json.loads((folder / "manifest.json").read_text())
    changed["fingerprint"] = fingerprint(stored, manifest.config, manifest.preprocess)
    changed["files"][WEIGHTS] = describe_file(folder / WEIGHTS).model_dump()
    (folder / "manifest.json").write_text(json.dumps(changed))
    for load in (load_model, load_artifact):
        with pytest.raises(ArtifactError, match=POISON):
            load(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_finite_values_of_every_type(dtype: str) -> None:
    array = np.array([0.0, -6e4, 6e4], dtype)
    assert finite_problem("x", array) is None
    assert finite_problem("x", np.zeros((0, 3), dtype)) is None
    array[1] = np.nan
    assert finite_problem("x", array) == "the tensor x contains 1 of 3 values that are NaN or infinite"


def test_the_configuration_is_complete(tmp_path: Path) -> None:
    """Every field of a checkpoint's configuration survives, also those that differ from every named model."""
    config = ViTConfig(24, 2, 2, 7, 3.0, "swiglu", 3, 21, "offset", None)
    save_checkpoint(tmp_path / "c", weights(config), config, {})
    assert asdict(load_model(tmp_path / "c").config) == asdict(config)

"""Tests of fitting heads: they learn, repeat themselves, and compute the same in the service as in torch."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from model.config import ViTConfig
from model.heads.record import ImageTokens
from model.heads.store import Head, add_head, choose_head, open_head
from model.preprocess import PreprocessSpec, preprocess
from model.vit import DinoVisionTransformer
from tests.model.heads.artifacts import small_artifact
from training.data.sources import open_source
from training.evaluate.backbone import Backbone
from training.evaluate.depth import LinearDepth
from training.heads import (
    FitSettings,
    FittedHead,
    fit_classification,
    fit_depth,
    fit_segmentation,
    hold_out,
)

TINY = ViTConfig(
    embed_dim=24,
    depth=2,
    num_heads=2,
    img_size=28,
    pos_embed_rule="antialias",
    layerscale_init=None,
    num_register_tokens=2,
)
QUICK = FitSettings(iterations=60, lr=0.02, resize=56)
N = 24


def quiet(what: str, total: int):
    return lambda count: None


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    model = DinoVisionTransformer(TINY).eval()
    with torch.no_grad():
        model.norm.weight.add_(0.3 * torch.randn(24))
        model.norm.bias.add_(0.3 * torch.randn(24))
    return Backbone("tiny", model, PreprocessSpec(resize=42, crop=28), "a" * 64)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Bright left part (class 1, 2 m), dark right part (class 0, 6 m), at several places and sizes; a strip unknown."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks", "depth"):
        (tmp_path / kind).mkdir()
    for i in range(N):
        height, width = 60, 80 + 30 * (i % 2)
        left = np.arange(width) < rng.integers(25, 60)
        pixels = np.where(left, 220, 30)[None, :, None] + rng.integers(0, 20, (height, width, 3))
        mask = np.broadcast_to(left, (height, width)).astype(np.uint8).copy()
        metres = np.where(mask == 1, 2000, 6000).astype(np.uint16)
        mask[:4], metres[:4] = 255, 0
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
        Image.fromarray(metres).save(tmp_path / "depth" / f"{i}.png")
    return tmp_path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Twelve bright and twelve dark images, in two folders."""
    rng = np.random.default_rng(0)
    for name, level in (("bright", 200), ("dark", 30)):
        (tmp_path / name).mkdir()
        for i in range(N // 2):
            pixels = level + rng.integers(0, 40, (40, 50, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def stored(fitted: FittedHead, backbone: Backbone, folder: Path) -> Head:
    """Add the head to an artifact with the backbone's final norm, and open it."""
    artifact = small_artifact(folder, config=TINY)
    norm = {f"norm.{part}": getattr(backbone.model.norm, part).detach().numpy() for part in ("weight", "bias")}
    save_file(norm, folder / "weights.safetensors")
    add_head(artifact, fitted.description, fitted.tensors)
    return open_head(artifact, choose_head(artifact, fitted.description.kind, fitted.description.name))


def tokens_of(backbone: Backbone, image: Path, spec: PreprocessSpec) -> ImageTokens:
    pixels = torch.from_numpy(preprocess(np.asarray(Image.open(image)), spec))[None]
    model = backbone.model
    with torch.no_grad():
        x = model.prepare_tokens_with_masks(pixels)
        inner = {}
        for i, block in enumerate(model.blocks):
            x = block(x)
            inner[f"tokens.{i}"] = x[0].numpy()
        last = model.norm(x)[0].numpy()
    grid = pixels.shape[2] // 14, pixels.shape[3] // 14
    return ImageTokens(last[0], last[1 + TINY.num_register_tokens :], grid, inner)


def layers(backbone: Backbone, image: Path, spec: PreprocessSpec, blocks: int):
    pixels = torch.from_numpy(preprocess(np.asarray(Image.open(image)), spec))[None]
    with torch.no_grad():
        return backbone.model.get_intermediate_layers(pixels, n=blocks, return_class_token=True)


WHOLE = PreprocessSpec(resize=56, crop=None)


@pytest.mark.parametrize("blocks", [1, 2])
def test_segmentation(backbone: Backbone, scenes: Path, tmp_path: Path, blocks: int) -> None:
    (scenes / "classes.txt").write_text("background\nlamp\n")
    settings = dataclasses.replace(QUICK, blocks=blocks)
    fitted = fit_segmentation("lamps", backbone, scenes, settings, quiet)
    about = fitted.description
    assert (about.kind, about.classes, about.normed) == ("segmentation", ("background", "lamp"), True)
    assert about.layers == tuple(range(2 - blocks, 2))
    assert about.metrics["mean_iou"] > 0.8
    assert set(about.metrics["iou"]) == {"background", "lamp"}
    assert (about.metrics["train_images"], about.metrics["held_out_images"]) == (19, 5)
    again = fit_segmentation("lamps", backbone, scenes, settings, quiet)
    for key, values in fitted.tensors.items():
        np.testing.assert_array_equal(values, again.tensors[key])

    head = stored(fitted, backbone, tmp_path / "artifact")
    image = scenes / "images" / "1.png"
    x = torch.cat([patches[0] for patches, _ in layers(backbone, image, WHOLE, blocks)], dim=1).numpy()
    wanted = x @ fitted.tensors["weight"].T + fitted.tensors["bias"]
    logits = head.segment(tokens_of(backbone, image, WHOLE))
    np.testing.assert_allclose(logits.reshape(2, -1).T, wanted, atol=1e-3)
    mask = np.asarray(Image.open(scenes / "masks" / "1.png"))
    middle = [np.flatnonzero(mask[30] == 1).mean(), np.flatnonzero(mask[30] == 0).mean()]
    columns = [int(x / mask.shape[1] * logits.shape[2]) for x in middle]
    assert [logits[:, 2, column].argmax() for column in columns] == [1, 0]


@pytest.mark.parametrize("blocks", [1, 2])
def test_depth(backbone: Backbone, scenes: Path, tmp_path: Path, blocks: int) -> None:
    settings = dataclasses.replace(QUICK, blocks=blocks, iterations=60, batch_size=4, lr=0.02)
    fitted = fit_depth("far", backbone, scenes, settings, quiet)
    about = fitted.description
    assert (about.kind, about.classes, about.depth_range) == ("depth", (), (0.001, 9.0))
    assert about.metrics["delta1"] > 0.7
    assert about.metrics["rmse"] < 1.5
    head = stored(fitted, backbone, tmp_path / "artifact")
    image = scenes / "images" / "2.png"
    found = layers(backbone, image, WHOLE, blocks)
    parts = [part for patches, cls in found for part in (patches[0], cls[0].expand_as(patches[0]))]
    reference = LinearDepth(fitted.tensors["weight"].shape[1], 0.001, 9.0)
    reference.load_state_dict(
        {f"linear.{key}": torch.from_numpy(value) for key, value in fitted.tensors.items()}
        | {"bins": torch.linspace(0.001, 9.0, 256)}
    )
    metres = head.depth(tokens_of(backbone, image, WHOLE))
    h, w = metres.shape[0] // 4, metres.shape[1] // 4
    with torch.no_grad():
        wanted = reference(torch.cat(parts, dim=1).view(h, w, -1), (4 * h, 4 * w))
    np.testing.assert_allclose(metres, wanted.numpy(), atol=2e-4)


@pytest.mark.parametrize("blocks", [1, 2])
def test_classification(backbone: Backbone, classes: Path, tmp_path: Path, blocks: int) -> None:
    settings = FitSettings(blocks=blocks)
    fitted = fit_classification("light", backbone, open_source(classes, tmp_path), settings, quiet)
    about = fitted.description
    assert (about.kind, about.classes) == ("classification", ("bright", "dark"))
    assert about.metrics["accuracy"] == 1
    assert about.metrics["accuracy_by_class"] == {"bright": 1, "dark": 1}
    assert (about.metrics["train_images"], about.metrics["held_out_images"]) == (20, 4)
    head = stored(fitted, backbone, tmp_path / "artifact")
    for name, number in (("bright", 0), ("dark", 1)):
        image = classes / name / "3.png"
        found = layers(backbone, image, backbone.spec, blocks)
        x = torch.cat([*(cls[0] for _, cls in found), found[-1][0][0].mean(0)]).numpy()
        logits = head.classify(tokens_of(backbone, image, backbone.spec))
        np.testing.assert_allclose(logits, fitted.tensors["weight"] @ x + fitted.tensors["bias"], atol=1e-3)
        assert logits.argmax() == number


def test_given_parts_are_used(backbone: Backbone, scenes: Path) -> None:
    for kind in ("images", "masks"):
        for part, numbers in (("train", range(20)), ("val", range(20, N))):
            (scenes / kind / part).mkdir()
            for i in numbers:
                (scenes / kind / f"{i}.png").rename(scenes / kind / part / f"{i}.png")
    metrics = fit_segmentation("lamps", backbone, scenes, QUICK, quiet).description.metrics
    assert (metrics["train_images"], metrics["held_out_images"]) == (20, 4)


def test_the_share_of_each_class_is_held_out() -> None:
    labels = np.array([0] * 10 + [1] * 3 + [2] + [3] * 2)
    aside = hold_out(labels, 0.2, seed=0)
    assert [int(aside[labels == number].sum()) for number in range(4)] == [2, 1, 0, 1]
    np.testing.assert_array_equal(aside, hold_out(labels, 0.2, seed=0))
    assert (aside != hold_out(labels, 0.2, seed=1)).any()


def remove_images(folder: Path) -> None:
    for i in range(5):
        (folder / "images" / f"{i}.png").unlink()


def another_size(folder: Path) -> None:
    for kind in ("masks", "depth"):
        with Image.open(folder / kind / "3.png") as image:
            image.crop((0, 0, 50, 60)).save(folder / kind / "3.png")


def one_class(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        with Image.open(path) as image:
            mask = np.array(image)
        Image.fromarray(np.where(mask == 255, 255, 1).astype(np.uint8)).save(path)


def binary(folder: Path) -> None:
    """Masks as many programs write them: 0 and 255."""
    for path in (folder / "masks").iterdir():
        with Image.open(path) as image:
            mask = np.array(image)
        Image.fromarray(np.where(mask == 1, 255, 0).astype(np.uint8)).save(path)


def no_mask(folder: Path) -> None:
    (folder / "masks" / "7.png").unlink()


def three_names(folder: Path) -> None:
    (folder / "classes.txt").write_text("a\nb\na\n")


def one_name(folder: Path) -> None:
    (folder / "classes.txt").write_text("a\n")


def broken(folder: Path) -> None:
    for i in range(6):
        (folder / "images" / f"{i}.png").write_bytes(b"not an image")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove_images, "19 labelled images can be read; a head needs at least 20"),
        (broken, "18 labelled images can be read; a head needs at least 20"),
        (
            another_size,
            r"1 of 24 maps have another size than their image, e\.g\. .*3.png has 60x50 pixels and .*60x110",
        ),
        (one_class, "all labelled pixels have class 1; segmentation needs at least two classes"),
        (binary, r"all labelled pixels have class 0; .* \(255 marks pixels to ignore\)"),
        (no_mask, "1 images of .* have no file with their name and .png"),
        (three_names, "the name 'a' occurs twice"),
        (one_name, "has class 1, but classes=1 allows 0 to 0"),
    ],
)
def test_bad_masks_are_refused(backbone: Backbone, scenes: Path, change, reason: str) -> None:
    change(scenes)
    with pytest.raises(ValueError, match=reason):
        fit_segmentation("lamps", backbone, scenes, QUICK, quiet)


def test_bad_depth_maps_are_refused(backbone: Backbone, scenes: Path) -> None:
    with pytest.raises(ValueError, match="no train map has a depth above min_depth=7 and up to max_depth=9"):
        fit_depth("far", backbone, scenes, dataclasses.replace(QUICK, min_depth=7, max_depth=9), quiet)
    with pytest.raises(ValueError, match="no map has a depth above min_depth=7"):
        fit_depth("far", backbone, scenes, dataclasses.replace(QUICK, min_depth=7), quiet)
    another_size(scenes)
    with pytest.raises(ValueError, match="another size than their image"):
        fit_depth("far", backbone, scenes, QUICK, quiet)


def test_bad_class_folders_are_refused(backbone: Backbone, classes: Path, tmp_path: Path) -> None:
    for path in sorted((classes / "dark").iterdir())[:5]:
        path.unlink()
    with pytest.raises(ValueError, match="19 labelled images can be read; a head needs at least 20"):
        fit_classification("light", backbone, open_source(classes, tmp_path), FitSettings(), quiet)
    for i in range(20):
        (classes / "bright" / f"more-{i}.png").write_bytes((classes / "bright" / "0.png").read_bytes())
    for path in (classes / "dark").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="all images have the class 'bright'; classification needs at least two"):
        fit_classification("light", backbone, open_source(classes, tmp_path), FitSettings(), quiet)


@pytest.mark.parametrize(
    "changes", [{"held_out": 0}, {"held_out": 1}, {"iterations": 0}, {"batch_size": 0}, {"blocks": 0}]
)
def test_bad_settings_are_refused(changes: dict[str, float]) -> None:
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        FitSettings(**changes)


def test_more_blocks_than_the_model_has_are_refused(backbone: Backbone, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="blocks=3: the model has 2"):
        fit_segmentation("lamps", backbone, scenes, FitSettings(blocks=3), quiet)

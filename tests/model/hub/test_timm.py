"""Code written for timm's DINOv2 models works with `TimmModel`. The results are compared with plain definitions."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the adapters are torch modules: pip install '.[train]'")

import torch
from torch import Tensor, nn

from model import config as model_config
from model.checkpoint import save_checkpoint
from model.config import ViTConfig
from model.convert import TIMM_REGISTERS, to_dialect
from model.hub import TimmModel, timm_model
from model.preprocess import PreprocessSpec
from model.timm_config import timm_config
from model.vit import DinoVisionTransformer

CONFIG = ViTConfig(embed_dim=24, depth=4, num_heads=3, img_size=56, num_register_tokens=4, pos_embed_rule="antialias")
PREFIX = 5


@pytest.fixture(scope="module")
def plain() -> DinoVisionTransformer:
    torch.manual_seed(2)
    model = DinoVisionTransformer(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture
def model(plain: DinoVisionTransformer, tmp_path: Path) -> TimmModel:
    provenance = {"preprocess": {"resize": 70, "crop": 56}}
    save_checkpoint(tmp_path / "checkpoint.safetensors", plain.state_dict(), CONFIG, provenance)
    return timm_model(tmp_path)


def images() -> Tensor:
    return torch.randn(2, 3, 42, 70, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_features_are_one_tensor_of_all_tokens(model: TimmModel, plain: DinoVisionTransformer) -> None:
    x = images()
    tokens, expected = model.forward_features(x), plain.forward_features(x)
    parts = [expected[f"x_norm_{part}"] for part in ("clstoken", "regtokens", "patchtokens")]
    parts[0] = parts[0].unsqueeze(1)
    torch.testing.assert_close(tokens, torch.cat(parts, dim=1), rtol=0, atol=0)
    assert tokens.shape == (2, PREFIX + 15, 24)
    assert (model.num_prefix_tokens, model.num_reg_tokens, model.has_class_token) == (PREFIX, 4, True)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    assert model.forward_head(tokens, pre_logits=True).shape == (2, 24)


@torch.inference_mode()
def test_pooling(model: TimmModel) -> None:
    tokens = model.forward_features(images())
    patches = tokens[:, PREFIX:]
    mean, largest = patches.mean(dim=1), patches.max(dim=1).values
    expected = {"": tokens, "token": tokens[:, 0], "avg": mean, "max": largest, "avgmax": (mean + largest) / 2}
    for pool, result in expected.items():
        model.reset_classifier(0, pool)
        assert model.global_pool == pool
        torch.testing.assert_close(model(images()), result)
    with pytest.raises(ValueError, match="global_pool='map': one of"):
        model.reset_classifier(0, "map")


@torch.inference_mode()
def test_a_classifier(model: TimmModel, tmp_path: Path) -> None:
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (0, 24, 24)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(7)
    assert (model(images()).shape, model.num_classes) == ((2, 7), 7)
    tokens = model.forward_features(images())
    torch.testing.assert_close(model(images()), model.head(tokens[:, 0]))
    assert model.forward_head(tokens, pre_logits=True).shape == (2, 24)
    model.reset_classifier(0)
    assert model(images()).shape == (2, 24)
    assert timm_model(tmp_path, num_classes=3)(images()).shape == (2, 3)


@torch.inference_mode()
def test_intermediates(model: TimmModel, plain: DinoVisionTransformer) -> None:
    x = images()
    blocks = plain.get_intermediate_layers(x, n=4, norm=False)
    last, layers = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x), rtol=0, atol=0)
    assert [tuple(layer.shape) for layer in layers] == [(2, 24, 3, 5)] * 4
    for layer, block in zip(layers, blocks, strict=True):
        torch.testing.assert_close(layer.flatten(2).transpose(1, 2), block, rtol=0, atol=0)
        assert layer.is_contiguous()
    pairs = model.forward_intermediates(
        x, [-1, 0], return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    normed = plain.get_intermediate_layers(x, n=[0, 3], return_class_token=True)
    for (patches, prefix), (expected, cls) in zip(pairs, normed, strict=True):
        torch.testing.assert_close(patches, expected, rtol=0, atol=0)
        torch.testing.assert_close(prefix[:, 0], cls, rtol=0, atol=0)
        assert prefix.shape == (2, PREFIX, 24)
    early, [second] = model.forward_intermediates(x, [1], stop_early=True, output_fmt="NLC")
    torch.testing.assert_close(early[:, PREFIX:], model.norm(second), rtol=0, atol=0)
    for wrong in (5, [4], [-5], 0):
        with pytest.raises(ValueError, match="the model has 4 blocks, -4 to 3"):
            model.forward_intermediates(x, wrong)
    with pytest.raises(ValueError, match="output_fmt='NHWC': NCHW or NLC"):
        model.forward_intermediates(x, output_fmt="NHWC")


@torch.inference_mode()
def test_intermediate_layers_are_not_normed_by_default(model: TimmModel, plain: DinoVisionTransformer) -> None:
    x = images()
    [layer] = model.get_intermediate_layers(x)
    torch.testing.assert_close(layer, plain.get_intermediate_layers(x, norm=False)[0], rtol=0, atol=0)
    [(grid, prefix)] = model.get_intermediate_layers(x, reshape=True, return_prefix_tokens=True, norm=True)
    assert (grid.shape, prefix.shape) == ((2, 24, 3, 5), (2, PREFIX, 24))


def test_the_description_of_the_weights(model: TimmModel) -> None:
    cfg = model.pretrained_cfg
    assert cfg is model.default_cfg
    assert (cfg["input_size"], cfg["interpolation"], cfg["num_classes"]) == ((3, 56, 56), "bicubic", 0)
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert math.floor(56 / cfg["crop_pct"]) == 70
    embed = model.patch_embed
    assert (embed.grid_size, embed.num_patches, embed.patch_size, embed.img_size) == ((4, 4), 16, (14, 14), (56, 56))


def test_timm_resizes_to_the_short_side_of_the_model() -> None:
    """timm computes the size as `floor(input_size / crop_pct)`, which must not lose a pixel."""
    for crop in range(14, 600, 14):
        for resize in range(crop, crop + 200):
            cfg = timm_config(CONFIG, PreprocessSpec(resize=resize, crop=crop))
            assert math.floor(crop / cfg["crop_pct"]) == resize, (crop, resize)


@pytest.mark.parametrize(
    ("spec", "mode", "side"),
    [
        (None, "center", 56),
        (PreprocessSpec(fit="pad", resize=None, crop=70), "border", 70),
        (PreprocessSpec(fit="squash", resize=None, crop=70), "squash", 70),
        (PreprocessSpec(resize=518, crop=None), "center", 56),
    ],
)
def test_other_preprocessing(spec: PreprocessSpec | None, mode: str, side: int) -> None:
    cfg = timm_config(CONFIG, spec)
    assert (cfg["crop_mode"], cfg["input_size"], cfg["crop_pct"]) == (mode, (3, side, side), 1.0)


def test_the_rule_for_positions(plain: DinoVisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of other projects get timm's rule, because timm's code uses it for all weights. Our files keep theirs."""
    monkeypatch.setitem(model_config.CONFIGS, "small", replace(CONFIG, pos_embed_rule="offset"))
    torch.save(plain.state_dict(), tmp_path / "meta.pth")
    arrays = {key: tensor.numpy() for key, tensor in plain.state_dict().items()}
    torch.save(
        {k: torch.from_numpy(v) for k, v in to_dialect(arrays, CONFIG, TIMM_REGISTERS).items()}, tmp_path / "t.pth"
    )
    for file in ("meta.pth", "t.pth"):
        loaded = timm_model(tmp_path / file, arch="small")
        assert loaded.config.pos_embed_rule == "antialias"
        torch.testing.assert_close(loaded(images()), plain(images()))
    assert timm_model(tmp_path / "meta.pth", arch="small", pos_embed_rule="size").config.pos_embed_rule == "size"
    save_checkpoint(tmp_path / "c", plain.state_dict(), replace(CONFIG, pos_embed_rule="offset"), {})
    assert timm_model(tmp_path / "c").config.pos_embed_rule == "offset"

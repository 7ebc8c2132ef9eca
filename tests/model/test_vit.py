"""Tests of the backbone: Meta's outputs on regenerated weights, and properties of a small random model."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the backbone is torch: pip install '.[train]'")

from model.config import ViTConfig, config_for  # noqa: E402
from model.vit import DinoVisionTransformer  # noqa: E402

ORACLE = Path(__file__).parents[1] / "data" / "dinov2_vits14.npz"
SMALL = ViTConfig(embed_dim=32, depth=4, num_heads=2, img_size=56, num_register_tokens=3, pos_embed_rule="antialias")


def oracle_weights(model: DinoVisionTransformer) -> dict[str, torch.Tensor]:
    """Return the weights that tests/data/README.md describes: keys in sorted order, each with its own generator."""
    weights = {}
    for index, (key, tensor) in enumerate(sorted(model.state_dict().items())):
        n = np.random.default_rng([11, index]).standard_normal(tuple(tensor.shape), dtype=np.float32)
        if key.endswith("qkv.weight"):
            n = 0.08 * n
        elif key.endswith("gamma") or ("norm" in key and key.endswith("weight")):
            n = 1 + 0.1 * n
        else:
            n = 0.02 * n
        weights[key] = torch.from_numpy(n.astype(np.float32))
    return weights


def oracle_image(seed: int, batch: int, height: int, width: int) -> torch.Tensor:
    g = np.random.default_rng(seed)
    y, x = (axis.astype(np.float32) for axis in np.mgrid[0:height, 0:width])
    images = np.empty((batch, 3, height, width), np.float32)
    for image in images:
        for channel in image:
            fy, fx = g.uniform(0.01, 0.2, 2)
            p = g.uniform(0, 6.28)
            channel[:] = np.sin(fy * y + fx * x + p) + 0.1 * g.standard_normal((height, width), dtype=np.float32)
    return torch.from_numpy(images)


@cache
def official() -> tuple[DinoVisionTransformer, dict[str, np.ndarray]]:
    with np.load(ORACLE) as file:
        entries = {key.removeprefix("dinov2_vits14/"): file[key] for key in file.files}
    model = DinoVisionTransformer(config_for("dinov2_vits14")).eval()
    model.load_state_dict(oracle_weights(model), strict=True)
    return model, entries


def compare(entries: dict[str, np.ndarray], group: str, ours: dict[str, torch.Tensor]) -> None:
    """Compare every entry of a group of recorded outputs with ours."""
    expected = {key.partition("/")[2]: value for key, value in entries.items() if key.startswith(f"{group}/")}
    assert expected.keys() == ours.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(ours[key].numpy(), value, rtol=0, atol=2e-4, err_msg=f"{group}/{key}")


def summary(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        "x_norm_clstoken": features["x_norm_clstoken"],
        "x_norm_patchtokens_mean": features["x_norm_patchtokens"].mean(dim=1),
    }


@pytest.mark.parametrize(("height", "width"), [(224, 224), (518, 518), (98, 98), (224, 336)])
def test_equals_the_official_code(height: int, width: int) -> None:
    model, entries = official()
    x = oracle_image(11 + 1000 * height + width, 2, height, width)
    with torch.inference_mode():
        features = model.forward_features(x)
        layers = model.get_intermediate_layers(x, n=4, return_class_token=True)
    ours = summary(features) | {"x_norm_patchtokens_every_17th": features["x_norm_patchtokens"][:, ::17]}
    for index, (patches, cls) in enumerate(layers):
        ours[f"layer-{4 - index}/cls"] = cls
        ours[f"layer-{4 - index}/patch_mean"] = patches.mean(dim=1)
    compare(entries, f"{height}x{width}", ours)


def test_equals_the_official_code_when_masked() -> None:
    model, entries = official()
    masks = torch.from_numpy(np.random.default_rng(11 + 9).random((2, 256)) < 0.3)
    with torch.inference_mode():
        features = model.forward_features(oracle_image(11 + 7, 2, 224, 224), masks=masks)
    compare(entries, "masked224", summary(features))


def test_no_group_of_the_oracle_is_forgotten() -> None:
    _, entries = official()
    assert {key.partition("/")[0] for key in entries} == {"224x224", "518x518", "98x98", "224x336", "masked224"}


@pytest.fixture(scope="module")
def small() -> DinoVisionTransformer:
    """Return a small model with random values in every parameter. Zeros and ones would hide unused parameters."""
    torch.manual_seed(5)
    model = DinoVisionTransformer(SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 42, 70, generator=torch.Generator().manual_seed(6))


@torch.inference_mode()
def test_feature_dict(small: DinoVisionTransformer, pixels: torch.Tensor) -> None:
    features = small.forward_features(pixels)
    assert features["x_norm_clstoken"].shape == (2, 32)
    assert features["x_norm_regtokens"].shape == (2, 3, 32)
    assert features["x_norm_patchtokens"].shape == (2, 15, 32)
    assert features["x_prenorm"].shape == (2, 1 + 3 + 15, 32)
    assert features["masks"] is None
    normed = small.norm(features["x_prenorm"])
    torch.testing.assert_close(normed[:, 0], features["x_norm_clstoken"])
    torch.testing.assert_close(normed[:, 1:4], features["x_norm_regtokens"])
    torch.testing.assert_close(normed[:, 4:], features["x_norm_patchtokens"])
    torch.testing.assert_close(small(pixels), features["x_norm_clstoken"])


@torch.inference_mode()
def test_registers_come_after_the_class_token_and_have_no_position(
    small: DinoVisionTransformer, pixels: torch.Tensor
) -> None:
    tokens = small.prepare_tokens_with_masks(pixels)
    torch.testing.assert_close(tokens[:, 0], (small.cls_token[0] + small.pos_embed[:, 0]).expand(2, -1))
    torch.testing.assert_close(tokens[:, 1:4], small.register_tokens.expand(2, -1, -1))


@torch.inference_mode()
def test_intermediate_layers(small: DinoVisionTransformer, pixels: torch.Tensor) -> None:
    features = small.forward_features(pixels)
    (last,) = small.get_intermediate_layers(pixels)
    torch.testing.assert_close(last, features["x_norm_patchtokens"])
    (raw,) = small.get_intermediate_layers(pixels, n=[3], norm=False)
    torch.testing.assert_close(raw, features["x_prenorm"][:, 4:])
    by_count = small.get_intermediate_layers(pixels, n=3, return_class_token=True)
    by_index = small.get_intermediate_layers(pixels, n=[1, 2, 3], return_class_token=True)
    for (patches, cls), (patches_too, cls_too) in zip(by_count, by_index, strict=True):
        torch.testing.assert_close(patches, patches_too)
        torch.testing.assert_close(cls, cls_too)
    torch.testing.assert_close(by_count[-1][1], features["x_norm_clstoken"])
    (grid,) = small.get_intermediate_layers(pixels, reshape=True)
    assert grid.shape == (2, 32, 3, 5)
    torch.testing.assert_close(grid[:, :, 1, 2], last[:, 1 * 5 + 2])  # row-major, height before width


@torch.inference_mode()
@pytest.mark.parametrize("block", [0, 2, -1])
def test_attention_weights_reproduce_the_forward_pass(
    small: DinoVisionTransformer, pixels: torch.Tensor, block: int
) -> None:
    weights = small.get_attention(pixels, block=block)
    assert weights.shape == (2, 2, 19, 19)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 19))
    tokens = small.prepare_tokens_with_masks(pixels)
    for layer in small.blocks[: block % 4]:
        tokens = layer(tokens)
    layer = small.blocks[block]
    normed = layer.norm1(tokens)
    values = layer.attn.qkv(normed)[..., 64:].view(2, 19, 2, 16).transpose(1, 2)  # [B, A, T, D/A]
    by_hand = layer.attn.proj((weights @ values).transpose(1, 2).reshape(2, 19, 32))
    torch.testing.assert_close(by_hand, layer.attn(normed), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_mask_token_replaces_the_patch_but_not_its_position(small: DinoVisionTransformer, pixels: torch.Tensor) -> None:
    masks = torch.zeros(2, 15, dtype=torch.bool)
    masks[0, 4] = True
    plain, masked = small.prepare_tokens_with_masks(pixels), small.prepare_tokens_with_masks(pixels, masks)
    changed = (plain != masked).any(-1).nonzero().tolist()
    assert changed == [[0, 4 + 4]]
    everything = small.prepare_tokens_with_masks(pixels, torch.ones(2, 15, dtype=torch.bool))
    torch.testing.assert_close(masked[0, 8], everything[0, 8])
    assert (everything[0, 4] - everything[0, 5]).abs().max() > 0.1


@torch.inference_mode()
def test_images_of_a_batch_do_not_touch_each_other(small: DinoVisionTransformer, pixels: torch.Tensor) -> None:
    torch.testing.assert_close(small(pixels)[1:], small(pixels[1:]))


def test_weights_at_the_start() -> None:
    """As in Meta's code, linear layers and positions have a truncated normal distribution, and class and register
    tokens are nearly zero.
    """
    torch.manual_seed(0)
    config = ViTConfig(embed_dim=96, depth=2, num_heads=2, img_size=140, num_register_tokens=30, layerscale_init=1e-4)
    state = DinoVisionTransformer(config).state_dict()
    deviations = {"pos_embed": 0.02, "cls_token": 1e-6, "register_tokens": 1e-6}
    for name, tensor in state.items():
        if name in deviations or ((".attn." in name or ".mlp." in name) and name.endswith("weight")):
            assert tensor.std().item() == pytest.approx(deviations.get(name, 0.02), rel=0.25), name
        elif "gamma" in name:
            assert (tensor == 1e-4).all(), name
        elif "norm" in name and name.endswith("weight"):
            assert (tensor == 1).all(), name
        elif name != "patch_embed.proj.weight" and name != "patch_embed.proj.bias":
            assert not tensor.any(), name


@pytest.mark.parametrize(("batch", "rate", "kept"), [(4, 0.1, 4), (8, 0.2, 6), (8, 0.3, 6), (2, 0.9, 1), (5, 0.5, 2)])
def test_drop_path_computes_the_nearest_number_of_samples_and_one_at_least(batch: int, rate: float, kept: int) -> None:
    model = DinoVisionTransformer(ViTConfig(embed_dim=8, depth=1, num_heads=1, img_size=28), drop_path_rate=rate)
    samples, gain = model.blocks[0]._kept_samples(torch.zeros(batch, 5, 8))
    assert len(set(samples.tolist())) == len(samples) == kept
    assert gain == batch / kept


def test_nothing_is_dropped_outside_of_training(small: DinoVisionTransformer, pixels: torch.Tensor) -> None:
    dropping = DinoVisionTransformer(SMALL, drop_path_rate=0.5).eval()
    dropping.load_state_dict(small.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(dropping(pixels), small(pixels))


def test_drop_path_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    model = DinoVisionTransformer(ViTConfig(embed_dim=8, depth=1, num_heads=1, img_size=28), drop_path_rate=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        tokens = torch.randn(1, 5, 8).expand(4, -1, -1)
        block = model.blocks[0].train()
        drops = torch.stack([block(tokens) for _ in range(50)])
    assert any((drops[:, i] == tokens[i]).all(-1).all(-1).any() for i in range(4))  # both branches skipped at times
    attn_only = tokens + 2 * block._attn_branch(tokens)  # kept with twice the gain
    assert any(torch.allclose(drop[0], attn_only[0], atol=1e-5) for drop in drops)


def test_impossible_requests_are_refused(small: DinoVisionTransformer, pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="43x70"):
        small(torch.zeros(1, 3, 43, 70))
    with pytest.raises(ValueError, match="n=5"):
        small.get_intermediate_layers(pixels, n=5)
    with pytest.raises(ValueError, match="block=4"):
        small.get_attention(pixels, block=4)


@pytest.mark.parametrize(
    ("name", "count", "parameters"), [("s", 175, 22.06e6), ("b", 175, 86.58e6), ("l", 343, 304.4e6)]
)
def test_published_sizes(name: str, count: int, parameters: float) -> None:
    """The tensors are those of the released files, and the parameter counts are MODEL_CARD's 21, 86 and 300 million."""
    with torch.device("meta"):
        model = DinoVisionTransformer(config_for(f"dinov2_vit{name}14"))
        registers = DinoVisionTransformer(config_for(f"dinov2_vit{name}14_reg"))
    assert len(model.state_dict()) == count
    assert len(registers.state_dict()) == count + 1
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)


def test_giant_is_swiglu() -> None:
    with torch.device("meta"):
        state = DinoVisionTransformer(config_for("dinov2_vitg14")).state_dict()
    assert len(state) == 567
    assert state["blocks.0.mlp.w12.weight"].shape == (8192, 1536)
    assert state["blocks.0.mlp.w3.weight"].shape == (1536, 4096)

"""Tests of dino.txt's two networks: they equal a plain implementation in torch, and wrong files are refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from model.config import ViTConfig
from model.convert import CheckpointError
from model.dinotxt.networks import TextEncoder, VisionHead
from model.dinotxt.prompts import MAX_PLACES, count_nodes, in_parts, prompt_tree
from model.dinotxt.store import write_safetensors
from model.dinotxt.towers import (
    TextEncoderShape,
    VisionHeadShape,
    check_match,
    text_encoder_shape,
    vision_head_shape,
)
from tests.model.dinotxt_files import random_tensors, text_encoder_shapes, vision_head_shapes

TOLERANCE = 2e-4
END = 600


def plain_attention(torch, tensors, key: str, x, *, causal: bool):
    """Multi-head attention as in dinov2's `Attention`, with heads of width 64."""
    t, d = x.shape[-2:]
    q, k, v = (x @ tensors[f"{key}.qkv.weight"].T).reshape(*x.shape[:-1], 3, d // 64, 64).movedim(-3, 0)
    q, k, v = (part.transpose(-3, -2) for part in (q, k, v))
    scores = q @ k.transpose(-1, -2) * 64**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(-3, -2).reshape(x.shape)
    return mixed @ tensors[f"{key}.proj.weight"].T + tensors[f"{key}.proj.bias"]


def plain_norm(torch, tensors, key: str, x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], tensors[f"{key}.weight"], tensors[f"{key}.bias"], eps=1e-5)


def plain_linear(torch, tensors, key: str, x):
    return torch.nn.functional.linear(x, tensors[f"{key}.weight"], tensors[f"{key}.bias"])


def plain_vision_head(tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="the networks are compared with torch: pip install '.[train]'")
    tensors, x = {name: torch.from_numpy(array) for name, array in tensors.items()}, torch.from_numpy(tokens)
    for i in range(2):
        key = f"block_list.{i}"
        attended = plain_attention(
            torch, tensors, f"{key}.attn", plain_norm(torch, tensors, f"{key}.norm1", x), causal=False
        )
        x = x + tensors[f"{key}.ls1.gamma"] * attended
        normed = plain_norm(torch, tensors, f"{key}.norm2", x)
        gate, value = (plain_linear(torch, tensors, f"{key}.mlp.{name}", normed) for name in ("w1", "w2"))
        hidden = torch.nn.functional.silu(gate) * value
        x = x + tensors[f"{key}.ls2.gamma"] * plain_linear(torch, tensors, f"{key}.mlp.w3", hidden)
    return plain_norm(torch, tensors, "ln_final", x).numpy()


def plain_text_encoder(tensors: dict[str, np.ndarray], prompt: list[int], *, depth: int = 3) -> np.ndarray:
    """Encode a prompt as Meta's code does: with zeros up to the whole context, and the features at the largest id."""
    torch = pytest.importorskip("torch", reason="the networks are compared with torch: pip install '.[train]'")
    tensors = {name: torch.from_numpy(array) for name, array in tensors.items()}
    positions = tensors["backbone.positional_embedding"]
    ids = torch.zeros(len(positions), dtype=torch.long)
    ids[: len(prompt)] = torch.tensor(prompt)
    x = tensors["backbone.token_embedding.weight"][ids] + positions
    for i in range(depth):
        key = f"backbone.blocks.{i}"
        normed = plain_norm(torch, tensors, f"{key}.attention_norm", x)
        x = x + plain_attention(torch, tensors, f"{key}.attention", normed, causal=True)
        hidden = plain_linear(
            torch, tensors, f"{key}.feed_forward.fc1", plain_norm(torch, tensors, f"{key}.ffn_norm", x)
        )
        x = x + plain_linear(torch, tensors, f"{key}.feed_forward.fc2", torch.nn.functional.gelu(hidden))
    x = plain_norm(torch, tensors, "backbone.ln_final", x) @ tensors["head.linear_projection.weight"].T
    return x[ids.argmax()].numpy()


@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize("count", [1 + 4 + 25, 1 + 4 + 8 * 12])
def test_the_vision_head_equals_torch(tmp_path: Path, width: int, count: int) -> None:
    tensors = random_tensors(vision_head_shapes(width))
    write_safetensors(tmp_path / "vision.safetensors", tensors)
    tokens = np.random.default_rng(3).standard_normal((2, count, width), np.float32) * np.float32(0.02)
    head = VisionHead(tmp_path / "vision.safetensors", threads=1)
    expected = plain_vision_head(tensors, tokens)
    np.testing.assert_allclose(head.refine(tokens), expected, atol=TOLERANCE)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(head.refine(tokens[1:]), expected[1:], atol=TOLERANCE)


PROMPTS = [
    [599, 5, 6, 7, END],
    [599, 5, 6, 8, 9, END],
    [599, END],
    [599, 5, 6, 7, END],  # twice
    [599, *range(17), END],  # 19 of 20 places
    [599, *range(18), END],
    [598, 5, 6, 7, END],  # another beginning
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, np.ndarray], TextEncoder]:
    tensors = random_tensors(text_encoder_shapes(vocab=END + 1))
    path = tmp_path_factory.mktemp("text") / "text.safetensors"
    write_safetensors(path, tensors)
    return tensors, TextEncoder(path, threads=1)


def test_the_text_encoder_equals_torch(encoder: tuple[dict[str, np.ndarray], TextEncoder]) -> None:
    tensors, network = encoder
    features = network.encode(PROMPTS)
    assert features.shape == (len(PROMPTS), 128)
    for prompt, vector in zip(PROMPTS, features, strict=True):
        np.testing.assert_allclose(vector, plain_text_encoder(tensors, prompt), atol=TOLERANCE, err_msg=str(prompt))
    np.testing.assert_array_equal(features[0], features[3])
    assert np.abs(features[0] - features[1]).max() > 0.1


def test_prompts_in_several_parts_keep_their_order(encoder: tuple[dict[str, np.ndarray], TextEncoder]) -> None:
    _, network = encoder
    rng = np.random.default_rng(5)
    prompts = [[599, *map(int, rng.integers(0, 598, rng.integers(1, 18))), END] for _ in range(80)]
    assert len(list(in_parts(prompts))) > 1
    features = network.encode(prompts)
    for index in (0, 17, 79):
        np.testing.assert_allclose(features[index], network.encode([prompts[index]])[0], atol=TOLERANCE)


def test_a_beginning_is_computed_once() -> None:
    tree = prompt_tree(PROMPTS[:4])
    assert tree.tokens.tolist() == [599, 5, 6, 7, END, 8, 9, END, END]
    assert tree.depths.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 1]
    assert tree.ends.tolist() == [4, 7, 8, 4]
    assert tree.paths.shape == (9, 6)
    assert tree.paths[7].tolist() == [0, 1, 2, 5, 6, 7]
    assert tree.paths[8].tolist() == [0, 8, 8, 8, 8, 8]
    assert count_nodes(PROMPTS[:4]) == 9


def test_parts_are_bounded_and_complete() -> None:
    rng = np.random.default_rng(6)
    prompts = [rng.integers(0, 3, rng.integers(2, 60)).tolist() for _ in range(1000)]
    parts = list(in_parts(prompts))
    assert sorted(index for part in parts for index in part) == list(range(1000))
    for part in parts:
        chosen = [prompts[index] for index in part]
        assert count_nodes(chosen) * max(map(len, chosen)) <= MAX_PLACES
    assert sum(count_nodes([prompts[index] for index in part]) for part in parts) < 1.1 * count_nodes(prompts)


def test_the_published_files_have_the_expected_tensors() -> None:
    """The names, the shapes and the numbers of parameters of the two files that Meta published."""
    vision = published(vision_head_shapes(1024, 2752, 2))
    text = published(text_encoder_shapes(1280, 5120, 24, 49408, 77, 2048))
    assert vision_head_shape(vision) == VisionHeadShape(1024, 2752, 2)
    assert text_encoder_shape(text) == TextEncoderShape(1280, 5120, 24, 49408, 77, 2048)
    assert round(sum(array.size for array in vision.values()) / 1e5) == 253
    assert round(sum(array.size for array in text.values()) / 1e6) == 538
    backbone = ViTConfig(embed_dim=1024, depth=24, num_heads=16, num_register_tokens=4)
    check_match(vision_head_shape(vision), text_encoder_shape(text), backbone)


def published(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return arrays of these shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


VISION, TEXT = published(vision_head_shapes()), published(text_encoder_shapes())


@pytest.mark.parametrize(
    ("read", "tensors", "message"),
    [
        (vision_head_shape, TEXT, r"_vision_head.pth\): it has no tensor ln_final.weight; this is a text encoder"),
        (text_encoder_shape, VISION, r"_text_encoder.pth\): it has no tensor backbone.token.*; this is a vision head"),
        (vision_head_shape, {"cls_token": np.zeros((1, 1, 4))}, "this is a backbone"),
        (vision_head_shape, {"visual_model.head.ln_final.weight": np.zeros(4)}, "this is DINOv3's file"),
        (text_encoder_shape, {"weight": np.zeros(4)}, "its 1 tensors are weight$"),
        (text_encoder_shape, {}, "its 0 tensors are "),
        (vision_head_shape, VISION | {"ln_final.weight": np.zeros((2, 3))}, r"ln_final.weight has shape \[2, 3\]"),
        (vision_head_shape, published(vision_head_shapes(96)), "its width is 96, which is not a multiple of 64"),
        (vision_head_shape, VISION | {"more": np.zeros(2)}, "extra tensors: more$"),
        (
            vision_head_shape,
            VISION | {"block_list.1.attn.qkv.weight": np.zeros((64, 64))},
            r"misshapen tensors: block_list.1.attn.qkv.weight \[64, 64\] instead of \[192, 64\]$",
        ),
        (
            vision_head_shape,
            {name: array for name, array in VISION.items() if name != "block_list.1.ls2.gamma"},
            "missing tensors: block_list.1.ls2.gamma$",
        ),
        (text_encoder_shape, TEXT | {"backbone.blocks.999999.x": np.zeros(2)}, "missing tensors: .* more"),
        (text_encoder_shape, published(text_encoder_shapes(vocab=0)), r"has shape \[0, 128\]"),
    ],
)
def test_wrong_files_are_refused(read, tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 384}, "the vision head has width 64, but this backbone has width 384; .*dinov2_vitl14_reg"),
        ({"num_register_tokens": 0}, "backbone with 4 registers, but this backbone has 0: use dinov2_vitl14_reg"),
    ],
)
def test_another_backbone_is_refused(change: dict[str, int], message: str) -> None:
    backbone = ViTConfig(embed_dim=64, depth=2, num_heads=1, num_register_tokens=4)
    check_match(vision_head_shape(VISION), text_encoder_shape(TEXT), backbone)
    with pytest.raises(CheckpointError, match=message):
        check_match(vision_head_shape(VISION), text_encoder_shape(TEXT), dataclasses.replace(backbone, **change))


def test_a_text_encoder_of_another_width_is_refused() -> None:
    backbone = ViTConfig(embed_dim=64, depth=2, num_heads=1, num_register_tokens=4)
    other = text_encoder_shape(published(text_encoder_shapes(out=256)))
    with pytest.raises(CheckpointError, match="vectors of width 256, but a vision head of width 64 needs 128"):
        check_match(vision_head_shape(VISION), other, backbone)

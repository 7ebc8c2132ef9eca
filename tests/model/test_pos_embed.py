"""Compares the three resize rules with torch's own interpolation, and tests the native grid."""

import hashlib

import numpy as np
import pytest

from model.pos_embed import resize_matrix, resize_pos_embed

torch = pytest.importorskip("torch", reason="compares with torch.nn.functional.interpolate: pip install '.[train]'")

SIZES = [1, 7, 16, 24, 36, 37, 38, 73]


def reference(pos_embed: np.ndarray, grid: tuple[int, int], rule: str) -> np.ndarray:
    side = round((pos_embed.shape[1] - 1) ** 0.5)
    patches = torch.tensor(pos_embed[:, 1:]).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if rule == "offset":
        scale = tuple((n + 0.1) / side for n in grid)
        out = torch.nn.functional.interpolate(patches, scale_factor=scale, mode="bicubic")
    else:
        out = torch.nn.functional.interpolate(patches, size=grid, mode="bicubic", antialias=rule == "antialias")
    assert tuple(out.shape[-2:]) == grid
    return np.concatenate([pos_embed[:, :1], out.permute(0, 2, 3, 1).reshape(1, -1, pos_embed.shape[2])], axis=1)


@pytest.mark.parametrize("rule", ["offset", "antialias", "size"])
@pytest.mark.parametrize("height", SIZES)
def test_equals_torch_interpolate(rule: str, height: int) -> None:
    pos_embed = np.random.default_rng(0).standard_normal((1, 1 + 37 * 37, 8), dtype=np.float32)
    for width in SIZES:
        if (height, width) == (37, 37):
            continue
        ours = resize_pos_embed(pos_embed, (height, width), rule)
        np.testing.assert_allclose(ours, reference(pos_embed, (height, width), rule), atol=3e-5)


@pytest.mark.parametrize("rule", ["offset", "antialias", "size"])
def test_native_grid_is_untouched(rule: str) -> None:
    pos_embed = np.random.default_rng(1).standard_normal((1, 1 + 16, 4), dtype=np.float32)
    assert resize_pos_embed(pos_embed, (4, 4), rule) is pos_embed


def test_rules_differ_where_models_differ() -> None:
    matrices = [resize_matrix(37, 16, rule) for rule in ("offset", "antialias", "size")]
    assert all(np.abs(a - b).max() > 1e-2 for a, b in zip(matrices, matrices[1:] + matrices[:1], strict=True))


def test_cached_matrices_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        resize_matrix(37, 16, "size")[0, 0] = 1.0


def test_the_bits_are_the_same_on_every_processor() -> None:
    """The manifest stores the sha256 of a graph that contains these positions, so they must be equal on every host."""
    whole = np.random.default_rng(0).integers(-(2**20), 2**20, (1, 1 + 37 * 37, 8))
    pos_embed = (whole / 2**24).astype(np.float32)
    digests = [
        hashlib.sha256(resize_pos_embed(pos_embed, (16, 24), rule).tobytes()).hexdigest()[:16]
        for rule in ("offset", "antialias", "size")
    ]
    assert digests == ["175756a4c8ac7aa1", "4f7ca284df75d712", "3e2d82bff70d2218"]

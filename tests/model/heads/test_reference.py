"""Compares each kind of Meta's heads with a plain implementation in torch of the same rule, for every backbone.

The files have Meta's tensor names and shapes, and random numbers. They are written by torch and read by this project's
reader.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.heads.published import KITTI_RANGE, NYU_RANGE, read_published
from model.heads.record import ImageTokens
from tests.model.heads import meta_heads as meta

torch = pytest.importorskip("torch", reason="heads are compared with torch: pip install '.[train]'")
F = torch.nn.functional
TOLERANCE = 2e-4


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def layers_of(
    tokens: ImageTokens, layers: tuple[int, ...], registers: int, norm: Any = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the patch map [1, D, h, w] and the class token [1, D] of each block, after the norm if one is given."""
    found = []
    for i in layers:
        inner = torch.from_numpy(tokens.inner[f"tokens.{i}"])
        if norm is not None:
            inner = F.layer_norm(inner, inner.shape[1:], *map(torch.from_numpy, norm), eps=1e-6)
        found.append((inner[1 + registers :].T.reshape(1, -1, *tokens.grid), inner[None, 0]))
    return found


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("arch", meta.ARCHS)
def test_classification(arch: str, layers: int, registers: int, tmp_path: Path) -> None:
    config = meta.config_of(arch, registers)
    state = meta.classification(config.embed_dim, layers)
    name = f"{arch}{'_reg4' * bool(registers)}_linear{'4' * (layers == 4)}_head.pth"
    path = saved(tmp_path / name, {key: torch.from_numpy(value) for key, value in state.items()})
    head = meta.opened(read_published(path, "imagenet", config), config)
    tokens = meta.tokens_of(config)
    assert head.record.kind == "classification"
    assert len(head.outputs) == layers - 1

    blocks = tuple(range(config.depth - layers, config.depth))
    found = layers_of(tokens, blocks, registers, meta.norm_of(config))
    features = torch.cat([*(cls for _, cls in found), found[-1][0].flatten(2).mean(2)], dim=1)
    wanted = F.linear(features, *(torch.from_numpy(state[part]) for part in ("weight", "bias")))
    np.testing.assert_allclose(head.classify(tokens), wanted[0].numpy(), atol=TOLERANCE)


@pytest.mark.parametrize(("data", "classes"), [("ade20k", 150), ("voc2012", 21)])
@pytest.mark.parametrize(("variant", "layers"), [("linear", 1), ("ms", 4)])
@pytest.mark.parametrize("arch", meta.ARCHS)
def test_segmentation(arch: str, variant: str, layers: int, data: str, classes: int, tmp_path: Path) -> None:
    config = meta.config_of(arch)
    state = meta.segmentation(config.embed_dim, layers, classes)
    path = saved(tmp_path / f"{arch}_{data}_{variant}_head.pth", meta.checkpoint(state))
    head = meta.opened(read_published(path, "scene", config), config)
    tokens = meta.tokens_of(config)
    assert head.record.classes[-1] == {"ade20k": "flag", "voc2012": "tvmonitor"}[data]

    t = {key.removeprefix("decode_head."): torch.from_numpy(value) for key, value in state.items()}
    blocks = tuple(range(config.depth - layers, config.depth))
    x = torch.cat([patches for patches, _ in layers_of(tokens, blocks, 0, meta.norm_of(config))], dim=1)
    x = F.batch_norm(x, t["bn.running_mean"], t["bn.running_var"], t["bn.weight"], t["bn.bias"], eps=1e-5)
    wanted = F.conv2d(x, t["conv_seg.weight"], t["conv_seg.bias"])[0]
    np.testing.assert_allclose(head.segment(tokens), wanted.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize(("data", "metres"), [("nyu", NYU_RANGE), ("kitti", KITTI_RANGE)])
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("arch", meta.ARCHS)
def test_linear_depth(arch: str, layers: int, data: str, metres: tuple[float, float], tmp_path: Path) -> None:
    config = meta.config_of(arch)
    state = meta.linear_depth(config.embed_dim, layers)
    path = saved(tmp_path / f"{arch}_{data}_linear{'4' * (layers == 4)}_head.pth", meta.checkpoint(state))
    head = meta.opened(read_published(path, "depth", config), config)
    tokens = meta.tokens_of(config)
    four = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}[config.depth]
    blocks = four if layers == 4 else (config.depth - 1,)
    assert head.outputs == tuple(f"tokens.{i}" for i in blocks)
    assert head.record.depth_range == metres

    t = [torch.from_numpy(state[f"decode_head.conv_depth.{part}"]) for part in ("weight", "bias")]
    maps = [torch.cat([p, c[:, :, None, None].expand_as(p)], dim=1) for p, c in layers_of(tokens, blocks, 0)]
    maps = [F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False) for x in maps]
    logits = F.conv2d(torch.cat(maps, dim=1), *t).relu() + 0.1
    for low, high in (metres, (0.5, 3.0)):
        bins = torch.linspace(low, high, 256)
        wanted = torch.einsum("ikmn,k->imn", logits / logits.sum(dim=1, keepdim=True), bins)[0]
        got = head.depth(tokens, None if (low, high) == metres else (low, high))
        assert got.std() > 0.01 * (high - low)
        np.testing.assert_allclose(got, wanted.numpy(), atol=TOLERANCE)


def reference_dpt(t: dict[str, torch.Tensor], layers: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Compute relu(output) [H, W] of a DPT head in the order of Meta's code."""

    def conv(x: torch.Tensor, key: str, **options: int) -> torch.Tensor:
        return F.conv2d(x, t[f"{key}.weight"], t.get(f"{key}.bias"), **options)

    def residual(x: torch.Tensor, key: str) -> torch.Tensor:
        inner = conv(x.relu(), f"{key}.conv1.conv", padding=1)
        return x + conv(inner.relu(), f"{key}.conv2.conv", padding=1)

    def enlarged(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    maps = []
    for k, (patches, cls) in enumerate(layers):
        x = patches.flatten(2).transpose(1, 2)
        key = f"reassemble_blocks.readout_projects.{k}.0"
        x = F.gelu(F.linear(torch.cat([x, cls[:, None].expand_as(x)], dim=2), t[f"{key}.weight"], t[f"{key}.bias"]))
        x = conv(x.transpose(1, 2).reshape(patches.shape), f"reassemble_blocks.projects.{k}.conv")
        key = f"reassemble_blocks.resize_layers.{k}"
        if k < 2:
            x = F.conv_transpose2d(x, t[f"{key}.weight"], t[f"{key}.bias"], stride=(4, 2)[k])
        elif k == 3:
            x = conv(x, key, stride=2, padding=1)
        maps.append(conv(x, f"convs.{k}.conv", padding=1))
    x = maps[3]
    for block in range(4):
        key = f"fusion_blocks.{block}"
        if block:
            skip = F.interpolate(maps[3 - block], size=x.shape[2:], mode="bilinear", align_corners=False)
            x = x + residual(skip, f"{key}.res_conv_unit1")
        x = conv(enlarged(residual(x, f"{key}.res_conv_unit2")), f"{key}.project.conv")
    x = conv(x, "project.conv", padding=1).relu()
    x = conv(enlarged(conv(x, "conv_depth.head.0", padding=1)), "conv_depth.head.2", padding=1).relu()
    return conv(x, "conv_depth.head.4").relu()[0, 0]


@pytest.mark.parametrize(
    ("arch", "grid"),
    [("dinov2_vits14", (3, 4)), ("dinov2_vits14", (1, 5)), *((arch, (2, 3)) for arch in meta.ARCHS[1:])],
)
def test_dpt(arch: str, grid: tuple[int, int], tmp_path: Path) -> None:
    config = meta.config_of(arch)
    state = meta.dpt(config.embed_dim)
    path = saved(tmp_path / f"{arch}_nyu_dpt_head.pth", meta.checkpoint(state))
    head = meta.opened(read_published(path, "depth", config), config)
    path.unlink()  # up to 250 MB
    tokens = meta.tokens_of(config, grid)
    got = head.depth(tokens)
    assert got.shape == (32 * -(-grid[0] // 2), 32 * -(-grid[1] // 2))

    t = {key.removeprefix("decode_head."): torch.from_numpy(value) for key, value in state.items()}
    with torch.no_grad():
        raw = reference_dpt(t, layers_of(tokens, head.record.layers, 0))
    assert raw.std() > 0.02
    np.testing.assert_allclose(got, (raw + 0.001).clamp(0.001, 10).numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(head.depth(tokens, (0.2, 0.5)), (raw + 0.2).clamp(0.2, 0.5).numpy(), atol=TOLERANCE)

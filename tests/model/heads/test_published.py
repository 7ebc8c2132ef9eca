"""Tests of the reader of Meta's heads: files for another backbone, of another kind, or with bad content are refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from model.config import ViTConfig
from model.heads.class_names import ADE20K, VOC2012
from model.heads.published import read_published
from model.heads.record import HeadError
from model.weights import CheckpointError
from tests.model.heads import meta_heads as meta
from tests.model.torch_files import write_torch_file

SMALL, GIANT = meta.config_of("dinov2_vits14"), meta.config_of("dinov2_vitg14")
ODD = dataclasses.replace(SMALL, depth=10)


def written(folder: Path, name: str, state: dict[str, np.ndarray]) -> Path:
    """Write a head as a .pth file or as a safetensors file."""
    path = folder / name
    state = {key: np.asarray(value) for key, value in state.items()}
    if path.suffix == ".pth":
        write_torch_file(path, state)
    else:
        save_file(state, path)
    return path


SEGMENTATION = meta.segmentation(384, 1)
MS = meta.segmentation(384, 4, 21)
LINEAR4 = meta.linear_depth(384, 4)


@pytest.mark.parametrize(
    ("name", "state", "config", "reason"),
    [
        (
            "dinov2_vits14_ade20k_linear_head.pth",
            SEGMENTATION,
            GIANT,
            r"belongs to dinov2_vits14 \(384 wide, 12 blocks\)",
        ),
        # The shapes alone would fit the giant model: 4 x 384 = 1536.
        ("dinov2_vits14_voc2012_ms_head.pth", MS, GIANT, "belongs to dinov2_vits14"),
        ("head.pth", SEGMENTATION, GIANT, "it has 384 inputs, but .* has 1536 .1 block. or 6144 .4 blocks."),
        ("head.pth", SEGMENTATION, meta.config_of("dinov2_vits14", 4), "without registers, but the model has 4"),
        (
            "dinov2_vits14_reg4_linear_head.pth",
            meta.classification(384, 1),
            SMALL,
            "belongs to dinov2_vits14_reg4, which has 4 registers, but the model has 0",
        ),
        (
            "dinov2_vits14_linear_head.pth",
            meta.classification(384, 1),
            meta.config_of("dinov2_vits14", 4),
            "has 0 registers, but the model has 4",
        ),
        (
            "dinov2_vits14_linear4_head.pth",
            meta.classification(384, 1),
            SMALL,
            "linear4, a head for 4 blocks, but .* for 1",
        ),
        ("dinov2_vits14_ade20k_linear_head.pth", MS, SMALL, "linear, a head for 1 blocks, but the tensors are for 4"),
        ("nyu.pth", LINEAR4, ODD, "12, 24 or 40 blocks, not 10"),
        ("head.pth", LINEAR4, SMALL, "does not say which depths .* min_depth and max_depth"),
        ("x.pth", {"blocks.0.norm1.weight": np.zeros(3, np.float32)}, SMALL, "contains a backbone"),
        ("x.pth", {"a": np.zeros(3, np.float32)}, SMALL, "not one of Meta's heads .* its tensors are a"),
        ("x.pth", SEGMENTATION | {"decode_head.extra": np.zeros(2, np.float32)}, SMALL, "it also has extra"),
        (
            "x.pth",
            {key: value for key, value in SEGMENTATION.items() if "running_mean" not in key},
            SMALL,
            "bn.running_mean is missing",
        ),
        (
            "x.pth",
            SEGMENTATION | {"decode_head.bn.running_var": -np.ones(384, np.float32)},
            SMALL,
            "running_var has the negative value -1",
        ),
        ("x.pth", SEGMENTATION | {"decode_head.bn.weight": np.ones(383, np.float32)}, SMALL, r"bn.weight is \[383\]"),
        (
            "x.pth",
            SEGMENTATION | {"decode_head.conv_seg.bias": np.full(150, np.inf, np.float32)},
            SMALL,
            "conv_seg.bias has values that are not finite",
        ),
        ("x.safetensors", {"weight": np.zeros((10, 768), int), "bias": np.zeros(10, int)}, SMALL, "has the type int64"),
        (
            "x.pth",
            {"weight": np.zeros((10,), np.float32), "bias": np.zeros(10, np.float32)},
            SMALL,
            r"weight is \[10\]",
        ),
    ],
)
def test_a_wrong_head_is_refused_with_the_reason(
    name: str, state: dict[str, np.ndarray], config: ViTConfig, reason: str, tmp_path: Path
) -> None:
    path = written(tmp_path, name, state)
    with pytest.raises(HeadError, match=reason) as caught:
        read_published(path, "head", config)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_head_of_another_kind_is_refused(tmp_path: Path) -> None:
    """The README of dinov2 links the classification heads of B, L and g as depth heads for one block."""
    path = written(tmp_path, "dinov2_vits14_linear_head.pth", meta.classification(384, 1))
    with pytest.raises(HeadError, match=r"a head for classification, not for depth .*_nyu_linear_head.pth"):
        read_published(path, "depth", SMALL, kind="depth")


def test_the_depth_range_can_be_given(tmp_path: Path) -> None:
    path = written(tmp_path, "dinov2_vits14_nyu_linear4_head.pth", LINEAR4)
    assert read_published(path, "depth", SMALL)[0].depth_range == (0.001, 10)
    assert read_published(path, "depth", SMALL, depth_range=(0.001, 80))[0].depth_range == (0.001, 80)
    for low, high in ((0.0, 10.0), (2.0, 1.0), (1.0, float("nan")), (1.0, float("inf"))):
        with pytest.raises(HeadError, match="need 0 < min_depth < max_depth"):
            read_published(path, "depth", SMALL, depth_range=(low, high))
    other = written(tmp_path, "seg.pth", SEGMENTATION)
    with pytest.raises(HeadError, match="a head for segmentation has no depth range"):
        read_published(other, "seg", SMALL, depth_range=(1, 2))


def test_class_names_follow_from_the_file_name_or_are_given(tmp_path: Path) -> None:
    assert (len(ADE20K), len(set(ADE20K)), len(VOC2012)) == (150, 150, 21)
    path = written(tmp_path, "dinov2_vits14_ade20k_linear_head.pth", SEGMENTATION)
    assert read_published(path, "seg", SMALL)[0].classes == ADE20K
    numbered = written(tmp_path, "seg.safetensors", SEGMENTATION)
    assert read_published(numbered, "seg", SMALL)[0].classes[:2] == ("0", "1")
    names = tuple(f"class {i}" for i in range(150))
    assert read_published(numbered, "seg", SMALL, classes=names)[0].classes == names
    with pytest.raises(HeadError, match="2 class names for a head with 150 classes"):
        read_published(numbered, "seg", SMALL, classes=("a", "b"))


def test_a_dpt_head_of_another_backbone_is_refused(tmp_path: Path) -> None:
    state = meta.dpt(384)
    path = written(tmp_path, "dpt.safetensors", state)
    with pytest.raises(HeadError, match=r"convs.0.conv.weight is \[256, 48, 3, 3\], but .*1536 wide"):
        read_published(path, "depth", GIANT, depth_range=(1, 2))
    del state["decode_head.convs.0.conv.weight"]
    lacking = written(tmp_path, "lacking.safetensors", state)
    with pytest.raises(HeadError, match=r"it lacks convs.0.conv.weight"):
        read_published(lacking, "depth", SMALL, depth_range=(1, 2))


def test_a_file_that_is_not_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match="not a readable ZIP archive"):
        read_published(path, "head", SMALL)
    with pytest.raises(FileNotFoundError):
        read_published(tmp_path / "absent.pth", "head", SMALL)


def test_a_bad_name_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "dinov2_vits14_linear_head.pth", meta.classification(384, 1))
    with pytest.raises(HeadError, match=r"name='../x': must match the pattern"):
        read_published(path, "../x", SMALL)

"""Reads Meta's published heads (facebookresearch/dinov2) and checks that they belong to a backbone.

    dinov2_<arch>[_reg4]_linear[4]_head.pth           classification, 1 or 4 blocks; ImageNet
    dinov2_<arch>_{ade20k,voc2012}_linear_head.pth    segmentation, last block
    dinov2_<arch>_{ade20k,voc2012}_ms_head.pth        segmentation, last four blocks
    dinov2_<arch>_{nyu,kitti}_linear[4]_head.pth      depth, 1 or 4 blocks
    dinov2_<arch>_{nyu,kitti}_dpt_head.pth            depth, DPT

The names of the tensors determine the kind of a head. Their shapes do not always determine the backbone: ViT-S's
segmentation head for four blocks has the same shapes as ViT-g's for one block. A file name in Meta's form is therefore
checked as well. Safetensors files with the same tensor names are also accepted.

Legend: C classes or bins, D width of the backbone.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import ValidationError

from model.config import CONFIGS, ViTConfig
from model.convert import Array
from model.heads.class_names import ADE20K, VOC2012
from model.heads.linear import fold_batch_norm
from model.heads.record import Architecture, Floats, HeadDescription, HeadError, Kind, depth_range_problem, dpt_shapes
from model.messages import in_words
from model.weights import read_tensors

NYU_RANGE: Final = (0.001, 10.0)
KITTI_RANGE: Final = (0.001, 80.0)
BATCH_NORM_EPS: Final = 1e-5
MAX_TENSORS: Final = 1000

DEPTH_BLOCKS: Final[Mapping[int, tuple[int, ...]]] = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
"""The four blocks that Meta's depth heads read, keyed by the backbone's number of blocks."""

_FILE_NAME: Final = re.compile(
    r"dinov2_vit(?P<size>[sblg])14(?P<reg>_reg4?)?_((?P<data>ade20k|voc2012|nyu|kitti)_)?"
    r"(?P<head>linear4|linear|ms|dpt)_head"
)
_BN: Final = ("weight", "bias", "running_mean", "running_var")


def read_published(
    path: Path,
    name: str,
    config: ViTConfig,
    *,
    kind: Kind | None = None,
    depth_range: tuple[float, float] | None = None,
    classes: tuple[str, ...] | None = None,
) -> tuple[HeadDescription, dict[str, Floats]]:
    """Read a head in Meta's format and check that it belongs to a backbone of this shape.

    Args:
        path: a PyTorch or safetensors file with Meta's tensor names.
        name: the name to give the head.
        config: the shape of the backbone.
        kind: the expected kind. If None, every kind is accepted.
        depth_range: smallest and largest depth in metres, for a depth head. If None, the range is that of the data set
            in the file name.
        classes: names of the classes. If None, and the file name contains ade20k or voc2012, the classes of this
            data set are used, provided that their number is right. Otherwise, each class is named by its number.

    Returns:
        The description of the head, and its tensors in float32: `weight` [C, F] and `bias` [C] of a linear head with F
        inputs, or the tensors of a DPT head.

    Raises:
        HeadError: the file is not a head, has another kind than `kind`, or belongs to another backbone. The message
            gives the reason.
        CheckpointError (a ValueError): the file cannot be read, or contains something other than tensors.
        OSError: the file cannot be read.
    """
    tensors = read_tensors(path)
    if len(tensors) > MAX_TENSORS:
        raise HeadError(f"{path}: {len(tensors)} tensors; a head has at most {MAX_TENSORS}")
    file = _FILE_NAME.search(path.name)
    try:
        plain = {key.removeprefix("decode_head."): tensor for key, tensor in tensors.items()}
        found, architecture = _kind(plain)
        if kind is not None and kind != found:
            raise HeadError(f"this is a head for {found}, not for {kind}{_HINTS[kind]}")
        if file is not None:
            _check_name(file, config)
        if found != "classification" and config.num_register_tokens:
            raise HeadError(
                f"Meta's heads for {found} belong to backbones without registers, but the model has "
                f"{config.num_register_tokens}"
            )
        read, n = _tensors(plain, found, architecture, config, None if file is None else file["head"])
        data = None if file is None else file["data"]
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        description = HeadDescription(
            name=name,
            kind=found,
            architecture=architecture,
            layers=_layers(found, n, config.depth),
            normed=found != "depth",
            classes=_names(found, len(read["bias"]) if "bias" in read else 0, data, classes),
            depth_range=_range(found, data, depth_range),
            source=path.name,
            source_sha256=digest,
        )
    except ValidationError as error:
        raise HeadError(in_words(error)) from error
    except HeadError as error:
        raise HeadError(f"{path}: {error}") from error
    return description, read


_HINTS: Final[Mapping[Kind, str]] = {
    "classification": " (Meta's files: dinov2_<arch>_linear_head.pth and dinov2_<arch>_linear4_head.pth)",
    "segmentation": " (Meta's files: dinov2_<arch>_ade20k_linear_head.pth, ..._ms_head.pth; also voc2012)",
    "depth": " (Meta's files: dinov2_<arch>_nyu_linear_head.pth, ..._linear4_head.pth, ..._dpt_head.pth; also kitti)",
}


def _kind(tensors: Mapping[str, Array]) -> tuple[Kind, Architecture]:
    """Recognise a head by the names of its tensors."""
    names = set(tensors)
    if names == {"weight", "bias"}:
        return "classification", "linear"
    if {"conv_seg.weight", "conv_seg.bias"} <= names:
        return "segmentation", "linear"
    if names == {"conv_depth.weight", "conv_depth.bias"}:
        return "depth", "linear"
    if any(name.startswith(("conv_depth.head.", "reassemble_blocks.")) for name in names):
        return "depth", "dpt"
    if any(name.startswith(("blocks.", "backbone.")) for name in names):
        raise HeadError("the file contains a backbone; a head is expected")
    raise HeadError(f"not one of Meta's heads for classification, segmentation or depth; its tensors are {_few(names)}")


def _check_name(name: "re.Match[str]", config: ViTConfig) -> None:
    """Check that a file name in Meta's form names a backbone of this shape.

    Raises:
        HeadError: the file name names another backbone.
    """
    size, registers = f"dinov2_vit{name['size']}14", 4 if name["reg"] else 0
    named = CONFIGS[size]
    if (named.embed_dim, named.depth) != (config.embed_dim, config.depth):
        raise HeadError(
            f"the head belongs to {size} ({named.embed_dim} wide, {named.depth} blocks), but the model is "
            f"{config.embed_dim} wide and has {config.depth} blocks"
        )
    if registers != config.num_register_tokens:
        raise HeadError(
            f"the head belongs to {size}{name['reg'] or ''}, which has {registers} registers, but the model has "
            f"{config.num_register_tokens}"
        )


def _tensors(
    tensors: Mapping[str, Array], kind: Kind, architecture: Architecture, config: ViTConfig, variant: str | None
) -> tuple[dict[str, Floats], int]:
    """Return a head's tensors in this project's form, and the number of blocks that the head reads."""
    if architecture == "dpt":
        return _dpt(tensors, config.embed_dim), 4
    weight, bias = _segmentation(tensors) if kind == "segmentation" else _matrix(tensors, kind)
    n = _n_blocks(weight.shape[1], kind, config.embed_dim)
    expected = {"linear": 1, "linear4": 4, "ms": 4}.get(variant or "")
    if expected not in (None, n):
        raise HeadError(f"the file name says {variant}, a head for {expected} blocks, but the tensors are for {n}")
    return {"weight": weight, "bias": bias}, n


def _matrix(tensors: Mapping[str, Array], kind: Kind) -> tuple[Floats, Floats]:
    """Return the weight [C, F] and the bias [C] of a classification head or of a linear depth head."""
    prefix, tail = ("conv_depth.", (1, 1)) if kind == "depth" else ("", ())
    weight, bias = (_floats(tensors, f"{prefix}{part}") for part in ("weight", "bias"))
    if weight.ndim != 2 + len(tail) or weight.shape[2:] != tail or bias.shape != weight.shape[:1] or len(bias) < 2:
        raise HeadError(f"{prefix}weight is {list(weight.shape)} and {prefix}bias {list(bias.shape)}")
    return weight.reshape(weight.shape[:2]), bias


def _segmentation(tensors: Mapping[str, Array]) -> tuple[Floats, Floats]:
    """Return the weight [C, F] and the bias [C] of a segmentation head, with its batch normalisation folded in."""
    allowed = {"conv_seg.weight", "conv_seg.bias", "bn.num_batches_tracked", *(f"bn.{part}" for part in _BN)}
    if extra := set(tensors) - allowed:
        raise HeadError(f"not Meta's linear segmentation head: it also has {_few(extra)}")
    weight, bias = (_floats(tensors, f"conv_seg.{part}") for part in ("weight", "bias"))
    norm = [_floats(tensors, f"bn.{part}") for part in _BN]
    if weight.ndim != 4 or weight.shape[2:] != (1, 1) or bias.shape != weight.shape[:1] or len(bias) < 2:
        raise HeadError(f"conv_seg.weight is {list(weight.shape)} and conv_seg.bias {list(bias.shape)}")
    for part, array in zip(_BN, norm, strict=True):
        if array.shape != weight.shape[1:2]:
            raise HeadError(f"bn.{part} is {list(array.shape)}, but conv_seg.weight {list(weight.shape)}")
    if norm[3].min() < 0:
        raise HeadError(f"bn.running_var has the negative value {norm[3].min():g}")
    return fold_batch_norm(weight.reshape(weight.shape[:2]), bias, norm, BATCH_NORM_EPS)


def _dpt(tensors: Mapping[str, Array], embed_dim: int) -> dict[str, Floats]:
    wanted = dpt_shapes(embed_dim)
    if missing := wanted.keys() - tensors.keys():
        raise HeadError(f"not Meta's DPT head: it lacks {_few(missing)}")
    if extra := tensors.keys() - wanted.keys():
        raise HeadError(f"not Meta's DPT head: it also has {_few(extra)}")
    for key, shape in sorted(wanted.items()):
        if tensors[key].shape != shape:
            raise HeadError(
                f"{key} is {list(tensors[key].shape)}, but a head for this model ({embed_dim} wide) has {list(shape)}"
            )
    return {key: _floats(tensors, key) for key in wanted}


def _floats(tensors: Mapping[str, Array], key: str) -> Floats:
    if key not in tensors:
        raise HeadError(f"the tensor {key} is missing")
    if tensors[key].dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        raise HeadError(f"the tensor {key} has the type {tensors[key].dtype}")
    values = np.array(tensors[key]).astype(np.float32)
    if not np.isfinite(values).all():
        raise HeadError(f"the tensor {key} has values that are not finite")
    return values


def _n_blocks(width: int, kind: Kind, embed_dim: int) -> int:
    """Return the number of blocks, 1 or 4, that a linear head of this input width reads."""
    widths = {
        "classification": {2 * embed_dim: 1, 5 * embed_dim: 4},
        "segmentation": {embed_dim: 1, 4 * embed_dim: 4},
        "depth": {2 * embed_dim: 1, 8 * embed_dim: 4},
    }[kind]
    if width not in widths:
        one, four = widths
        raise HeadError(
            f"it has {width} inputs, but a head for {kind} of this model ({embed_dim} wide) has {one} (1 block) or "
            f"{four} (4 blocks)"
        )
    return widths[width]


def _layers(kind: Kind, n: int, depth: int) -> tuple[int, ...]:
    if n == 1:
        return (depth - 1,)
    if kind != "depth":
        if depth < n:
            raise HeadError(f"it reads the last {n} blocks, but the model has {depth}")
        return tuple(range(depth - n, depth))
    if depth not in DEPTH_BLOCKS:
        raise HeadError(f"Meta's depth heads for 4 blocks belong to models of 12, 24 or 40 blocks, not {depth}")
    return DEPTH_BLOCKS[depth]


def _names(kind: Kind, count: int, data: str | None, classes: tuple[str, ...] | None) -> tuple[str, ...]:
    if kind == "depth":
        if classes is not None:
            raise HeadError("a depth head has no classes")
        return ()
    if classes is not None:
        if len(classes) != count:
            raise HeadError(f"{len(classes)} class names for a head with {count} classes")
        return classes
    published = {"ade20k": ADE20K, "voc2012": VOC2012}.get(data or "", ())
    return published if len(published) == count else tuple(map(str, range(count)))


def _range(kind: Kind, data: str | None, depth_range: tuple[float, float] | None) -> tuple[float, float] | None:
    if kind != "depth":
        if depth_range is not None:
            raise HeadError(f"a head for {kind} has no depth range")
        return None
    if depth_range is None:
        if data not in ("nyu", "kitti"):
            raise HeadError(
                "the file name does not say which depths the head was trained on: give min_depth and max_depth in "
                f"metres (NYU: {NYU_RANGE[0]} and {NYU_RANGE[1]:g}, KITTI: {KITTI_RANGE[0]} and {KITTI_RANGE[1]:g})"
            )
        return NYU_RANGE if data == "nyu" else KITTI_RANGE
    if (problem := depth_range_problem(*depth_range)) is not None:
        raise HeadError(problem)
    return depth_range


def _few(names: Any) -> str:
    shown = sorted(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

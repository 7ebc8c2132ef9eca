"""Describes a head: its kind, the blocks whose tokens it reads, its classes or its depth range, and its origin.

There are three kinds of linear head, which differ in their input. D is the width of the backbone:

- classification: the class tokens of the head's blocks, then the mean patch token of the last block.
- segmentation: the patch tokens of the head's blocks.
- depth: for each of the head's blocks, the patch token followed by the class token.

A DPT head predicts depth and reads the patch tokens and class tokens of four blocks.

`normed` says whether the tokens pass through the backbone's final norm before the head reads them. They do so for all
heads except Meta's depth heads.

Legend: C classes or bins, D width of the backbone, F inputs of a linear head, N patches, R registers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from model.config import ViTConfig
from model.files import NAME_PATTERN

Floats = npt.NDArray[np.float32]
Kind = Literal["classification", "segmentation", "depth"]
Architecture = Literal["linear", "dpt"]

NORM_EPS: Final = 1e-6  # of the backbone's final norm
LARGEST_DEPTH_M: Final = 1e6
DPT_CHANNELS: Final = 256
MAX_PIXEL_CLASSES: Final = 255  # each class needs an 8-bit label other than 0


class HeadError(ValueError):
    """The error raised when a head cannot be read, trusted or used. The message gives the reason."""


class HeadNotFound(HeadError):
    """The error raised when a model has no head of the requested name or kind."""


class HeadDescription(BaseModel):
    """What a head computes, and from what.

    `layers` are the blocks that the head reads, counted from 0. `depth_range` is the smallest and the largest depth in
    metres, and is None unless the head predicts depth. `classes` is empty for a depth head. `source` says where the
    head comes from, and `source_sha256` is the hash of the imported file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME_PATTERN)
    kind: Kind
    architecture: Architecture = "linear"
    layers: tuple[int, ...] = Field(min_length=1)
    normed: bool
    classes: tuple[str, ...] = ()
    depth_range: tuple[float, float] | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    source: str
    source_sha256: str | None = None

    def outputs(self, config: ViTConfig) -> tuple[str, ...]:
        """Return the names of the backbone's inner outputs that the head needs.

        The output `tokens.<i>` contains the tokens after block i, before the final norm. A head that reads normed
        tokens does not need it for the last block, because every forward pass returns the normed tokens of that block.
        """
        last = config.depth - 1
        return tuple(f"tokens.{i}" for i in self.layers if not (self.normed and i == last))


class HeadRecord(HeadDescription):
    """The content of `head.json`.

    `sha256` is the hash of `head.safetensors`. `model` is the fingerprint of the artifact that the head belongs to.
    """

    format_version: Literal[1] = 1
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    model: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: str  # ISO 8601, UTC


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one image from one forward pass.

    Args:
        cls: the class token [D], after the final norm.
        patches: the patch tokens [N, D] after the final norm, row by row.
        grid: the number of rows and of columns of patches.
        inner: the backbone's inner outputs, keyed by name. `tokens.<i>` is [1 + R + N, D]: the tokens after block i
            (class token, registers, patches), before the final norm.
    """

    cls: Floats
    patches: Floats
    grid: tuple[int, int]
    inner: Mapping[str, Floats]


def depth_range_problem(low: float, high: float) -> str | None:
    """Return the reason why `low` and `high` are not a depth range in metres, or None if they are one."""
    if not 0 < low < high <= LARGEST_DEPTH_M:
        return f"min_depth={low:g} and max_depth={high:g}: need 0 < min_depth < max_depth <= {LARGEST_DEPTH_M:g} metres"
    return None


def input_width(kind: Kind, n_layers: int, embed_dim: int) -> int:
    """Return the number of inputs F of a linear head that reads `n_layers` blocks of a backbone of width D."""
    return embed_dim * {"classification": n_layers + 1, "segmentation": n_layers, "depth": 2 * n_layers}[kind]


def dpt_shapes(embed_dim: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a DPT head's tensors, keyed by Meta's names without `decode_head.`."""
    d, channels = embed_dim, DPT_CHANNELS
    widths = tuple(d // 2 ** (3 - i) for i in range(4))
    shapes: dict[str, tuple[int, ...]] = {}
    for i, width in enumerate(widths):
        shapes[f"reassemble_blocks.readout_projects.{i}.0.weight"] = (d, 2 * d)
        shapes[f"reassemble_blocks.readout_projects.{i}.0.bias"] = (d,)
        shapes[f"reassemble_blocks.projects.{i}.conv.weight"] = (width, d, 1, 1)
        shapes[f"reassemble_blocks.projects.{i}.conv.bias"] = (width,)
        shapes[f"convs.{i}.conv.weight"] = (channels, width, 3, 3)
        shapes[f"fusion_blocks.{i}.project.conv.weight"] = (channels, channels, 1, 1)
        shapes[f"fusion_blocks.{i}.project.conv.bias"] = (channels,)
        for unit in (1, 2) if i else (2,):
            for conv in (1, 2):
                shapes[f"fusion_blocks.{i}.res_conv_unit{unit}.conv{conv}.conv.weight"] = (channels, channels, 3, 3)
    for i, kernel in ((0, 4), (1, 2), (3, 3)):
        shapes[f"reassemble_blocks.resize_layers.{i}.weight"] = (widths[i], widths[i], kernel, kernel)
        shapes[f"reassemble_blocks.resize_layers.{i}.bias"] = (widths[i],)
    for name, shape in (
        ("project.conv", (channels, channels, 3, 3)),
        ("conv_depth.head.0", (channels // 2, channels, 3, 3)),
        ("conv_depth.head.2", (32, channels // 2, 3, 3)),
        ("conv_depth.head.4", (1, 32, 1, 1)),
    ):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return shapes


def check_tensors(tensors: Mapping[str, npt.NDArray[Any]], record: HeadDescription, config: ViTConfig) -> None:
    """Check the names, shapes and values of a head's tensors, and that the backbone has the head's blocks.

    Raises:
        HeadError: a tensor is missing or unexpected, has the wrong shape or a value that is not finite, or a block does
            not exist.
    """
    outside = [i for i in record.layers if not 0 <= i < config.depth]
    if outside or list(record.layers) != sorted(set(record.layers)):
        raise HeadError(
            f"it reads the blocks {list(record.layers)}, but the model has the blocks 0 to {config.depth - 1}"
        )
    if record.architecture == "dpt":
        if record.kind != "depth" or len(record.layers) != 4:
            raise HeadError(f"a DPT head predicts depth from 4 blocks, not {record.kind} from {len(record.layers)}")
        wanted = dpt_shapes(config.embed_dim)
    else:
        rows = len(tensors["bias"]) if "bias" in tensors and tensors["bias"].ndim == 1 else 0
        wanted = {"weight": (rows, input_width(record.kind, len(record.layers), config.embed_dim)), "bias": (rows,)}
        if rows < 2 or (record.kind != "depth" and rows != len(record.classes)):
            raise HeadError(f"it has {rows} outputs and {len(record.classes)} class names")
        if record.kind == "segmentation" and rows > MAX_PIXEL_CLASSES:
            raise HeadError(f"it has {rows} classes; a segmentation head has at most {MAX_PIXEL_CLASSES}")
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            need, has = (_shape(shapes.get(name)) for shapes in (wanted, found))
            raise HeadError(f"tensor {name} is {has}, but this model ({config.embed_dim} wide) needs {need}")
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise HeadError(f"tensor {name} has values that are not finite")
    if record.kind == "depth":
        problem = "it has no depth range" if record.depth_range is None else depth_range_problem(*record.depth_range)
        if problem is not None:
            raise HeadError(problem)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))

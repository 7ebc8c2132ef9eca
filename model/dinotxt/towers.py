"""The tensors of dino.txt's two networks, and the check that a file contains exactly these tensors.

The widths are read from the file. The published files belong to ViT-L/14 with 4 registers: the vision head has 2
blocks of width 1024, and the text encoder has 24 blocks of width 1280 and a projection to 2 * 1024.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy.typing as npt

from model.config import ViTConfig
from model.convert import MAX_LISTED, CheckpointError

Arrays = Mapping[str, npt.NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]

HEAD_WIDTH: Final = 64  # width of one attention head in both networks
NUM_REGISTERS: Final = 4
"""The number of registers of the backbone that Meta trained the vision head on. The head's file does not contain it."""


@dataclass(frozen=True)
class VisionHeadShape:
    """The shape of a vision head: the width, the hidden width of the feed-forward layers, and the number of blocks."""

    width: int
    hidden: int
    depth: int


@dataclass(frozen=True)
class TextEncoderShape:
    """The shape of a text encoder.

    `context_length` is the largest number of tokens in a prompt, including the start and the end token. `out_dim` is
    the width of the vectors that the encoder returns.
    """

    width: int
    hidden: int
    depth: int
    vocab_size: int
    context_length: int
    out_dim: int


def vision_head_shape(tensors: Arrays) -> VisionHeadShape:
    """Return the shape of the vision head with these tensors, which have Meta's names.

    Raises:
        CheckpointError: the tensors are not those of a vision head. The message names the ones that differ.
    """
    what = "the vision head of dino.txt (its published name ends with _vision_head.pth)"
    shapes = _shapes(tensors)
    [width] = _dimensions(shapes, "ln_final.weight", 1, what)
    hidden, _ = _dimensions(shapes, "block_list.0.mlp.w1.weight", 2, what)
    shape = VisionHeadShape(width, hidden, _count(shapes, r"block_list\.(\d+)\."))
    _compare(shapes, _vision_head_shapes(shape), what)
    return shape


def text_encoder_shape(tensors: Arrays) -> TextEncoderShape:
    """Return the shape of the text encoder with these tensors, which have Meta's names.

    Raises:
        CheckpointError: the tensors are not those of a text encoder. The message names the ones that differ.
    """
    what = "the text encoder of dino.txt (its published name ends with _text_encoder.pth)"
    shapes = _shapes(tensors)
    vocab_size, width = _dimensions(shapes, "backbone.token_embedding.weight", 2, what)
    shape = TextEncoderShape(
        width,
        hidden=_dimensions(shapes, "backbone.blocks.0.feed_forward.fc1.weight", 2, what)[0],
        depth=_count(shapes, r"backbone\.blocks\.(\d+)\."),
        vocab_size=vocab_size,
        context_length=_dimensions(shapes, "backbone.positional_embedding", 2, what)[0],
        out_dim=_dimensions(shapes, "head.linear_projection.weight", 2, what)[0],
    )
    _compare(shapes, _text_encoder_shapes(shape), what)
    return shape


def check_match(vision: VisionHeadShape, text: TextEncoderShape, backbone: ViTConfig) -> None:
    """Check that a vision head, a text encoder and a backbone belong together.

    Raises:
        CheckpointError: they do not. The message gives the reason.
    """
    if vision.width != backbone.embed_dim:
        raise CheckpointError(
            f"the vision head has width {vision.width}, but this backbone has width {backbone.embed_dim}; Meta "
            "published dino.txt only for ViT-L/14 with registers (dinov2_vitl14_reg), which has width 1024"
        )
    if backbone.num_register_tokens != NUM_REGISTERS:
        raise CheckpointError(
            f"the vision head was trained on a backbone with {NUM_REGISTERS} registers, but this backbone has "
            f"{backbone.num_register_tokens}: use dinov2_vitl14_reg"
        )
    if text.out_dim != 2 * vision.width:
        raise CheckpointError(
            f"the text encoder returns vectors of width {text.out_dim}, but a vision head of width {vision.width} "
            f"needs {2 * vision.width}: the two files do not belong together"
        )


def _vision_head_shapes(shape: VisionHeadShape) -> Shapes:
    d, hidden = shape.width, shape.hidden
    expected: dict[str, tuple[int, ...]] = {"ln_final.weight": (d,), "ln_final.bias": (d,)}
    for i in range(shape.depth):
        key = f"block_list.{i}"
        for name in ("norm1.weight", "norm1.bias", "attn.proj.bias", "ls1.gamma"):
            expected[f"{key}.{name}"] = (d,)
        for name in ("norm2.weight", "norm2.bias", "mlp.w3.bias", "ls2.gamma"):
            expected[f"{key}.{name}"] = (d,)
        expected |= {f"{key}.attn.qkv.weight": (3 * d, d), f"{key}.attn.proj.weight": (d, d)}
        for name in ("w1", "w2"):
            expected |= {f"{key}.mlp.{name}.weight": (hidden, d), f"{key}.mlp.{name}.bias": (hidden,)}
        expected[f"{key}.mlp.w3.weight"] = (d, hidden)
    return expected


def _text_encoder_shapes(shape: TextEncoderShape) -> Shapes:
    d, hidden = shape.width, shape.hidden
    expected: dict[str, tuple[int, ...]] = {
        "backbone.token_embedding.weight": (shape.vocab_size, d),
        "backbone.positional_embedding": (shape.context_length, d),
        "backbone.ln_final.weight": (d,),
        "backbone.ln_final.bias": (d,),
        "head.linear_projection.weight": (shape.out_dim, d),
    }
    for i in range(shape.depth):
        key = f"backbone.blocks.{i}"
        for name in ("attention_norm.weight", "attention_norm.bias", "ffn_norm.weight", "ffn_norm.bias"):
            expected[f"{key}.{name}"] = (d,)
        expected |= {f"{key}.attention.qkv.weight": (3 * d, d)}
        expected |= {f"{key}.attention.proj.weight": (d, d), f"{key}.attention.proj.bias": (d,)}
        expected |= {f"{key}.feed_forward.fc1.weight": (hidden, d), f"{key}.feed_forward.fc1.bias": (hidden,)}
        expected |= {f"{key}.feed_forward.fc2.weight": (d, hidden), f"{key}.feed_forward.fc2.bias": (d,)}
    return expected


def _shapes(tensors: Arrays) -> Shapes:
    return {name: array.shape for name, array in tensors.items()}


def _count(shapes: Shapes, pattern: str) -> int:
    """Return one more than the highest number that `pattern` finds at the beginning of a name."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return min(1 + max(numbers, default=-1), len(shapes))  # a wrong file could name block 10**9


def _dimensions(shapes: Shapes, key: str, count: int, what: str) -> tuple[int, ...]:
    """Return the shape of the tensor `key`.

    Raises:
        CheckpointError: there is no such tensor, it does not have `count` dimensions, or one of them is 0.
    """
    if key not in shapes:
        raise CheckpointError(f"not {what}: it has no tensor {key}; {_hint(shapes)}")
    if len(shapes[key]) != count or 0 in shapes[key]:
        raise CheckpointError(f"not {what}: {key} has shape {list(shapes[key])}")
    return shapes[key]


def _hint(shapes: Shapes) -> str:
    """Guess what a wrong file contains. Return the guess as the end of an error message."""
    if any(name.startswith("visual_model.") for name in shapes):
        return "this is DINOv3's file with both networks, which belongs to another backbone"
    if "backbone.token_embedding.weight" in shapes:
        return "this is a text encoder"
    if "block_list.0.mlp.w1.weight" in shapes:
        return "this is a vision head"
    if "cls_token" in shapes:
        return "this is a backbone"
    return f"its {len(shapes)} tensors are {_listed(sorted(shapes))}"


def _compare(shapes: Shapes, expected: Shapes, what: str) -> None:
    width = expected["ln_final.weight" if "ln_final.weight" in expected else "backbone.ln_final.weight"][0]
    if width % HEAD_WIDTH:
        raise CheckpointError(f"not {what}: its width is {width}, which is not a multiple of {HEAD_WIDTH}")
    problems = {
        "missing": [name for name in expected if name not in shapes],
        "extra": [name for name in shapes if name not in expected],
        "misshapen": [
            f"{name} {list(shapes[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    listed = [f"{kind} tensors: {_listed(names)}" for kind, names in problems.items() if names]
    if listed:
        raise CheckpointError(f"not {what}: {'; '.join(listed)}")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more

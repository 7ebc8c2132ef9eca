"""A vector's tag: everything that two vectors must share to be compared, in one line.

`fingerprint/pooling/l2/HxW/precision`: the model (weights, architecture, preprocessing), what of its output became the
vector, that it has length 1, the network's input in pixels, and the arithmetic.
"""

from typing import NamedTuple

from model.pooling import POOLINGS, Pooling


class TagParts(NamedTuple):
    """What a collection's tag says of its vectors that a request needs to know."""

    fingerprint: str
    pooling: Pooling | None  # None: not made by `make_tag`, so images cannot be added


def make_tag(fingerprint: str, pooling: str, input_size: tuple[int, int], precision: str) -> str:
    """The tag of normalised vectors; `input_size` is height and width."""
    height, width = input_size
    return f"{fingerprint}/{pooling}/l2/{height}x{width}/{precision}"


def tag_parts(tag: str) -> TagParts:
    """The reverse of `make_tag`."""
    parts = tag.split("/")
    pooling = next((name for name in POOLINGS if name == parts[1]), None) if len(parts) == 5 else None
    return TagParts(parts[0], pooling)

"""A vector's tag: everything that two vectors must share to be comparable, in one line.

`fingerprint/pooling/l2/HxW/precision`: the model (weights, architecture, preprocessing), the pooling, the length of 1,
the network's input size in pixels, and the arithmetic.
"""

from typing import NamedTuple

from model.pooling import POOLINGS, Pooling


class TagParts(NamedTuple):
    """The parts of a collection's tag that a request needs."""

    fingerprint: str
    pooling: Pooling | None  # None: `make_tag` did not make the tag, so images cannot be added


def make_tag(fingerprint: str, pooling: str, input_size: tuple[int, int], precision: str) -> str:
    """Return the tag of normalised vectors. `input_size` is height and width."""
    height, width = input_size
    return f"{fingerprint}/{pooling}/l2/{height}x{width}/{precision}"


def tag_parts(tag: str) -> TagParts:
    """Split a tag, the inverse of `make_tag`."""
    parts = tag.split("/")
    pooling = next((name for name in POOLINGS if name == parts[1]), None) if len(parts) == 5 else None
    return TagParts(parts[0], pooling)

"""The tag of a vector: a text with everything that must be equal for two vectors to be comparable.

It has the form `fingerprint/pooling/l2/HxW/precision`. The fingerprint identifies the model (weights, architecture,
preprocessing). `l2` means that the vector is scaled to length 1. HxW is the network's input size in pixels, and the
precision is that of the engine's arithmetic.
"""

from typing import NamedTuple

from model.pooling import POOLINGS, Pooling


class TagParts(NamedTuple):
    """The parts of a collection's tag that a request needs."""

    fingerprint: str
    pooling: Pooling | None  # None: `make_tag` did not make the tag, so images cannot be added


def make_tag(fingerprint: str, pooling: str, input_size: tuple[int, int], precision: str) -> str:
    """Return the tag of vectors of length 1. `input_size` is (height, width)."""
    height, width = input_size
    return f"{fingerprint}/{pooling}/l2/{height}x{width}/{precision}"


def tag_parts(tag: str) -> TagParts:
    """Return the parts of a tag that `make_tag` made. For any other text, the pooling is None."""
    parts = tag.split("/")
    pooling = next((name for name in POOLINGS if name == parts[1]), None) if len(parts) == 5 else None
    return TagParts(parts[0], pooling)

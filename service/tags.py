"""The tag of a vector: a text with everything that must be equal for two vectors to be comparable.

A tag has the form `fingerprint/pooling/l2/HxW/precision`. The fingerprint identifies the model (weights, architecture,
preprocessing). `l2` means that the vector is scaled to length 1. HxW is the input size of the network in pixels. The
precision is that of the engine's arithmetic.
"""

from typing import NamedTuple

from model.pooling import POOLINGS, Pooling


class TagParts(NamedTuple):
    """The fingerprint and the pooling in a tag."""

    fingerprint: str
    pooling: Pooling | None  # None if the tag has another form; images cannot be added then


def make_tag(fingerprint: str, pooling: str, input_size: tuple[int, int], precision: str) -> str:
    """Return the tag of vectors that are scaled to length 1. `input_size` is (height, width) in pixels."""
    height, width = input_size
    return f"{fingerprint}/{pooling}/l2/{height}x{width}/{precision}"


def tag_parts(tag: str) -> TagParts:
    """Return the fingerprint and the pooling in a tag. The pooling is None if `tag` does not have the form of the tags
    that `make_tag` returns."""
    parts = tag.split("/")
    pooling = next((name for name in POOLINGS if name == parts[1]), None) if len(parts) == 5 else None
    return TagParts(parts[0], pooling)

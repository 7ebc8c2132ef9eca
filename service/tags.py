"""The tag of a vector: a text that describes how the vector was computed. Two vectors can be compared only if they have
the same tag.

A tag has the form `fingerprint/pooling/l2/HxW/precision`. The fingerprint identifies the model (weights, architecture,
preprocessing). `l2` means that the vector is scaled to length 1. HxW is the input size of the network in pixels. The
last part is the precision of the engine's arithmetic.
"""

from functools import lru_cache
from typing import NamedTuple

from model.pooling import POOLINGS, Pooling


class TagParts(NamedTuple):
    """The parts of a tag that say which model made a vector and how."""

    fingerprint: str
    pooling: Pooling | None  # None if the tag has another form; the collection then accepts no images
    precision: str = ""


@lru_cache(maxsize=1024)
def make_tag(fingerprint: str, pooling: str, input_size: tuple[int, int], precision: str) -> str:
    """Return the tag of vectors that are scaled to length 1. `fingerprint` identifies the model, `input_size` is
    (height, width) in pixels, and `precision` is the precision of the engine's arithmetic."""
    height, width = input_size
    return f"{fingerprint}/{pooling}/l2/{height}x{width}/{precision}"


@lru_cache(maxsize=1024)
def tag_parts(tag: str) -> TagParts:
    """Return the fingerprint, the pooling and the precision that a tag contains. If `tag` does not have the form that
    `make_tag` produces, the pooling is None and the precision is empty."""
    parts = tag.split("/")
    if len(parts) != 5:
        return TagParts(parts[0], None)
    return TagParts(parts[0], next((name for name in POOLINGS if name == parts[1]), None), parts[4])


def model_of(tag: str) -> tuple[str, str]:
    """Return the fingerprint and the precision in a tag, which identify a generation."""
    parts = tag_parts(tag)
    return parts.fingerprint, parts.precision

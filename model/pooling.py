"""Pooling: from the tokens of an image to one vector. Only this module defines the poolings.

A pooling joins one or more parts. Each part is one vector [D] per image: the class token, or the mean of the patch
tokens. Parts that are joined are first scaled to length 1, so that neither dominates the cosine. The code works on
numpy arrays and on tensors; the caller passes the two operations.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, TypeVar, get_args

Array = TypeVar("Array")
Pooling = Literal["cls", "mean", "cls+mean"]
POOLINGS: Final[tuple[Pooling, ...]] = get_args(Pooling)
DEFAULT_POOLING: Final[Pooling] = "cls"


def parts_of(pooling: Pooling) -> tuple[str, ...]:
    """Return the names of the parts that a pooling joins."""
    return tuple(pooling.split("+"))


def width(pooling: Pooling, dim: int) -> int:
    """Return the length of a pooled vector for a model of width `dim`."""
    return dim * len(parts_of(pooling))


def pool(
    parts: Mapping[str, Array],
    pooling: Pooling,
    *,
    unit: Callable[[Array], Array],
    join: Callable[[Sequence[Array]], Array],
) -> Array:
    """Pool the parts of each image to one vector.

    Args:
        parts: "cls" (class token) and "mean" (mean patch token), each [..., D].
        pooling: one of `POOLINGS`.
        unit: scales to length 1 along the last axis; applied to each part if several are joined.
        join: concatenates along the last axis.

    Returns:
        [..., width(pooling, D)]. A single part is returned unchanged.
    """
    names = parts_of(pooling)
    return parts[names[0]] if len(names) == 1 else join([unit(parts[name]) for name in names])

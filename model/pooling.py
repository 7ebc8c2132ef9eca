"""Pools the tokens of an image to one vector.

A pooling has one or two parts. Each part is one vector [D] per image: the class token, or the mean of the patch tokens.
If a pooling has two parts, both are first scaled to length 1, so that neither dominates the cosine, and then joined.
The code works on numpy arrays and on tensors, because the caller passes the functions that scale and join them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, TypeVar, get_args

Array = TypeVar("Array")
Pooling = Literal["cls", "mean", "cls+mean"]
POOLINGS: Final[tuple[Pooling, ...]] = get_args(Pooling)
DEFAULT_POOLING: Final[Pooling] = "cls"


def parts_of(pooling: Pooling) -> tuple[str, ...]:
    """Return the names of the parts of a pooling, for example ("cls", "mean")."""
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
    """Combine the parts of each image into one vector.

    Args:
        parts: the arrays "cls" (class tokens) and "mean" (means of the patch tokens), each [..., D] for a model of
            width D.
        pooling: one of `POOLINGS`.
        unit: a function that scales an array to length 1 along the last axis. It is called only if the pooling has two
            parts.
        join: a function that concatenates arrays along the last axis.

    Returns:
        The vectors [..., width(pooling, D)]. The part of a pooling with one part is returned unchanged.
    """
    names = parts_of(pooling)
    return parts[names[0]] if len(names) == 1 else join([unit(parts[name]) for name in names])

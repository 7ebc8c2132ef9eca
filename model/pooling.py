"""Pools an image's tokens into one vector.

A pooling, such as "cls+mean", concatenates one or more parts. Each part is one vector [D] per image: the class token,
or a vector computed from the patch tokens. If a pooling has several parts, each part is L2-normalised first, so that
all parts count equally in cosine similarities. The code works on numpy arrays and on tensors; the caller passes the
functions that normalise and concatenate them.

To add a part, add it to `PATCH_PARTS`. To add a pooling, add it to `Pooling` and to `POOLING_DESCRIPTION`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar, get_args

Array = TypeVar("Array")
Pooling = Literal["cls", "mean", "cls+mean"]
POOLINGS: Final[tuple[Pooling, ...]] = get_args(Pooling)
DEFAULT_POOLING: Final[Pooling] = "cls"
POOLING_DESCRIPTION: Final = "class token, mean of the patch tokens, or both concatenated"
PATCH_PARTS: Final[Mapping[str, Callable[[Any], Any]]] = {"mean": lambda patches: patches.mean(1)}
"""The parts that are computed from the patch tokens. Each function maps an array or tensor [B, N, D] to [B, D]."""
PARTS: Final = ("cls", *PATCH_PARTS)
"""The names of all parts, in the order in which the service's cache stores them."""


def parts_of(pooling: Pooling) -> tuple[str, ...]:
    """Return the names of a pooling's parts, for example ("cls", "mean")."""
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
        parts: an array [..., D] for each part, keyed by its name in `PARTS`. D is the width of the model.
        pooling: one of `POOLINGS`.
        unit: a function that L2-normalises an array along the last axis. It is called only if the pooling has several
            parts.
        join: a function that concatenates arrays along the last axis.

    Returns:
        The vectors [..., width(pooling, D)]. If the pooling has only one part, that part is returned unchanged.
    """
    names = parts_of(pooling)
    return parts[names[0]] if len(names) == 1 else join([unit(parts[name]) for name in names])

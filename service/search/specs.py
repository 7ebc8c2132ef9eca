"""Checks the settings of a new collection.

Collections are created by REST requests, the command line, imports, copies and restores. All of them use this check, so
all of them accept the same settings, and an index can be built for every collection. Stores run the check when they
create a collection. Code that reads settings from a file also runs the check, because a file may contain any values.
"""

import reprlib
from typing import Any, Final, get_args

from service.errors import InvalidRequest
from service.search.filters import parse_path
from service.search.kinds import CHOICES
from service.search.store import CollectionSpec, DType, IndexSpec

MAX_DIMENSION: Final = 8192
MAX_INDEXED: Final = 16
MAX_TAG_CHARACTERS: Final = 256
M: Final = (2, 256)
EF_CONSTRUCTION: Final = (4, 4096)
N_LISTS: Final = (1, 2**20)
TARGET_RECALL: Final = (0.5, 1.0)


def check_spec(spec: CollectionSpec) -> CollectionSpec:
    """Return the settings `spec` if they are allowed. The types of the values are checked too, because settings from a
    JSON file may have any type.

    Raises:
        InvalidRequest: a setting is not allowed. The message contains its name, its value and the allowed values.
    """
    if not isinstance(spec.tag, str) or not 1 <= len(spec.tag) <= MAX_TAG_CHARACTERS or not spec.tag.isprintable():
        raise _refused("tag", spec.tag, f"1 to {MAX_TAG_CHARACTERS} printable characters")
    _check_whole("dimension", spec.dimension, (1, MAX_DIMENSION))
    _check_choice("dtype", spec.dtype, get_args(DType))
    if not isinstance(spec.index, IndexSpec):
        raise _refused("index", spec.index, "an object of settings")
    _check_index(spec.index)
    if not isinstance(spec.indexed, tuple) or len(spec.indexed) > MAX_INDEXED:
        raise _refused("indexed", spec.indexed, f"up to {MAX_INDEXED} metadata keys")
    for key in spec.indexed:
        parse_path(key, "indexed")
    if not isinstance(spec.originals, bool):
        raise _refused("originals", spec.originals, "true or false")
    return spec


def _check_index(index: IndexSpec) -> None:
    _check_choice("index.kind", index.kind, CHOICES)
    for name, value, limits in (
        ("m", index.m, M),
        ("ef_construction", index.ef_construction, EF_CONSTRUCTION),
        ("n_lists", index.n_lists, N_LISTS),
    ):
        if value is not None:
            _check_whole(f"index.{name}", value, limits)
    low, high = TARGET_RECALL
    recall: Any = index.target_recall
    if isinstance(recall, bool) or not isinstance(recall, int | float) or not low <= recall <= high:
        raise _refused("index.target_recall", recall, f"a number, {low} to {high}")


def _check_whole(name: str, value: Any, limits: tuple[int, int]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not limits[0] <= value <= limits[1]:
        raise _refused(name, value, f"a whole number, {limits[0]:,} to {limits[1]:,}")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise _refused(name, value, f"one of {', '.join(allowed)}")


def _refused(name: str, value: Any, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name}={reprlib.repr(value)} is not allowed: {allowed}", param=name.partition(".")[0])

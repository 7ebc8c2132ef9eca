"""A table of the index kinds that a collection may have. Each row contains the properties that distinguish a kind from
the others.

This module contains only data, so the command line and the request schemas can use it without loading faiss.
`service/search/indexes.py` implements the three index structures. `kind_named` raises `ValueError` for an unknown name,
so an unknown kind is never mistaken for a known one.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["auto", "flat", "hnsw", "ivf_pq", "rabitq"]
"""The index kinds that can be set for a collection. If the kind is `auto`, the number of vectors determines the kind
that is built."""
StructureName = Literal["scan", "graph", "lists"]


@dataclass(frozen=True)
class Codes:
    """The encoding of the vectors in inverted lists. Scores computed from codes are approximate, so codes are used only
    to find candidates. The final scores of the candidates are computed from their vectors."""

    factory: str  # argument of faiss's index_factory; {subvectors} is half the dimension if the dimension is even
    candidates: int  # number of candidates for each requested neighbour
    min_candidates: int = 0
    refine_factor: int | None = None  # faiss fetches this many times as many and refines the choice


@dataclass(frozen=True)
class IndexKind:
    """The properties of an index kind."""

    name: str
    structure: StructureName
    settings: tuple[str, ...] = ()  # fields of IndexSpec and SearchParams that apply to this kind
    efforts: tuple[int, ...] = (1,)  # efSearch or nprobe, ascending; tuning chooses one
    auto_below: float = 0  # `auto` chooses the first row with a limit above the number of vectors
    codes: Codes | None = None  # only for the structure `lists`
    on_disk: bool = False  # to save memory, vectors and payloads are read on demand instead of mapped


_GRAPH_SETTINGS: Final = ("m", "ef_construction", "ef_search")
_LISTS_SETTINGS: Final = ("n_lists", "nprobe")
_EF_SEARCH: Final = (64, 96, 128, 192, 256, 384, 512)
_NPROBE: Final = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_IVF_PQ: Final = Codes("PQ{subvectors}x4fs", candidates=8, min_candidates=64)
_RABITQ: Final = Codes("RaBitQfs,Refine(SQ6)", candidates=2, refine_factor=8)

EXACT: Final = IndexKind("flat", "scan")
"""The kind without an index. A search compares the query with every vector. Small segments always have this kind."""
KINDS: Final[dict[str, IndexKind]] = {
    kind.name: kind
    for kind in (
        EXACT,
        IndexKind("hnsw", "graph", _GRAPH_SETTINGS, _EF_SEARCH, auto_below=2_000_000),
        IndexKind("ivf_pq", "lists", _LISTS_SETTINGS, _NPROBE, auto_below=math.inf, codes=_IVF_PQ),
        IndexKind("rabitq", "lists", _LISTS_SETTINGS, _NPROBE, codes=_RABITQ, on_disk=True),
    )
}
CHOICES: Final = ("auto", *KINDS)


def kind_named(name: str) -> IndexKind:
    """Return the properties of the kind with this name.

    Raises:
        ValueError: no kind has this name.
    """
    kind = KINDS.get(name)
    if kind is None:
        raise ValueError(f"index kind {name!r} is unknown: the kinds are {', '.join(KINDS)}")
    return kind


def auto_kind(count: int) -> IndexKind:
    """Return the index kind that `auto` chooses for a collection with `count` vectors."""
    return next(kind for kind in KINDS.values() if count < kind.auto_below)


def kinds_with(setting: str) -> str:
    """Return the names of the index kinds to which a setting applies, separated by commas. Help texts use this list."""
    return ", ".join(kind.name for kind in KINDS.values() if setting in kind.settings)

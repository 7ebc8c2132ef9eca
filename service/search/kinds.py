"""The kinds of index that a collection may have: one row each, with everything that differs between kinds.

This module holds only data, so the command line and the schemas take their choices from it without loading faiss.
`service/search/indexes.py` defines what the three structures do. A name that has no row raises `ValueError` in
`kind_named`, so it never reaches the code of another kind.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["auto", "flat", "hnsw", "ivf_pq", "rabitq"]
"""The choices in a collection's settings: `auto`, which goes by size, and the names of all rows."""
StructureName = Literal["scan", "graph", "lists"]


@dataclass(frozen=True)
class Codes:
    """How inverted lists store vectors. Scores by code are approximate, so candidates are scored by their vectors."""

    factory: str  # in the language of faiss's index_factory; {subvectors} is half the dimension if that is even
    candidates: int  # by code for each neighbour wanted, scored by their vectors
    min_candidates: int = 0
    refine_factor: int | None = None  # faiss picks the candidates from so many times as many, by a finer code


@dataclass(frozen=True)
class IndexKind:
    """What distinguishes one kind from the others."""

    name: str
    structure: StructureName
    settings: tuple[str, ...] = ()  # of IndexSpec and SearchParams that apply to it
    efforts: tuple[int, ...] = (1,)  # efSearch or nprobe, ascending; tuning chooses one
    auto_below: float = 0  # `auto` chooses the first row whose limit the number of vectors is below
    codes: Codes | None = None  # structure `lists` only
    on_disk: bool = False  # vectors and payloads are read on demand instead of mapped: saves memory


_GRAPH_SETTINGS: Final = ("m", "ef_construction", "ef_search")
_LISTS_SETTINGS: Final = ("n_lists", "nprobe")
_EF_SEARCH: Final = (64, 96, 128, 192, 256, 384, 512)
_NPROBE: Final = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_IVF_PQ: Final = Codes("PQ{subvectors}x4fs", candidates=8, min_candidates=64)
_RABITQ: Final = Codes("RaBitQfs,Refine(SQ6)", candidates=2, refine_factor=8)

EXACT: Final = IndexKind("flat", "scan")
"""No index: every vector is compared. Small segments have this kind whatever the settings say."""
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
    """The row of a kind.

    Raises:
        ValueError: there is none.
    """
    kind = KINDS.get(name)
    if kind is None:
        raise ValueError(f"index kind {name!r} is unknown: the kinds are {', '.join(KINDS)}")
    return kind


def auto_kind(count: int) -> IndexKind:
    """What `auto` means for so many vectors."""
    return next(kind for kind in KINDS.values() if count < kind.auto_below)


def kinds_with(setting: str) -> str:
    """The names of the kinds that a setting applies to, for help texts."""
    return ", ".join(kind.name for kind in KINDS.values() if setting in kind.settings)

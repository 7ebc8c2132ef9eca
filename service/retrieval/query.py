"""What a search asks for.

A query names what to search for in one of five forms; all but `region` come down to parts: an image, a vector or an
item's id, each with a weight.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from service.outcomes import OnError, Outcome
from service.schemas import Ranking
from service.search.filters import Filter
from service.search.store import SearchParams

FORMS: Final = ("image", "vector", "id", "combine", "region")
DEFAULT_RERANK_DEPTH: Final = 20


@dataclass(frozen=True)
class Part:
    """One of what is searched for: an image, a vector or an id."""

    image: Outcome[bytes] | None = None  # its index is that of the part
    vector: npt.NDArray[np.float64] | None = None  # [D], of any scale
    id: str | None = None
    fingerprint: str | None = None  # of the model that made the vector, if the client told
    weight: float = 1.0


@dataclass(frozen=True)
class Query:
    """One query, checked: `form` is one of `FORMS`, `ranking` what is done with what it finds."""

    form: str
    parts: tuple[Part, ...]  # of a region: its image
    ranking: Ranking
    region: dict[str, Any] | None = None  # {"box": (x, y, w, h)} or {"mask": {"size": ..., "counts": ...}}
    where: Filter | None = None
    path: tuple[str, ...] | None = None  # of the key that is grouped by
    params: SearchParams | None = None
    batch_key: bytes = b""  # queries with the same key can share one call of the store

    @property
    def needs_model(self) -> bool:
        """Whether the served model computes something for it."""
        return any(part.image is not None for part in self.parts)

    @property
    def needs_patches(self) -> bool:
        """Whether the patch tokens of its image are needed, not only its vector."""
        return self.form == "region" or (self.form == "image" and self.ranking.rerank is not None)

    @property
    def depth(self) -> int:
        """How far down the store's ranking the answer reaches."""
        return self.ranking.k + self.ranking.offset

    @property
    def rerank_depth(self) -> int:
        """How many of the best are compared patch by patch."""
        return self.ranking.rerank_depth or DEFAULT_RERANK_DEPTH


@dataclass(frozen=True)
class SearchRequest:
    """A whole request: its queries, of a batch with the errors of those that make no sense."""

    queries: list[Outcome[Query]]
    model: str = "auto"
    batch: bool = False
    on_error: OnError = "fail"

"""Define the types of a parsed and checked search request.

A query has one of five forms (`FORMS`) and one or more parts. A part is an image, a vector or the id of an item, with a
weight. Only a query of the form `combine` has several parts.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from service.outcomes import OnError, Outcome
from service.schemas import Ranking
from service.search.filters import Filter
from service.search.store import SearchParams

Vector = npt.NDArray[np.float32] | npt.NDArray[np.float64]
FORMS: Final = ("image", "vector", "id", "combine", "region")
DEFAULT_RERANK_DEPTH: Final = 20


# The classes of this module are not frozen, for the reason that `Outcome` states. Do not modify their objects.


@dataclass(slots=True)
class Part:
    """One part of a query: an image, a vector or the id of an item."""

    image: Outcome[bytes] | None = None  # its index is the position of the part in the query
    vector: Vector | None = None  # [D], of any length except 0
    id: str | None = None
    fingerprint: str | None = None  # fingerprint of the model that made the vector; None if the client sent none
    weight: float = 1.0


@dataclass(slots=True)
class Query:
    """A query that has been parsed and checked. `form` is one of `FORMS`. `ranking` contains the options for its
    results, for example `k` and `offset`."""

    form: str
    parts: tuple[Part, ...]  # for the form `region`, the image is the only part
    ranking: Ranking
    region: dict[str, Any] | None = None  # {"box": (x, y, w, h)} or {"mask": {"size": ..., "counts": ...}}
    where: Filter | None = None
    path: tuple[str, ...] | None = None  # path of the grouping key
    params: SearchParams | None = None

    @property
    def batch_key(self) -> bytes:
        """Queries with the same key can share one call to the store."""
        ranking = self.ranking
        return orjson.dumps([self.depth, ranking.filter, ranking.params and ranking.params.model_dump()])

    @property
    def needs_model(self) -> bool:
        """Return whether the query has an image, which the served model must embed."""
        return any(part.image is not None for part in self.parts)

    @property
    def needs_patches(self) -> bool:
        """Return whether the query needs the patch tokens of its image and not only its vector."""
        return self.form == "region" or (self.form == "image" and self.ranking.rerank is not None)

    @property
    def depth(self) -> int:
        """Return how many of the best hits are needed to fill the requested page: `k` plus `offset`."""
        return self.ranking.k + self.ranking.offset

    @property
    def results(self) -> int:
        """Return the highest number of results in the answer: `k`, or `k` groups of `group_size` items."""
        return self.ranking.k * (self.ranking.group_size or 1)

    @property
    def rerank_depth(self) -> int:
        """Return how many of the best hits are re-ranked, that is, compared with the query patch by patch."""
        return self.ranking.rerank_depth or DEFAULT_RERANK_DEPTH


@dataclass(slots=True)
class SearchRequest:
    """A search request that has been parsed. In a batch, the outcome of an invalid query contains its error."""

    queries: list[Outcome[Query]]
    model: str = "auto"
    batch: bool = False
    on_error: OnError = "fail"

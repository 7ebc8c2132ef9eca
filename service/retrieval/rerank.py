"""Candidates in a better order: the best hits of a search, compared with the query patch by patch (`vision/maxsim`).

Their patches come from the photos that the collection keeps. Fetched and computed a few at a time, so that neither a
hundred photos nor a hundred tensors are held at once; what was computed lately is kept by the pipeline.

A candidate whose photo is gone, damaged or cannot be read gets no `rerank_score` and comes after those that have one.
That is seen in the answer. Only when none can be compared because of a fault of the service, the request fails.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from model.preprocess import PreprocessSpec, crop_box
from service.errors import InvalidRequest, NotFound, ServiceError
from service.originals import digest_of, photo_digest
from service.outcomes import Outcome, attempt, attempt_await, failures
from service.retrieval.origins import Origin, Target
from service.routes.queries import DEFAULT_RERANK_DEPTH, Query
from service.search.store import Floats, Hit, Item
from service.state import Service
from service.vision.maxsim import maxsim, maxsim_matches
from service.vision.patches import Patches, unit_rows
from service.vision.region import patch_box

log = logging.getLogger(__name__)

AT_A_TIME: Final = 16
"""Two full forward passes at 224 pixels; at most so many photos (of 20 MiB by default) in memory."""


class Photos(Protocol):
    """Where stored photos are read."""

    async def get(self, digest: str) -> bytes:
        """The photo with this sha256; NotFound when it is not stored, StorageFailed when it cannot be read."""


@dataclass(frozen=True)
class Ranked:
    """A hit with what its patches say; `score` None: it could not be compared."""

    hit: Hit
    score: float | None = None
    matches: list[dict[str, Any]] | None = None


def rerank_depth(query: Query) -> int:
    """How many of the best are compared."""
    return query.asked.rerank_depth or DEFAULT_RERANK_DEPTH


async def reranked(service: Service, target: Target, query: Query, origin: Origin, hits: Sequence[Hit]) -> list[Ranked]:
    """The hits, those that were compared first, best first; then the others as they came.

    Raises:
        InvalidRequest: the collection keeps no photos, or not the one of the item that was named.
        QueueFull and its like: there is no room for the candidates' photos.
    """
    photos: Photos | None = service.originals
    if photos is None or not target.info.spec.originals:
        raise InvalidRequest(
            f"rerank compares stored photos, and collection {target.info.name!r} keeps none: make it with originals",
            param="rerank",
        )
    asked = await _query_patches(service, photos, target, origin)
    spec = service.artifact.manifest.preprocess
    compare = partial(_compare, unit_rows(asked.rows), asked, origin.weights, spec, query.asked.matches)
    depth = rerank_depth(query)
    ranked: list[Ranked] = []
    faults: list[ServiceError] = []
    step = min(AT_A_TIME, service.settings.items_per_request)
    for start in range(0, min(depth, len(hits)), step):
        candidates = hits[start : min(start + step, depth)]
        patches = await _patches_of(service, photos, await _digests(service, target.info.name, candidates))
        faults += [failure.error for failure in failures(patches) if failure.error.status >= 500]
        ranked += await asyncio.to_thread(
            lambda pairs: [compare(*pair) for pair in pairs], list(zip(candidates, patches, strict=True))
        )
    compared = [one for one in ranked if one.score is not None]
    if faults:
        log.warning("rerank: %d photos cannot be compared: %s", len(faults), faults[0].detail)
        if not compared:
            raise faults[0]
    compared.sort(key=lambda one: (-(one.score or 0.0), -one.hit.score, one.hit.id))
    rest = [one for one in ranked if one.score is None]
    return [*compared, *rest, *(Ranked(hit) for hit in hits[depth:])]


async def _digests(service: Service, name: str, hits: Sequence[Hit]) -> list[str | None]:
    """Of the hits' stored photos. Where the source names another place, the item knows."""
    named = [digest_of(hit.source) for hit in hits]
    asked = [hit.id for hit, digest in zip(hits, named, strict=True) if digest is None]
    items = iter(await service.vectors.get(name, asked) if asked else [])
    return [digest or _of_item(next(items)) for digest in named]


def _of_item(item: Item | None) -> str | None:
    return None if item is None else photo_digest(item)


async def _query_patches(service: Service, photos: Photos, target: Target, origin: Origin) -> Patches:
    if origin.patches is not None:
        return origin.patches
    assert origin.source is not None
    digest = photo_digest(origin.source)
    if digest is None:
        raise InvalidRequest(
            f"rerank compares photos, and the one of item {origin.source.id[:80]!r} is not stored", param="id"
        )
    [patches] = await _patches_of(service, photos, [digest])
    if patches.error is not None and patches.error.status < 500:
        raise InvalidRequest(
            f"rerank compares photos, and the one of item {origin.source.id[:80]!r} cannot be read: "
            f"{patches.error.detail}",
            param="id",
        )
    return patches.result()


async def _patches_of(service: Service, photos: Photos, digests: Sequence[str | None]) -> list[Outcome[Patches]]:
    """By stored image, in order; why not, for those without."""
    wanted = list(dict.fromkeys(digest for digest in digests if digest is not None))
    kept = await service.live.kept_patches(wanted)
    missing = [digest for digest in wanted if digest not in kept]
    images = await asyncio.gather(*(attempt_await(i, _read(photos, digest)) for i, digest in enumerate(missing)))
    computed = dict(zip(missing, await service.live.patches(images), strict=True))

    def patches(digest: str | None) -> Patches:
        if digest is None:
            raise NotFound("the photo is not stored")
        return kept[digest] if digest in kept else computed[digest].result()

    return [attempt(i, patches, digest) for i, digest in enumerate(digests)]


async def _read(photos: Photos, digest: str) -> tuple[str, bytes]:
    return digest, await photos.get(digest)


def _compare(
    rows: Floats,
    query: Patches,
    weights: Floats | None,
    spec: PreprocessSpec,
    matches: bool,
    hit: Hit,
    outcome: Outcome[Patches],
) -> Ranked:
    if outcome.error is not None:
        return Ranked(hit)
    patches = outcome.result()
    candidate = unit_rows(patches.rows)
    if not matches:
        return Ranked(hit, maxsim(rows, candidate, weights))
    score, found = maxsim_matches(rows, candidate, weights)
    query_crop, crop = crop_box(*query.size, spec), crop_box(*patches.size, spec)
    boxes = [
        {
            "query_box": patch_box(match.query, query.grid, query_crop),
            "box": patch_box(match.candidate, patches.grid, crop),
            "score": match.score,
        }
        for match in found
    ]
    return Ranked(hit, score, boxes)

"""Re-order the best hits of a search by comparing them with the query patch by patch (`service/vision/maxsim.py`).

The patch features of a hit are computed from its image, which the collection must store. To limit memory, at most
`AT_A_TIME` images are processed at once. The pipeline caches recently computed patch features.

Only the best `rerank_depth` hits are compared. A hit has no `rerank_score` if it is not compared, or if its image is
missing, damaged or unreadable. Such hits come after the hits that have a score. If no hit could be compared and the
service is at fault, the request fails.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from model.preprocess import PreprocessSpec, crop_box
from service.errors import InvalidRequest, ServiceError
from service.features.patches import Patches, unit_rows
from service.originals import photo_digest
from service.outcomes import failures, indexed
from service.retrieval.origins import Origin, Target
from service.retrieval.query import Query
from service.retrieval.stored_patches import digests_of, patches_of
from service.search.store import Floats, Hit
from service.state import Service
from service.vision.maxsim import maxsim, maxsim_matches
from service.vision.region import image_weights, patch_box

log = logging.getLogger(__name__)

AT_A_TIME: Final = 16
"""The maximum number of images that are read and embedded at once. They fill two forward passes at 224 pixels. By
default, an image file has at most 20 MiB."""


@dataclass(frozen=True)
class Comparison:
    """The result of comparing a hit with the query patch by patch: the score and, if requested, the boxes of the parts
    that match."""

    score: float
    matches: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Reranked:
    """All hits in their new order, and a dict that maps item ids to comparisons. Hits that were not compared are not in
    the dict."""

    hits: list[Hit]
    comparisons: dict[str, Comparison]


async def reranked(service: Service, target: Target, query: Query, origin: Origin, hits: Sequence[Hit]) -> Reranked:
    """Compare the best hits with the query patch by patch, and return all hits in their new order. The hits that could
    be compared come first, best first, and the others follow in their previous order.

    Raises:
        InvalidRequest: the collection stores no images, or the query names an item with a missing or unreadable image.
        ServiceError: the queue has no room for the images, or no hit could be compared because of a fault in the
            service.
    """
    if not target.info.spec.originals:
        raise InvalidRequest(
            f"rerank compares stored images, but collection {target.info.name!r} stores none: create it with originals",
            param="rerank",
        )
    query_patches = await _query_patches(service, origin)
    spec = service.artifact.manifest.preprocess
    compare = partial(
        _compare, unit_rows(query_patches.rows), query_patches, origin.weights, spec, query.ranking.matches
    )
    comparisons: dict[str, Comparison] = {}
    faults: list[ServiceError] = []
    step = min(AT_A_TIME, service.settings.items_per_request)
    compared_depth = min(query.rerank_depth, len(hits))
    for start in range(0, compared_depth, step):
        candidates = hits[start : min(start + step, compared_depth)]
        outcomes = await patches_of(service, await digests_of(service, target.info.ref, candidates))
        faults += [failure.error for failure in failures(outcomes) if failure.error.status >= 500]
        readable = [(candidates[index].id, patches) for index, patches in indexed(outcomes)]
        comparisons |= await asyncio.to_thread(lambda pairs: {item_id: compare(p) for item_id, p in pairs}, readable)
    if faults:
        log.warning("rerank: %d images could not be compared: %s", len(faults), faults[0].detail)
        if not comparisons:
            raise faults[0]
    compared = [hit for hit in hits if hit.id in comparisons]
    compared.sort(key=lambda hit: (-comparisons[hit.id].score, -hit.score, hit.id))
    return Reranked([*compared, *(hit for hit in hits if hit.id not in comparisons)], comparisons)


async def _query_patches(service: Service, origin: Origin) -> Patches:
    """Return the patch features of the query's image. If the query names an item, return those of the item's stored
    image.

    Raises:
        InvalidRequest: the image of the item is not stored or cannot be read.
    """
    if origin.patches is not None:
        return origin.patches
    assert origin.source is not None
    digest = photo_digest(origin.source)
    if digest is None:
        raise InvalidRequest(
            f"rerank compares images, but the image of item {origin.source.id[:80]!r} is not stored", param="id"
        )
    [patches] = await patches_of(service, [digest])
    if patches.error is not None and patches.error.status < 500:
        raise InvalidRequest(
            f"rerank compares images, but the image of item {origin.source.id[:80]!r} cannot be read: "
            f"{patches.error.detail}",
            param="id",
        )
    return patches.result()


def _shares(patches: Patches, spec: PreprocessSpec) -> Floats:
    """Return the fraction of each patch that shows the image, float32 [N]. The rest of a patch is padding."""
    return image_weights(patches.size, crop_box(*patches.size, spec), patches.grid).ravel()


def _compare(
    rows: Floats, query: Patches, weights: Floats | None, spec: PreprocessSpec, matches: bool, patches: Patches
) -> Comparison:
    """Compare the patches of the query with the patches of one hit (`patches`). `rows` contains the query's patches as
    unit vectors, float32 [N, D]."""
    candidate = unit_rows(patches.rows)
    if spec.fit == "pad":  # padding looks the same in all images; a zero row has cosine 0 to everything
        candidate = candidate * (_shares(patches, spec) > 0)[:, None]
        weights = _shares(query, spec) if weights is None else weights
    if not matches:
        return Comparison(maxsim(rows, candidate, weights))
    score, best = maxsim_matches(rows, candidate, weights)
    query_crop, crop = crop_box(*query.size, spec), crop_box(*patches.size, spec)
    boxes = [
        {
            "query_box": patch_box(match.query, query.grid, query_crop),
            "box": patch_box(match.candidate, patches.grid, crop),
            "score": match.score,
        }
        for match in best
    ]
    return Comparison(score, boxes)

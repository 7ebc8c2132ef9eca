"""Searches the images of a collection for a region that is marked in reference images (the comparison itself is in
`service/vision/find_region.py`).

If more items match the filter than the request's number of candidates, the index proposes those that are most similar
to the references. The images of all candidates are compared by their patch features. Cached features are read and
compared in slices, in as many threads as there are decoding threads. A cancelled request stops after the current
slices. Then missing features are computed, in a request until half of its time limit has passed. The remaining
candidates are pending. Computed features are cached, so a repeated request gets further. Masks are computed only for
the returned page.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np

from model.preprocess import PreprocessSpec, crop_box
from service.errors import InvalidRequest, ModelMismatch, ServiceError
from service.features.patches import Patches
from service.originals import digest_of, photo_digest
from service.outcomes import failures, indexed
from service.rankings import Ranked, Ranking, cursor_after, position_of
from service.retrieval.origins import Target
from service.retrieval.region_references import Marked, check_references, read_references, shown_patches
from service.retrieval.region_schemas import FindRegionIn
from service.retrieval.stored_patches import digests_of, patches_of
from service.search.filters import Filter
from service.search.store import Item
from service.state import Service
from service.tags import tag_parts
from service.vision.find_region import Region, learn_region, mask_scores, scores
from service.vision.foreground import upsample_mask
from service.vision.mask import coco_rle_encode
from service.vision.positional_bias import basis_of

log = logging.getLogger(__name__)

_SLICE: Final = 16  # images that a thread compares at once
_COMPUTED_AT_ONCE: Final = 16
_SCROLLED_AT_ONCE: Final = 1000
_SCORE_DIGITS: Final = 4


@dataclass(frozen=True)
class FoundRegion:
    """The region in the image of an item. `segmentation` contains COCO run lengths, and `box` is the bounding box of
    the mask."""

    item: Item
    score: float
    box: list[int]
    area: int
    segmentation: dict[str, Any]


@dataclass(frozen=True)
class FoundRegions:
    """One page of results, and the numbers that describe the whole ranking."""

    tag: str
    page: list[FoundRegion]
    ranking: Ranking
    cursor: str | None


@dataclass
class _Compared:
    """The results of comparing images: the scores, keyed by digest, and the digests of unreadable images."""

    scores: dict[str, float] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)


async def find_region(
    service: Service, name: str, request: FindRegionIn, where: Filter | None, request_hash: str, until: float
) -> FoundRegions:
    """Find a region in the images of a collection, and return one page of results, best first. No features are computed
    after the time `until` (a value of `time.monotonic()`).

    Raises:
        InvalidRequest: the collection stores no images, or a reference or the cursor is invalid.
        ModelMismatch: another model computed the vectors of the collection.
        ServiceError: a reference cannot be used, or the service failed.
    """
    service.named(request.model)  # raises an error before anything else is read
    check_references(request.references)
    after = position_of(request.cursor, request_hash)
    target = await Target.of(service, name, request.model)
    service = target.service
    _check_target(service, target)
    marked = await read_references(service, target, request.references)
    region = await asyncio.to_thread(_learn, service, marked, request.debias)
    key = (target.info.ref, request_hash)
    ranking = None if after is None else service.rankings.get(key)
    if ranking is None:
        candidates = await _candidates(service, target, request, marked, where)
        ranking = await _ranked(service, region, candidates, request.min_score, until)
        service.rankings.keep(key, ranking)
    shown, has_more = ranking.page(after, request.limit)
    page = await _with_masks(service, target, region, shown)
    return FoundRegions(target.info.tag, page, ranking, cursor_after(shown[-1], request_hash) if has_more else None)


def _check_target(service: Service, target: Target) -> None:
    info = target.info
    if not info.spec.originals:
        raise InvalidRequest(
            f"find-region compares stored images, but collection {info.name!r} stores none: create it with originals",
            param="name",
        )
    if tag_parts(info.tag).fingerprint != service.artifact.fingerprint:
        raise ModelMismatch(
            f"find-region compares patch features of the served model {service.artifact.fingerprint!r}, but "
            f"collection {info.name!r} holds vectors of {info.tag!r}"
        )


def _learn(service: Service, marked: Sequence[Marked], debias: bool) -> Region:
    size, patch = service.artifact.manifest.input_size, service.model.config.patch_size
    basis = np.zeros((0, service.pipeline.dims), np.float32)
    if debias:
        basis = basis_of(service.model, (size[0] // patch, size[1] // patch))
    return learn_region([each.reference for each in marked], basis)


async def _candidates(
    service: Service, target: Target, request: FindRegionIn, marked: Sequence[Marked], where: Filter | None
) -> dict[str, str | None]:
    """Return the candidates as a dict from each item's id to the digest of its image, or to None if the digest is
    unknown. Items that serve as references are left out. If the index proposes the candidates, the most similar ones
    come first."""
    name, most = target.info.ref, request.candidates
    excluded = {reference.id for reference in request.references if reference.id is not None}
    digests: dict[str, str | None] = {}
    if await service.store.count(name, where) <= most + len(excluded):
        cursor = None
        while True:
            page = await service.store.scroll(name, where=where, cursor=cursor, limit=_SCROLLED_AT_ONCE)
            digests |= {item.id: photo_digest(item) for item in page.items}
            cursor = page.cursor
            if cursor is None or len(digests) > most + len(excluded):  # items may be added in the meantime
                break
    else:
        vectors = np.stack([each.vector for each in marked])
        rankings = await service.store.search(name, vectors, most, tag=target.info.tag, where=where)
        hits = sorted((hit for hits in rankings for hit in hits), key=lambda hit: (-hit.score, hit.id))
        nearest = list({hit.id: hit for hit in hits}.values())[: most + len(excluded)]
        digests = {hit.id: digest_of(hit.source) for hit in nearest}
        unknown = [hit for hit in nearest if digests[hit.id] is None]
        for part in _slices(unknown, _SCROLLED_AT_ONCE):
            digests |= zip([hit.id for hit in part], await digests_of(service, name, part), strict=True)
    kept = [(item_id, digest) for item_id, digest in digests.items() if item_id not in excluded]
    return dict(kept[:most])


async def _ranked(
    service: Service, region: Region, candidates: Mapping[str, str | None], min_score: float, until: float
) -> Ranking:
    """Compare all candidates with the region, and return those that reach `min_score`, in order. No features are
    computed after the time `until`.

    Raises:
        ServiceError: no image could be compared, because of a fault in the service.
    """
    wanted = list(dict.fromkeys(digest for digest in candidates.values() if digest is not None))
    compared = _Compared()
    await _compare_cached(service, region, wanted, compared)
    await _compare_others(service, region, [d for d in wanted if d not in compared.scores], compared, until)
    found = [
        Ranked(-compared.scores[digest], item_id, digest)
        for item_id, digest in candidates.items()
        if digest is not None and compared.scores.get(digest, -1.0) >= min_score
    ]
    unreadable = sum(digest is None or digest in compared.unreadable for digest in candidates.values())
    examined = sum(digest in compared.scores for digest in candidates.values())
    return Ranking(sorted(found), examined, len(candidates) - examined - unreadable, unreadable)


async def _compare_cached(service: Service, region: Region, digests: Sequence[str], compared: _Compared) -> None:
    """Compare the images whose patch features are cached."""
    slices = iter(_slices(digests, _SLICE))
    work = partial(_scores, region, service.artifact.manifest.preprocess)

    async def work_on_slices() -> None:
        for part in slices:  # shared by the tasks
            compared.scores.update(await service.pipeline.patch_cache.read(part, work))

    async with asyncio.TaskGroup() as group:
        for _ in range(service.settings.decode_workers):
            group.create_task(work_on_slices())


async def _compare_others(
    service: Service, region: Region, digests: Sequence[str], compared: _Compared, until: float
) -> None:
    """Compute the patch features of the images that are not cached, and compare them. Stop at the time `until`, or if
    the queue is full."""
    faults: list[ServiceError] = []
    spec = service.artifact.manifest.preprocess
    for part in _slices(digests, min(_COMPUTED_AT_ONCE, service.settings.items_per_request)):
        if time.monotonic() >= until:
            break
        try:
            outcomes = await patches_of(service, part)
        except ServiceError as error:  # for instance QueueFull
            faults.append(error)
            break
        patches = {part[index]: value for index, value in indexed(outcomes)}
        compared.scores.update(await asyncio.to_thread(_scores, region, spec, patches))
        for failure in failures(outcomes):
            if failure.error.status >= 500:
                faults.append(failure.error)
            else:
                compared.unreadable.add(part[failure.index])
    if faults:
        log.warning("find-region: %d faults while features were computed: %s", len(faults), faults[0].detail)
        if not compared.scores:
            raise faults[0]


def _scores(region: Region, spec: PreprocessSpec, patches: Mapping[str, Patches]) -> dict[str, float]:
    if not patches:
        return {}
    images = [(each.rows, shown_patches(each.size, each.grid, spec)) for each in patches.values()]
    found = scores(region, images)
    return {digest: round(float(score), _SCORE_DIGITS) for digest, score in zip(patches, found, strict=True)}


async def _with_masks(service: Service, target: Target, region: Region, ranked: Sequence[Ranked]) -> list[FoundRegion]:
    """Compute the masks of one page. An item is left out if it or its image has been deleted in the meantime."""
    items = await service.store.get(target.info.ref, [each.id for each in ranked]) if ranked else []
    page: list[FoundRegion] = []
    for start in range(0, len(ranked), _COMPUTED_AT_ONCE):
        part = ranked[start : start + _COMPUTED_AT_ONCE]
        outcomes = await patches_of(service, [each.digest for each in part])
        for each, item, patches in zip(part, items[start:], outcomes, strict=False):
            if item is not None and patches.error is None:
                spec = service.artifact.manifest.preprocess
                page.append(await asyncio.to_thread(_found, region, spec, each, item, patches.result()))
    return page


def _found(region: Region, spec: PreprocessSpec, ranked: Ranked, item: Item, patches: Patches) -> FoundRegion:
    values = mask_scores(region, patches.rows, shown_patches(patches.size, patches.grid, spec))
    mask = upsample_mask(values.reshape(patches.grid), *patches.size, crop_box(*patches.size, spec))
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [0, 0, 0, 0]
    if len(rows):
        left, top = int(columns[0]), int(rows[0])
        box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
    return FoundRegion(item, ranked.score, box, int(mask.sum()), coco_rle_encode(mask))


def _slices(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]

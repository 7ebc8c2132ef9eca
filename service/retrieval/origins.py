"""Compute the origin of each query. An origin contains a vector that can be compared with the vectors of the
collection, and the data that later steps of the search need.

The pipeline embeds all images of a request together, and one call to the store reads all items that the request names
by id. A collection has a tag, which names the model and the pooling of its vectors. Images are embedded with this
pooling, and a query with an image is rejected if the served model's tag differs from the collection's tag. A query by
the id of an item works with any served model, because it uses the stored vector.

A query by region needs the patch tokens of its image. A query by image also needs them if its results are re-ranked by
patches. The cache stores only the class token and the mean of the patch tokens, so such a query always requires a
forward pass.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from model.pooling import DEFAULT_POOLING, Pooling
from model.preprocess import crop_box
from service.errors import InvalidItems, InvalidRequest, ItemError, ItemNotFound, ModelMismatch, ServiceError
from service.features.patches import Patches
from service.features.pipeline import Analysed, Embedded
from service.outcomes import Outcome, attempt_await, failures, successes
from service.retrieval.combine import combined
from service.retrieval.query import Part, Query
from service.search.checks import check_match, check_named, normalised
from service.search.partners import migrations_of
from service.search.store import CollectionInfo, Floats, Item
from service.state import Service
from service.tags import tag_parts
from service.timings import slowest
from service.vision.region import box_weights, mask_weights, region_mean


@dataclass(frozen=True)
class Target:
    """The collection to search, the pooling of its vectors, and the service with the model that made them.

    `info.name` is the collection's own name, even if the request used an alias. `info.ref` names these vectors, even if
    the collection is switched to another model while the request runs.
    """

    info: CollectionInfo
    pooling: Pooling
    service: Service

    @staticmethod
    async def of(service: Service, name: str, model: str = "auto", fingerprints: Collection[str] = ()) -> "Target":
        """Find a collection by its name or alias. `model` is the field `model` of the request. If `fingerprints`, those
        of the vectors in the request, name the model from which the collection was just switched, use the vectors of
        that model.

        Raises:
            ServiceError: there is no such collection or model, or the model is still being loaded.
        """
        info = await service.store.info(name)
        if fingerprints and "migrations" in service.store.capabilities:
            former = await migrations_of(service.store).former(info.name)
            if former is not None and set(fingerprints) == {tag_parts(former.tag).fingerprint}:
                info = former
        return Target(info, tag_parts(info.tag).pooling or DEFAULT_POOLING, service.for_tag(info.tag, model))


@dataclass(frozen=True)
class Origin:
    """The origin of a search: the vector of the query, and data that later steps of the search need.

    vector: the vector of the query, [D], of length 1.
    exclude: the ids of the items that the query names. They are left out of the answer.
    patches: the features of the N patches of the query's image. This is None unless the query has an image and requests
        re-ranking.
    weights: the weight of each patch, [N]. None means that all weights are equal.
    timings: the duration of each stage in milliseconds.
    """

    vector: Floats
    exclude: frozenset[str] = frozenset()
    patches: Patches | None = None
    weights: Floats | None = None
    source: Item | None = None  # the item that the query names
    timings: dict[str, float] = field(default_factory=dict)


async def find_origins(service: Service, target: Target, queries: Sequence[Outcome[Query]]) -> list[Outcome[Origin]]:
    """For each query, in order, return its origin or its error. The origin contains the vector of the query.

    Raises:
        ServiceError: the whole request fails, for instance because the queue is full.
    """
    checked = [query.then(_checked, service, target) for query in queries]
    good = {query.index: query.result() for query in checked if query.error is None}
    by_patches = {number: query for number, query in good.items() if query.needs_patches}
    images = {
        (number, i): part.image
        for number, query in good.items()
        if number not in by_patches
        for i, part in enumerate(query.parts)
        if part.image is not None
    }
    vectors = await target.service.pipeline.embed(list(images.values())) if images else []
    embedded = dict(zip(images, vectors, strict=True))
    ids = list({part.id: None for query in good.values() for part in query.parts if part.id is not None})
    items = dict(zip(ids, await service.store.get(target.info.ref, ids) if ids else [], strict=True))
    analysed = await _analyse_all(target.service, target, by_patches)

    def origin(query: Query, number: int) -> Origin:
        if number in analysed:
            return analysed[number].result()
        parts = [
            _Part(part, embedded.get((number, i)), items.get(part.id) if part.id else None)
            for i, part in enumerate(query.parts)
        ]
        return _origin(target, query, parts)

    return [query.then(origin, query.index) for query in checked]


class _Part(NamedTuple):
    """A part of a query, together with its embedded image or its stored item."""

    part: Part
    embedded: Outcome[Embedded] | None  # None unless the part is an image
    item: Item | None  # None unless the part is the id of an existing item


def _checked(query: Query, service: Service, target: Target) -> Query:
    """Check that the query can be compared with the collection's vectors, and return the query. This check runs before
    any image is decoded.

    Raises:
        ModelMismatch: the query and the collection have vectors from different models, or the query requests re-ranking
            and the collection has vectors from a model other than the served one.
        Conflict: the query and the collection have vectors with different dimensions.
        InvalidRequest: the query has the form `region`, but the pooling of the collection is not "mean".
    """
    info = target.info
    served = target.service.artifact.fingerprint
    if query.ranking.rerank is not None and tag_parts(info.tag).fingerprint != served:
        raise ModelMismatch(
            f"rerank compares patch features of the served model {served!r}, but collection "
            f"{info.name!r} holds vectors of {info.tag!r}: the two rankings cannot be mixed; search without rerank",
            param="rerank",
        )
    if query.needs_model:
        check_match(info, tag=target.service.tag(pooling=target.pooling), dimension=info.dimension)
    for part in query.parts:
        if part.vector is not None:
            same_model = part.fingerprint is not None and part.fingerprint == tag_parts(info.tag).fingerprint
            tag = info.tag if same_model else service.tag(part.fingerprint, target.pooling)
            check_match(info, tag=tag, dimension=len(part.vector))
            if part.fingerprint is None:
                check_named(info)
    if query.form == "region" and target.pooling != "mean":
        raise InvalidRequest(
            f"a region is the mean of its patch tokens, which can only be compared with vectors of pooling mean; "
            f"collection {info.name!r} has pooling {target.pooling}: index the images in a collection with "
            "pooling mean",
            param="region",
        )
    return query


def _origin(target: Target, query: Query, parts: Sequence[_Part]) -> Origin:
    """Compute the origin of a query from the vectors of its parts.

    Raises:
        InvalidItems: an image could not be embedded.
        ItemNotFound: an item that the query names does not exist.
    """
    embedded = [part.embedded for part in parts if part.embedded is not None]
    if bad := failures(embedded):
        raise InvalidItems(bad, total=len(parts), param=query.form)
    vectors = [_vector(target, part) for part in parts]
    if query.form == "combine":
        vector = combined(np.stack(vectors), [part.weight for part in query.parts])
    else:
        [vector] = vectors
    return Origin(
        vector,
        frozenset(part.id for part in query.parts if part.id is not None),
        source=parts[0].item,
        timings=slowest(successes(embedded)),
    )


def _vector(target: Target, with_features: _Part) -> Floats:
    """Return the vector of one part of a query, float32 [D] with length 1.

    Raises:
        ItemNotFound: the part names an item that does not exist.
    """
    part, embedded, item = with_features
    if part.id is not None:
        if item is None:
            raise ItemNotFound(f"collection {target.info.name!r} has no item {part.id[:80]!r}", param="id")
        return item.vector
    if part.vector is not None:
        return normalised(part.vector)
    assert embedded is not None
    return normalised(embedded.result().vector(target.pooling, True))


async def _analyse_all(service: Service, target: Target, queries: Mapping[int, Query]) -> dict[int, Outcome[Origin]]:
    """Compute the origin of each query. All queries must need patch tokens. `queries` and the result are dicts by the
    position of the query in the request. The images are analysed concurrently, so several images can share a forward
    pass."""
    analyses = (attempt_await(number, _analysed(service, target, query)) for number, query in queries.items())
    origins: dict[int, Outcome[Origin]] = {}
    for outcome in await asyncio.gather(*analyses, return_exceptions=True):  # waits for every analysis
        if isinstance(outcome, BaseException):
            raise outcome
        origins[outcome.index] = outcome
    return origins


async def _analysed(service: Service, target: Target, query: Query) -> Origin:
    """Compute the origin of a query that needs the patch tokens of its image.

    Raises:
        InvalidItems: the image cannot be used.
        ServiceError: the region is invalid, or the service failed.
    """
    image = query.parts[0].image
    assert image is not None
    try:
        return await service.pipeline.analyse(image.result(), partial(_of_patches, service, target, query))
    except ServiceError as error:
        if error.status >= 500 or error.param == "region":  # not an error of the image
            raise
        raise InvalidItems([ItemError(0, error)], total=1, param=query.form) from error


def _of_patches(service: Service, target: Target, query: Query, analysed: Analysed) -> Origin:
    """Compute the origin of a query from the features of its image, including the patch tokens. This function runs in a
    worker thread."""
    weights = None
    vector = analysed.embedded.vector(target.pooling, True)
    height, width = analysed.image.shape[:2]
    if query.region is not None:
        seen = crop_box(height, width, service.artifact.manifest.preprocess)
        if "box" in query.region:
            weights = box_weights(query.region["box"], seen, analysed.grid, (height, width))
        else:
            weights = mask_weights(query.region["mask"], (height, width), seen, analysed.grid)
        vector = region_mean(analysed.patches, weights)
    kept = Patches.of(analysed.patches, analysed.grid, (height, width)) if query.ranking.rerank else None
    flat = None if weights is None else weights.ravel()
    return Origin(normalised(vector), patches=kept, weights=flat, timings=slowest([analysed.embedded]))

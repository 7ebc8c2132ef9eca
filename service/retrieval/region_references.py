"""Computes the features of the references in a find-region request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.preprocess import PreprocessSpec, crop_box
from service.data_urls import decode_texts
from service.errors import InvalidItems, InvalidRequest, ItemError, ItemNotFound, ServiceError
from service.features.patches import unit_rows
from service.features.pipeline import Analysed
from service.originals import photo_digest
from service.outcomes import Outcome
from service.retrieval.origins import Target
from service.retrieval.region_schemas import ReferenceIn
from service.retrieval.stored_patches import patches_of
from service.search.checks import normalised
from service.search.store import Floats, Item
from service.state import Service
from service.vision.find_region import Bools, Reference
from service.vision.region import image_weights, region_mean, region_weights


@dataclass(frozen=True)
class Marked:
    """A reference and the vector by which the index proposes candidates: that of the region if the collection has
    pooling "mean", and that of the whole image otherwise."""

    reference: Reference
    vector: Floats


def check_references(references: Sequence[ReferenceIn]) -> None:
    """Check that each reference has exactly one of `image` and `id`.

    Raises:
        InvalidRequest: a reference has both or neither.
    """
    for i, reference in enumerate(references):
        if (reference.image is None) == (reference.id is None):
            raise InvalidRequest(
                f"references.{i}: exactly one of image and id is needed, not "
                f"{'none' if reference.id is None else 'both'}",
                param="references",
            )


async def read_references(service: Service, target: Target, references: Sequence[ReferenceIn]) -> list[Marked]:
    """Return the features of each reference, in order.

    Raises:
        InvalidItems: an image cannot be used.
        ItemNotFound: an item does not exist.
        InvalidRequest: a region does not fit its image, or the image of an item is not stored.
        ServiceError: the queue is full, or the service failed.
    """
    texts = [reference.image for reference in references if reference.image is not None]
    images = iter(await decode_texts(texts, service.settings, service.web_images))
    items = await _items(service, target, [reference.id for reference in references if reference.id is not None])
    marked = []
    for i, reference in enumerate(references):
        region = reference.model_dump(include={"box", "mask", "point"}, exclude_none=True)
        if reference.id is None:
            marked.append(await _of_image(service, target, next(images), region, i))
        else:
            marked.append(await _of_item(service, target, items[reference.id], region, i))
    return marked


def shown_patches(size: tuple[int, int], grid: tuple[int, int], spec: PreprocessSpec) -> Bools | None:
    """Return which patches show the image, bool [N], or None if all do. Other patches show padding."""
    if spec.fit != "pad":
        return None
    return np.asarray(image_weights(size, crop_box(*size, spec), grid).ravel() > 0)


async def _items(service: Service, target: Target, ids: Sequence[str]) -> dict[str, Item]:
    found = await service.store.get(target.info.ref, ids) if ids else []
    for item_id, item in zip(ids, found, strict=True):
        if item is None:
            raise ItemNotFound(f"collection {target.info.name!r} has no item {item_id[:80]!r}", param="references")
    return {item.id: item for item in found if item is not None}


async def _of_image(
    service: Service, target: Target, image: Outcome[bytes], region: Mapping[str, Any], number: int
) -> Marked:
    where = f"references.{number}"

    def work(analysed: Analysed) -> Marked:
        weights = region_weights(region, analysed.size, analysed.crop_box, analysed.grid, where)
        vector = analysed.embedded.vector(target.pooling, True)
        if target.pooling == "mean":
            vector = region_mean(analysed.patches, weights)
        return _marked(analysed.patches, weights, analysed.size, analysed.grid, normalised(vector), analysed.spec)

    try:
        return await service.pipeline.analyse(image.result(), work)
    except ServiceError as error:
        if error.status >= 500 or error.param == where:  # not an error of the image
            raise
        raise InvalidItems([ItemError(number, error)], total=number + 1, param="references") from error


async def _of_item(service: Service, target: Target, item: Item, region: Mapping[str, Any], number: int) -> Marked:
    where, digest = f"references.{number}", photo_digest(item)
    [outcome] = await patches_of(service, [digest])
    if outcome.error is not None and outcome.error.status < 500:
        raise InvalidRequest(
            f"{where}: the image of item {item.id[:80]!r} cannot be read: {outcome.error.detail}", param=where
        )
    patches, spec = outcome.result(), service.artifact.manifest.preprocess
    weights = region_weights(region, patches.size, crop_box(*patches.size, spec), patches.grid, where)
    vector = normalised(region_mean(unit_rows(patches.rows), weights)) if target.pooling == "mean" else item.vector
    return _marked(patches.rows, weights, patches.size, patches.grid, vector, spec)


def _marked(
    rows: Any, weights: Floats, size: tuple[int, int], grid: tuple[int, int], vector: Floats, spec: PreprocessSpec
) -> Marked:
    shown = shown_patches(size, grid, spec)
    shown = np.ones(len(rows), bool) if shown is None else shown
    return Marked(Reference(rows.copy(), weights.ravel(), shown), vector)

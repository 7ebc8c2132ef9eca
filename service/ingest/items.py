"""Add the images and vectors of one request to a collection.

First, each item is checked as far as is possible without the neural network. Then the network embeds all images
together. If the collection stores images, the images are stored. Finally, all items without an error are written in one
call. If `on_error` is "partial", an item with an error does not affect the others.
"""

import asyncio
import hashlib
import reprlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from model.pooling import width
from service.data_urls import Fetched, image_from_text, link_of
from service.errors import CollectionNotFound, InvalidRequest, ItemError, ModelMismatch
from service.features.pipeline import Embedded
from service.options import check_fields, parse_options
from service.originals import source_of
from service.outcomes import OnError, Outcome, indexed, split_items, successes
from service.schemas import ItemIn
from service.search.checks import (
    check_id,
    check_match,
    check_named,
    check_source,
    loads_exactly,
    metadata_text,
    normalised,
)
from service.search.store import CollectionInfo, CollectionSpec, Item
from service.state import Service
from service.tags import model_of, tag_parts
from service.timings import slowest
from service.tracing import record_stage

_NO_VECTOR: Final = np.empty(0, np.float32)


@dataclass(frozen=True)
class NewItem:
    """An item that a request adds. If the item was sent with an image, its vector is empty until the network has
    embedded the image."""

    item: Item
    image: bytes | None = None
    fingerprint: str | None = None  # fingerprint of the model that made the vector; None if the client sent none
    embedded: Embedded | None = None


@dataclass(frozen=True)
class Added:
    """The result of adding the items of a request.

    collection: a description of the collection after the write.
    ids: the ids of the written items, by their index in the request.
    errors: the errors of the items that were not written.
    timings: the duration of each stage in milliseconds.
    """

    collection: CollectionInfo
    ids: dict[int, str]
    errors: list[ItemError]
    timings: dict[str, float]


async def add_items(
    service: Service,
    name: str,
    items: Sequence[Outcome[NewItem]],
    on_error: OnError,
    request_key: str | None = None,
    *,
    client: str = "",
    model: str = "auto",
) -> Added:
    """Write items to a collection and return the result. If the collection does not exist, it is created. If a call is
    repeated within a day with the same `request_key` and the same items, the second call changes nothing. `client`
    identifies the sender.

    If the collection is switched to another model while the images are embedded, they are embedded again.

    Raises:
        InvalidItems: an item cannot be written and `on_error` is "fail", or no item can be written. Nothing was
            written.
        ServiceError: the whole request failed, for instance with ModelMismatch or QueueFull. Nothing was written.
    """
    collection = await _target(service, name)
    while True:
        try:
            chosen = service.for_tag(collection.tag, model)
            return await _add(chosen, collection, items, on_error, request_key, client)
        except ModelMismatch:
            before, collection = collection.tag, await _target(service, name)
            if collection.tag == before:
                raise


async def _add(
    service: Service,
    collection: CollectionInfo,
    items: Sequence[Outcome[NewItem]],
    on_error: OnError,
    request_key: str | None,
    client: str,
) -> Added:
    """Write items to a collection with vectors of the model of `service`. The arguments are those of `add_items`."""
    ready = await _ready(service, collection, items)
    good, errors = split_items(ready, on_error, "items")
    other = await _other_vectors(service, collection, good)
    started = time.perf_counter()
    info = await service.store.upsert(
        collection.name,
        [new.item for _, new in good],
        tag=collection.tag,
        request_key=request_key,
        client=client,
        other=other,
    )
    record_stage("store", started, time.perf_counter())
    timings = slowest(new.embedded for _, new in good if new.embedded is not None)
    return Added(info, {index: new.item.id for index, new in good}, errors, timings)


async def _other_vectors(
    service: Service, collection: CollectionInfo, good: Sequence[tuple[int, NewItem]]
) -> tuple[str, list[Item]] | None:
    """While a collection has vectors of two models, embed the images with the other model too. Return the tag of the
    other vectors and the items with them. If this process has not loaded the other model, return None: the copier then
    embeds the images later."""
    if collection.partner is None:
        return None
    pooling = tag_parts(collection.partner).pooling
    other = service.loaded.services.get(model_of(collection.partner))
    images = [Outcome(index, new.image) for index, new in good if new.image is not None]
    if other is None or pooling is None or not images:
        return None
    keeps = collection.spec.originals
    embedded = {outcome.index: outcome for outcome in await other.pipeline.embed(images, with_patches=keeps)}
    await _keep_patches(other, [(new, embedded[index].value) for index, new in good if index in embedded])
    vectors = {
        index: normalised(outcome.result().vector(pooling, True))
        for index, outcome in embedded.items()
        if outcome.error is None
    }
    return collection.partner, [replace(new.item, vector=vectors[index]) for index, new in good if index in vectors]


def item_from_json(index: int, raw: Any, max_image_bytes: int, fetched: Fetched) -> NewItem:
    """Parse the item at `index` of the list `items` in a request body. The item is checked as far as is possible
    without the store and the neural network. `fetched` contains the images that are links.

    Raises:
        ServiceError: the item is invalid.
    """
    if not isinstance(raw, dict):
        raise InvalidRequest(f"items.{index}: an item must be an object, not {type(raw).__name__}")
    check_fields(raw, f"items.{index}")
    return item_from_fields(parse_options(ItemIn, raw), max_image_bytes, fetched)


def item_from_fields(sent: ItemIn, max_image_bytes: int, fetched: Fetched) -> NewItem:
    """Make an item from the fields of a JSON object in a request. If its image is a link, `fetched` contains the image,
    and the link is the default of `source`. Raises ServiceError if the item is invalid."""
    if (sent.image is None) == (sent.vector is None):
        raise InvalidRequest("an item must have either an image or a vector")
    if sent.image is not None:
        if sent.fingerprint is not None:
            raise InvalidRequest("fingerprint requires a vector: images are embedded by the served model")
        image = image_from_text(sent.image, max_image_bytes, fetched)
        source = link_of(sent.image) if sent.source is None else sent.source
        return _image_item(image, sent.id, sent.metadata, source)
    if sent.id is None:
        raise InvalidRequest("an item with a vector needs an id")
    item = Item(sent.id, normalised(sent.vector or []), sent.metadata, sent.source)
    return NewItem(_checked(item), fingerprint=sent.fingerprint)


def item_from_file(image: bytes, filename: str, item_id: str = "", metadata: str = "", source: str = "") -> NewItem:
    """Make an item from the bytes of an uploaded image file. An empty argument means that the client did not send it.

    Args:
        filename: the name of the file. It is stored in the metadata as `filename`, unless `metadata` has this key.
        item_id: the id. If it is empty, the id is the sha256 of the bytes, in hex.
        metadata: the text of a JSON object.

    Raises:
        InvalidRequest: the metadata is not the text of a JSON object, or an argument cannot be stored.
    """
    fields = {"filename": filename} if filename else {}
    return _image_item(image, item_id or None, fields | _object(metadata), source or None)


def _object(text: str) -> dict[str, Any]:
    try:
        value = loads_exactly(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"metadata must be the text of a JSON object: {error}", param="metadata") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"metadata must be a JSON object, not {reprlib.repr(value)}", param="metadata")
    return value


def _image_item(image: bytes, item_id: str | None, metadata: dict[str, Any], source: str | None) -> NewItem:
    digest = hashlib.sha256(image).hexdigest()
    return NewItem(_checked(Item(item_id or digest, _NO_VECTOR, metadata, source, digest)), image)


def _checked(item: Item) -> Item:
    """Check the id, metadata and source of an item and return the item. This check runs before any expensive work.

    Raises:
        InvalidRequest: the store would not accept the item.
    """
    check_id(item.id)
    metadata_text(item.metadata)
    return check_source(item)


async def _target(service: Service, name: str) -> CollectionInfo:
    """Return a description of the collection to write to. If the collection does not exist, return a description of the
    collection that the first write will create."""
    try:
        return await service.store.info(name)
    except CollectionNotFound:
        return CollectionInfo(name, CollectionSpec(service.tag(), service.pipeline.dims), 0)


async def _ready(
    service: Service, collection: CollectionInfo, sent: Sequence[Outcome[NewItem]]
) -> list[Outcome[NewItem]]:
    """Prepare the items for writing. For each item, in order, return the prepared item or its error. Images are
    embedded and, if the collection stores images, stored.

    Raises:
        ModelMismatch: all valid items have images, and the collection contains vectors from another model.
        QueueFull, ShuttingDown, ModelUnavailable: the pipeline accepts no more images. No image was embedded.
    """
    readable = successes(sent)
    if readable and all(new.image is not None for new in readable):
        _check_images_fit(service, collection)
    fitting = [outcome.then(_fitting, service, collection) for outcome in sent]
    images = [Outcome(index, new.image) for index, new in indexed(fitting) if new.image is not None]
    keeps = collection.spec.originals  # searches compare the patches of stored images
    outcomes = await service.pipeline.embed(images, with_patches=keeps) if images else []
    embedded = {outcome.index: outcome for outcome in outcomes}
    ready = [outcome.then(_with_vector, collection, embedded.get(outcome.index)) for outcome in fitting]
    if not keeps:
        return ready
    stored = await asyncio.gather(*(outcome.then_await(_stored, service) for outcome in ready))
    await _keep_patches(service, [(new, new.embedded) for new in successes(stored)])
    return stored


async def _keep_patches(service: Service, images: Iterable[tuple[NewItem, Embedded | None]]) -> None:
    """Store the patch features of images that are stored themselves, so that searches need not compute them."""
    await service.pipeline.patch_cache.add(
        {
            new.item.digest: embedded.patches
            for new, embedded in images
            if new.item.digest is not None and embedded is not None and embedded.patches is not None
        },
        recent=False,
    )


def _check_images_fit(service: Service, collection: CollectionInfo) -> None:
    """Check that vectors of the served model can be added to this collection.

    Raises:
        ModelMismatch: the collection contains vectors from another model.
        Conflict: the collection contains vectors with a different dimension.
    """
    pooling = tag_parts(collection.tag).pooling
    if pooling is None:
        raise ModelMismatch(
            f"collection {collection.name!r} contains vectors of {collection.tag!r}, which this service cannot make"
        )
    dimension = width(pooling, service.pipeline.dims)
    check_match(collection, tag=service.tag(pooling=pooling), dimension=dimension)


def _fitting(new: NewItem, service: Service, collection: CollectionInfo) -> NewItem:
    """Check that the item's vector can be added to the collection, and return the item.

    Raises:
        ModelMismatch: the collection contains vectors from another model.
        Conflict: the collection contains vectors with a different dimension.
    """
    if new.image is not None:
        _check_images_fit(service, collection)
        return new
    if new.fingerprint not in (None, tag_parts(collection.tag).fingerprint):
        raise ModelMismatch(
            f"collection {collection.name!r} contains vectors of {collection.tag!r}; this vector is of "
            f"{new.fingerprint!r}: they cannot be compared (PUT creates a collection for vectors of another model)"
        )
    check_match(collection, tag=collection.tag, dimension=len(new.item.vector))
    if new.fingerprint is None:
        check_named(collection)
    return new


def _with_vector(new: NewItem, collection: CollectionInfo, outcome: Outcome[Embedded] | None) -> NewItem:
    """Return the item with the vector of its image. The vector is computed from the features in `outcome`. If `outcome`
    contains an error, raise it. If `outcome` is None, the item already has a vector and is returned unchanged."""
    if outcome is None:
        return new
    pooling = tag_parts(collection.tag).pooling
    assert pooling is not None, "images were refused"
    embedded = outcome.result()
    vector = normalised(embedded.vector(pooling, True))
    return replace(new, item=replace(new.item, vector=vector), embedded=embedded)


async def _stored(new: NewItem, service: Service) -> NewItem:
    """Store the image of the item, if it has one, and return the item. This runs before the item is written, so that no
    item refers to a missing image."""
    if new.image is None:
        return new
    digest = await service.originals.put(new.image)
    return replace(new, item=replace(new.item, source=new.item.source or source_of(digest)))

"""Images and vectors of one request into a collection.

Each item is checked as far as that goes without a network, images go through it together, those of collections that
keep them are stored, and what is good is written in one call. An item's fault stays its own (`on_error`).
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from model.pooling import width
from service.data_urls import image_from_text
from service.errors import CollectionNotFound, InvalidRequest, ItemError, ModelMismatch
from service.features.pipeline import Embedded
from service.options import check_fields, parse_options
from service.originals import source_of
from service.outcomes import OnError, Outcome, indexed, split_items, successes
from service.schemas import ItemIn
from service.search.checks import check_id, check_match, check_source, metadata_text, normalised
from service.search.store import CollectionInfo, CollectionSpec, Item
from service.state import Service
from service.tags import tag_parts
from service.timings import slowest

_NO_VECTOR: Final = np.empty(0, np.float32)


@dataclass(frozen=True)
class NewItem:
    """An item as it was sent. Until its image has been through the network its vector is the empty one."""

    item: Item
    image: bytes | None = None
    fingerprint: str | None = None  # that the vector is said to be of
    embedded: Embedded | None = None


@dataclass(frozen=True)
class Added:
    """What became of the items: the ids of those that were written, by index, and the errors of the others; the
    collection as it is now; milliseconds by stage."""

    collection: CollectionInfo
    ids: dict[int, str]
    errors: list[ItemError]
    timings: dict[str, float]


async def add_items(
    service: Service, name: str, items: Sequence[Outcome[NewItem]], on_error: OnError, request_key: str | None = None
) -> Added:
    """Write items; the first write makes the collection. A second call with the same `request_key` changes nothing.

    Raises:
        InvalidItems: some cannot be written and `on_error` is "fail", or none can; nothing is written.
        ModelMismatch, QueueFull and other ServiceErrors: of the request as a whole; nothing is written.
    """
    collection = await _target(service, name)
    good, errors = split_items(await _ready(service, collection, items), on_error, "items")
    info = await service.store.upsert(
        collection.name, [new.item for _, new in good], tag=collection.tag, request_key=request_key
    )
    timings = slowest(new.embedded for _, new in good if new.embedded is not None)
    return Added(info, {index: new.item.id for index, new in good}, errors, timings)


def item_from_json(index: int, raw: Any, max_image_bytes: int) -> NewItem:
    """One of a body's `items`, checked as far as that goes without a store or a network.

    Raises:
        ServiceError: what is wrong with it.
    """
    if not isinstance(raw, dict):
        raise InvalidRequest(f"items.{index}: an item is an object, not {type(raw).__name__}")
    check_fields(raw, f"items.{index}")
    sent = parse_options(ItemIn, raw)
    if (sent.image is None) == (sent.vector is None):
        raise InvalidRequest("an item has either an image or a vector")
    if sent.image is not None:
        if sent.fingerprint is not None:
            raise InvalidRequest("fingerprint goes with a vector: images go through the model that is served")
        return _image_item(image_from_text(sent.image, max_image_bytes), sent.id, sent.metadata, sent.source)
    if sent.id is None:
        raise InvalidRequest("an item with a vector needs an id")
    item = Item(sent.id, normalised(sent.vector or []), sent.metadata, sent.source)
    return NewItem(_checked(item), fingerprint=sent.fingerprint)


def item_from_file(image: bytes, filename: str) -> NewItem:
    """An uploaded file: its id is the content's sha256.

    Raises:
        InvalidRequest: its name cannot be kept.
    """
    return _image_item(image, None, {"filename": filename} if filename else {}, None)


def _image_item(image: bytes, item_id: str | None, metadata: dict[str, Any], source: str | None) -> NewItem:
    digest = hashlib.sha256(image).hexdigest()
    return NewItem(_checked(Item(item_id or digest, _NO_VECTOR, metadata, source, digest)), image)


def _checked(item: Item) -> Item:
    """The item, unless the store would refuse what stands beside the vector: known before any work is done."""
    check_id(item.id)
    metadata_text(item.metadata)
    return check_source(item)


async def _target(service: Service, name: str) -> CollectionInfo:
    """The collection that is written to; one that does not exist, as the first write will make it."""
    try:
        return await service.store.info(name)
    except CollectionNotFound:
        return CollectionInfo(name, CollectionSpec(service.tag(), service.pipeline.dims), 0)


async def _ready(
    service: Service, collection: CollectionInfo, sent: Sequence[Outcome[NewItem]]
) -> list[Outcome[NewItem]]:
    """The items as they can be written: images through the network, and stored if the collection keeps them.

    Raises:
        ModelMismatch: there are images only, and the collection holds vectors of another model.
        QueueFull, ShuttingDown, ModelUnavailable: nothing was begun.
    """
    readable = successes(sent)
    if readable and all(new.image is not None for new in readable):
        _check_images_fit(service, collection)
    fitting = [outcome.then(_fitting, service, collection) for outcome in sent]
    images = [Outcome(index, new.image) for index, new in indexed(fitting) if new.image is not None]
    embedded = {outcome.index: outcome for outcome in (await service.pipeline.embed(images) if images else [])}
    ready = [outcome.then(_with_vector, collection, embedded.get(outcome.index)) for outcome in fitting]
    if not collection.spec.originals:
        return ready
    return await asyncio.gather(*(outcome.then_await(_stored, service) for outcome in ready))


def _check_images_fit(service: Service, collection: CollectionInfo) -> None:
    """Refuse images whose vectors may not stand in this collection.

    Raises:
        ModelMismatch: it holds vectors of another model, or of none.
    """
    pooling = tag_parts(collection.tag).pooling
    if pooling is None:
        raise ModelMismatch(
            f"collection {collection.name!r} holds vectors of {collection.tag!r}, which no image gives here"
        )
    dimension = width(pooling, service.pipeline.dims)
    check_match(collection, tag=service.tag(pooling=pooling), dimension=dimension)


def _fitting(new: NewItem, service: Service, collection: CollectionInfo) -> NewItem:
    """The item, if its vector may stand beside those of the collection."""
    if new.image is not None:
        _check_images_fit(service, collection)
        return new
    if new.fingerprint not in (None, tag_parts(collection.tag).fingerprint):
        raise ModelMismatch(
            f"collection {collection.name!r} holds vectors of {collection.tag!r}; this one is of {new.fingerprint!r}: "
            "they cannot be compared (PUT makes a collection for vectors of another model)"
        )
    check_match(collection, tag=collection.tag, dimension=len(new.item.vector))
    return new


def _with_vector(new: NewItem, collection: CollectionInfo, outcome: Outcome[Embedded] | None) -> NewItem:
    """With the vector that the collection holds of an image; an item that came with a vector is as it was."""
    if outcome is None:
        return new
    pooling = tag_parts(collection.tag).pooling
    assert pooling is not None, "images were refused"
    embedded = outcome.result()
    vector = normalised(embedded.vector(pooling, True))
    return replace(new, item=replace(new.item, vector=vector), embedded=embedded)


async def _stored(new: NewItem, service: Service) -> NewItem:
    """With its image stored, before its vector is written: no item ever leads to an image that is not there."""
    if new.image is None:
        return new
    digest = await service.originals.put(new.image)
    return replace(new, item=replace(new.item, source=new.item.source or source_of(digest)))

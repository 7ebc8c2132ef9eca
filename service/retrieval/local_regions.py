"""Find a marked region in a collection without a server. Commands and Python programs use this module.

from service.retrieval.local_regions import find_region

answer = find_region("shop", [{"image": "a.jpg", "box": [120, 80, 200, 160]}])
answer["data"][0]["box"]
"""

import asyncio
import base64
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.artifact import Artifact, load_artifact
from model.engines.choice import load_engine
from model.engines.protocol import Engine
from service.artifact_choice import artifact_with, choose_artifact
from service.assembly import opened_service
from service.errors import NotFound
from service.features.cache import MemoryCache
from service.features.images import decode
from service.features.pipeline import PipelineLimits
from service.originals import photo_digest
from service.rankings import request_hash
from service.retrieval.find_region import FoundRegion, FoundRegions
from service.retrieval.find_region import find_region as find_in_collection
from service.retrieval.region_answers import answer_fields, read_request
from service.retrieval.region_schemas import FindRegionAnswer
from service.search.opening import open_store
from service.search.store import VectorStore
from service.settings import Settings, load_settings
from service.state import Service
from service.tags import tag_parts
from service.timings import ms_since
from service.vision.mask import coco_rle_decode, coco_rle_encode, overlay_png


class Answered(NamedTuple):
    """The answer of the endpoint, and the results from which it was made."""

    answer: FindRegionAnswer
    found: FoundRegions


def find_region(
    collection: str,
    references: Sequence[Mapping[str, Any]],
    *,
    model: str = "auto",
    data_dir: Path | str = Path("data"),
    engine: str = "auto",
    threads: int | None = None,
    **options: Any,
) -> FindRegionAnswer:
    """Find a region in the images of a collection, and return the answer of the endpoint. Missing patch features are
    computed without a time limit.

    Args:
        collection: name or alias of a collection that stores its images.
        references: the references of the endpoint. `image` is the path of a file, or the bytes of an encoded image.
            `mask` can also be an array, bool [H, W].
        model: an artifact folder, a model's name, or auto (the model that computed the collection's vectors).
        data_dir: the data folder.
        engine: the engine, as for `dinov2 serve`.
        threads: the number of CPU threads for a forward pass. If None, all CPUs are used.
        options: other fields of the request, for instance `filter`, `candidates`, `min_score` and `limit`.

    Raises:
        ServiceError: the collection does not exist or stores no images, or a reference or an option is invalid.
        ValueError, OSError, ModuleNotFoundError: a file, the store or the model cannot be read.
    """
    settings = load_settings({"data_dir": Path(data_dir), "threads": threads})
    if settings.vector_store == "embedded" and not (settings.data_dir / "search.sqlite3").exists():
        raise ValueError(f"no vector store in {settings.data_dir}")

    async def work() -> FindRegionAnswer:
        store = await open_store(settings)
        try:
            tag = (await store.info(collection)).tag
            path = artifact_with(tag_parts(tag).fingerprint, settings.data_dir) if model == "auto" else None
            path = path or choose_artifact(model, settings.data_dir)
            artifact = load_artifact(path, derived_dir=settings.data_dir / "derived")
            loaded = load_engine(artifact, engine, threads=threads)
            async with local_service(settings, artifact, loaded, store) as service:
                return (await find_in_service(service, collection, references, options)).answer
        finally:
            await store.close()

    with ThreadPoolExecutor(1) as thread:  # a notebook has an event loop in its own thread
        return thread.submit(asyncio.run, work()).result()


def local_service(
    settings: Settings, artifact: Artifact, engine: Engine, store: VectorStore
) -> AbstractAsyncContextManager[Service]:
    """Open a service for this process alone, without a cache of vectors."""
    return opened_service(settings, artifact, engine, store, cache=MemoryCache(0))


async def find_in_service(
    service: Service, collection: str, references: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> Answered:
    """Find a region, and return the answer and the results. The arguments are those of `find_region`.

    Raises:
        ServiceError: as `find_region`.
        OSError: the file of a reference cannot be read.
    """
    started = time.perf_counter()
    fields = {**options, "references": [_as_sent(reference) for reference in references]}
    request, where = read_request(fields)
    found = await find_in_collection(service, collection, request, where, request_hash(fields), math.inf)
    return Answered(answer_fields(service, collection, found, {"total": ms_since(started)}), found)


async def region_overlay(service: Service, found: FoundRegion) -> bytes:
    """Return a PNG of the image of a result. The region is tinted, and everything else is dimmed.

    Raises:
        ServiceError: the image is no longer stored, or cannot be read.
    """
    digest = photo_digest(found.item)
    if digest is None:
        raise NotFound(f"the image of item {found.item.id[:80]!r} is not stored")
    image = decode(await service.originals.get(digest), PipelineLimits.of(service.settings).decode)
    return overlay_png(image, coco_rle_decode(found.segmentation))


def _as_sent(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reference as it is sent to the endpoint."""
    fields = dict(reference)
    image, mask = fields.get("image"), fields.get("mask")
    if isinstance(image, str | Path):
        image = Path(image).read_bytes()
    if isinstance(image, bytes):
        fields["image"] = f"data:application/octet-stream;base64,{base64.b64encode(image).decode()}"
    if isinstance(mask, np.ndarray):
        fields["mask"] = coco_rle_encode(mask)
    return fields

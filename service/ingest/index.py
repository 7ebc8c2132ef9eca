"""Embed images from any source and add them to a collection, without a server: the command `dinov2 index`.

    source ─▶ feed thread: is it indexed already? ─▶ decode threads, two batches ahead ─▶ engine thread
           ─▶ event loop: writes in groups, one at a time, while the next batches are embedded

While the engine embeds a batch, other threads list the sources, query the store and decode the next images, and the
event loop writes finished items. So the engine usually waits only for decoded images. At most two batches of decoded
images wait for the engine and two groups of items wait to be written, so memory does not grow with the number of
images.

If an image's id is in the collection, the image is skipped and its file is not read, unless the file has changed. To
detect changes, the size, time and etag of the file are stored in the item's metadata under `_file`. Therefore, if a run
was interrupted, it can be repeated, and images that are already in the collection are not embedded again. If the id
belongs to an item that was made from another file, the item is not replaced, and a problem is reported.
"""

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from model.artifact import Artifact
from model.decode import DEFAULT_LIMITS, DecodeLimits
from model.engines.protocol import Engine
from model.pooling import DEFAULT_POOLING, Pooling
from model.preprocess import preprocess
from service.errors import BrokenImage, CollectionNotFound, Conflict, InvalidRequest, ModelMismatch, StorageFailed
from service.features.images import decode
from service.features.patches import Patches
from service.ingest.embed import FloatArray, load_ahead, pooled, vector_dims
from service.ingest.folders import Photo, Problem, Stamp
from service.outcomes import Outcome, attempt
from service.search.checks import check_id, check_source, metadata_text
from service.search.store import CollectionInfo, CollectionSpec, Item, VectorStore
from service.tags import make_tag, tag_parts

STAMP_KEY: Final = "_file"
"""The metadata key under which the size, time and etag of an item's file are stored."""
MAX_LISTED: Final = 1000
"""The maximum number of problems in a report. `on_problem` is called for every problem, even beyond this number."""
_WRITE_ITEMS: Final = 256
_WRITE_S: Final = 1.0
_STOP_S: Final = 0.1  # how soon a waiting thread notices that the run ends
_CHECK_ITEMS: Final = 256
_CHECK_BYTES: Final = 64 * 2**20
_HELD_BYTES: Final = 256 * 2**20
"""The limit of the bytes of images that were read in advance and are not decoded yet. Images in a compressed tar are
read in advance."""


@dataclass(frozen=True)
class IndexOptions:
    """The options of one call to `index_photos`."""

    pooling: Pooling = DEFAULT_POOLING
    batch_size: int = 16
    workers: int | None = None  # number of decode threads; None means one per CPU
    id_by: Literal["path", "sha256"] = "path"
    force: bool = False  # whether to index images that are already in the collection
    originals: bool = False  # whether a new collection stores images
    metadata: Mapping[str, Any] = field(default_factory=dict)  # added to every item; overrides the image's metadata
    limits: DecodeLimits = DEFAULT_LIMITS


@dataclass
class IndexReport:
    """The progress or the result of a run. Each image is counted once: as `indexed` if it was written, as `present` if
    it was skipped because it is in the collection already, or as `failed`."""

    indexed: int = 0
    present: int = 0
    failed: int = 0
    problems: list[Problem] = field(default_factory=list)  # only the first MAX_LISTED problems
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def images_per_s(self) -> float:
        return self.indexed / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class IndexHooks:
    """The stop event and the callbacks of a run.

    stop: an event that ends the run early. The run finishes the batch that is being embedded, writes it and ends.
    keep: an async function that stores the bytes of an image. It is called before the image's item is written.
    keep_patches: a function that stores the patch features of the images of a batch, by digest. The engine's thread
        calls it.
    on_problem: a function that is called with each problem, from any thread of the run.
    on_progress: a function that is called with the report after each change, from any thread of the run.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    keep: Callable[[bytes], Coroutine[Any, Any, object]] | None = None
    keep_patches: Callable[[Mapping[str, Patches]], None] | None = None
    on_problem: Callable[[Problem], None] = lambda _: None
    on_progress: Callable[[IndexReport], None] = lambda _: None


def vector_tag(artifact: Artifact, engine: Engine, pooling: Pooling) -> str:
    """Return the tag of the vectors that this model computes with this engine and pooling. A tag is a string that
    describes how vectors were computed. Only vectors with the same tag can be compared."""
    return make_tag(artifact.fingerprint, pooling, artifact.manifest.input_size, engine.precision)


def pooling_of(info: CollectionInfo) -> Pooling:
    """Return the pooling with which a collection's vectors were made. The pooling is read from the collection's tag.

    Raises:
        Conflict: the tag was not made by this service, so the pooling is unknown.
    """
    pooling = tag_parts(info.tag).pooling
    if pooling is None:
        raise Conflict(f"collection {info.name!r} has the tag {info.tag!r}, which no local model makes")
    return pooling


async def index_photos(
    images: Iterable[Photo | Problem],
    store: VectorStore,
    collection: str,
    artifact: Artifact,
    engine: Engine,
    options: IndexOptions,
    hooks: IndexHooks | None = None,
) -> IndexReport:
    """Embed images, write them to a collection and return a report. If the collection does not exist, the first write
    creates it.

    Args:
        images: the images and problems that `service.ingest.sources.find_photos` yields. They are consumed in a
            separate thread.

    Raises:
        ModelMismatch: the collection contains vectors from another model.
        StorageFailed: the store failed. This error ends the run, as does any error that the engine or `images` raises.
            Items that are already written remain in the collection.
    """
    run = _Run(store, collection, artifact, engine, options, hooks or IndexHooks())
    await run.check()
    return await run.go(images)


class _Origin(NamedTuple):
    """The file of an image that is being indexed. Unlike a `Photo`, it does not keep the image's bytes in memory."""

    source: str
    stamp: Stamp | None


@dataclass
class _Task:
    """An image to read and decode. Afterwards, `photo` is removed, because it may keep the image's bytes in memory."""

    id: str
    source: str
    photo: Photo | None


@dataclass(frozen=True)
class _Ready:
    """An image that is decoded and ready to be embedded, with the id, digest and metadata of its item."""

    source: str
    item_id: str
    digest: str
    metadata: Mapping[str, Any]
    pixels: FloatArray  # [3, h, w]
    size: tuple[int, int]  # H, W of the upright image


class _Held:
    """Counts the bytes of images in memory, and makes the thread that reads more of them wait for room."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._change = threading.Condition()

    def add(self, size: int, stop: threading.Event) -> None:
        """Wait until there is room for `size` bytes, or until `stop` is set, and count them. An image that is larger
        than the limit waits until it is the only one."""
        with self._change:
            while size and self._size and self._size + size > self._limit and not stop.is_set():
                self._change.wait(_STOP_S)
            self._size += size

    def remove(self, size: int) -> None:
        with self._change:
            self._size -= size
            self._change.notify_all()


@dataclass
class _Run:
    """The state of one run. A lock protects the fields that several threads change."""

    store: VectorStore
    collection: str
    artifact: Artifact
    engine: Engine
    options: IndexOptions
    hooks: IndexHooks
    report: IndexReport = field(default_factory=IndexReport)
    lock: threading.Lock = field(default_factory=threading.Lock)
    under_way: dict[str, _Origin] = field(default_factory=dict)  # images that are being indexed, by item id
    held: "_Held" = field(default_factory=lambda: _Held(_HELD_BYTES))
    exists: bool = True  # whether the collection exists
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.tag = vector_tag(self.artifact, self.engine, self.options.pooling)
        self.loop = asyncio.get_running_loop()

    async def check(self) -> None:
        try:
            info = await self.store.info(self.collection)
        except CollectionNotFound:
            self.exists = False
            return
        if info.tag != self.tag:
            raise ModelMismatch(
                f"collection {info.name!r} contains vectors of {info.tag!r}; this model makes {self.tag!r}: they "
                "cannot be compared"
            )

    async def go(self, images: Iterable[Photo | Problem]) -> IndexReport:
        """Index the images and return the report. One thread embeds the images in batches. This coroutine runs on the
        event loop and writes the embedded items in groups."""
        batches = self._embedded(images)
        thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        upcoming = self.loop.run_in_executor(thread, next, batches, None)
        writing: asyncio.Task[None] | None = None
        pending: list[Item] = []
        last_write = time.perf_counter()
        try:
            while (items := await asyncio.shield(upcoming)) is not None:
                upcoming = self.loop.run_in_executor(thread, next, batches, None)
                pending += items
                if len(pending) >= _WRITE_ITEMS or time.perf_counter() - last_write >= _WRITE_S:
                    if writing is not None:
                        await asyncio.shield(writing)
                    writing = asyncio.create_task(self._write(pending))
                    pending, last_write = [], time.perf_counter()
        finally:
            self.hooks.stop.set()  # after an error or a cancellation, the threads finish their current work and end
            await asyncio.gather(*filter(None, [writing]), upcoming, return_exceptions=True)
            await self.loop.run_in_executor(thread, batches.close)
            thread.shutdown()
        if writing is not None:
            await writing
        await self._write(pending)
        self.report.seconds = time.perf_counter() - self.started
        return self.report

    # ---- feed thread

    def _wanted(self, images: Iterable[Photo | Problem]) -> Iterator[Photo]:
        """Yield the images that must be read, leaving out those that the collection already contains. One query to the
        store covers a group of images. The first groups are small, so that decoding begins early."""
        unchecked: list[Photo] = []
        size = self.options.batch_size
        for image in images:
            if self.hooks.stop.is_set():
                self.report.interrupted = True
                return
            if isinstance(image, Problem):
                self._fail(image)
                continue
            if self.options.id_by == "sha256":  # the id is not known until the image is read
                yield image
                continue
            try:
                check_id(image.id)
            except InvalidRequest as error:
                self._fail(Problem(image.source, f"{error.detail}; --id sha256 accepts any path"))
                continue
            unchecked.append(image)
            if len(unchecked) >= size or sum(photo.held_bytes for photo in unchecked) > _CHECK_BYTES:
                yield from self._not_present(unchecked)
                unchecked, size = [], min(2 * size, _CHECK_ITEMS)
        yield from self._not_present(unchecked)

    def _not_present(self, unchecked: Sequence[Photo]) -> Iterator[Photo]:
        """Yield the images of a group that are new or have changed. Count the unchanged images in the report. Report a
        problem for each image if its id belongs to another file."""
        with self.lock:  # read before the store is queried, so that no write in between is missed
            before = {photo.id: self.under_way[photo.id] for photo in unchecked if photo.id in self.under_way}
        held = self._held([photo.id for photo in unchecked])
        for photo in unchecked:
            with self.lock:
                other = before.get(photo.id) or self.under_way.get(photo.id)
            if other is not None:
                verdict = self._compare(photo, other.stamp, other.source)
            elif photo.id in held:
                verdict = self._compare(photo, held[photo.id].metadata.get(STAMP_KEY), held[photo.id].source)
            else:
                verdict = "new"
            if verdict == "same":
                self._count(present=1)
            elif verdict == "new":
                with self.lock:
                    self.under_way[photo.id] = _Origin(photo.source, photo.stamp)
                yield photo
            else:
                self._fail(Problem(photo.source, f"its id {photo.id!r} belongs to {verdict}; --force replaces it"))

    def _compare(self, photo: Photo, stamp: Any, source: str | None) -> str:
        """Compare an image with the item, or the image that is being indexed, that already has this id. `stamp` and
        `source` describe the file of that item or image. Return "same" if the file is unchanged and "new" if the image
        must be indexed. If the id belongs to another file, return the source of that file."""
        if self.options.force:
            return "new"
        if photo.stamp is None or not isinstance(stamp, Mapping):
            return "same" if source in (None, photo.source) else source
        if dict(stamp) == dict(photo.stamp):
            return "same"
        return "new" if source in (None, photo.source) else source

    def _held(self, ids: Sequence[str]) -> dict[str, Item]:
        """Return the items of the collection that have these ids, as a dict by id. This method blocks, so it must not
        be called on the event loop."""
        if not ids or not self.exists:
            return {}
        items = asyncio.run_coroutine_threadsafe(self.store.get(self.collection, list(ids)), self.loop).result()
        return {item.id: item for item in items if item is not None}

    # ---- decode threads

    def _tasks(self, photos: Iterable[Photo]) -> Iterator[_Task]:
        """Yield a task for each image. Wait while too many bytes of images are in memory."""
        for photo in photos:
            self.held.add(photo.held_bytes, self.hooks.stop)
            yield _Task(photo.id, photo.source, photo)

    def _load(self, task: _Task) -> Outcome[_Ready | None]:
        """Read and decode an image. The outcome contains the decoded image, or the error if the image cannot be read.
        It contains None if `id_by` is "sha256" and the same content is already in the collection or is being
        indexed."""
        photo, task.photo = task.photo, None
        assert photo is not None
        try:
            loaded = attempt(0, self._read, photo)
        finally:
            self.held.remove(photo.held_bytes)
        if isinstance(loaded.error, StorageFailed):  # a failure of the store affects every image
            raise loaded.error
        return loaded

    def _read(self, photo: Photo) -> _Ready | None:
        try:
            data, metadata = photo.load()
            digest = hashlib.sha256(data).hexdigest()
            by_content = self.options.id_by == "sha256"
            if by_content and not self.options.force and self._is_here(digest):
                return None
            metadata = {**metadata, **self.options.metadata}
            metadata.pop(STAMP_KEY, None)
            if photo.stamp is not None:
                metadata[STAMP_KEY] = dict(photo.stamp)
            metadata_text(metadata)
            item_id = digest if by_content else photo.id
            check_source(Item(item_id, np.zeros(0, np.float32), source=photo.source))
            image = decode(data, self.options.limits)
            pixels = preprocess(image, self.artifact.manifest.preprocess)
            if self.hooks.keep is not None:
                asyncio.run_coroutine_threadsafe(self.hooks.keep(data), self.loop).result()
        except (OSError, ValueError, ImportError) as error:
            raise BrokenImage(str(error)) from error
        if by_content:
            with self.lock:
                origin = _Origin(photo.source, photo.stamp)
                if self.under_way.setdefault(digest, origin) is not origin:
                    return None
        return _Ready(photo.source, item_id, digest, metadata, pixels, (image.shape[0], image.shape[1]))

    def _is_here(self, digest: str) -> bool:
        """Return whether an image with this sha256 is in the collection or is being indexed."""
        with self.lock:
            if digest in self.under_way:
                return True
        return bool(self._held([digest]))

    # ---- engine thread

    def _embedded(self, images: Iterable[Photo | Problem]) -> Generator[list[Item], None, None]:
        size = self.options.batch_size
        workers = self.options.workers
        tasks = self._tasks(self._wanted(images))
        loaded = load_ahead(tasks, self._load, ahead=max(2 * size, workers or 0), workers=workers)
        ready: list[_Ready] = []
        try:
            for task, outcome in loaded:
                if outcome.error is not None:
                    self._fail(Problem(task.source, outcome.error.detail), task.id)
                elif outcome.value is None:
                    self._count(present=1)
                else:
                    ready.append(outcome.value)
                if len(ready) == size:
                    yield self._items(ready)
                    ready = []
                if self.hooks.stop.is_set():
                    self.report.interrupted = True
                    break
            if ready and not self.hooks.stop.is_set():
                yield self._items(ready)
        finally:
            loaded.close()

    def _items(self, ready: Sequence[_Ready]) -> list[Item]:
        features = self.engine.run(np.stack([image.pixels for image in ready]))
        vectors = pooled(features, self.options.pooling, True)
        if self.hooks.keep_patches is not None:
            _, height, width = ready[0].pixels.shape
            side, sizes = self.artifact.manifest.config.patch_size, [image.size for image in ready]
            packed = zip(ready, Patches.of_batch(features.patches, (height, width), side, sizes), strict=True)
            self.hooks.keep_patches({image.digest: patches for image, patches in packed if patches is not None})
        items = []
        for image, vector in zip(ready, vectors, strict=True):
            if np.isfinite(vector).all() and vector.any():
                items.append(Item(image.item_id, vector, image.metadata, image.source, image.digest))
            else:
                self._fail(Problem(image.source, "the engine's features are not finite"), image.item_id)
        return items

    # ---- event loop

    async def _write(self, items: Sequence[Item]) -> None:
        if not items:
            return
        if not self.exists:
            spec = CollectionSpec(
                self.tag, vector_dims(self.artifact, self.options.pooling), originals=self.options.originals
            )
            await self.store.create(self.collection, spec)
            self.exists = True
        try:
            await self.store.upsert(self.collection, items, tag=self.tag)
        except InvalidRequest as error:  # an item exceeds a limit of the store: find it by writing one at a time
            if len(items) == 1:
                self._fail(Problem(items[0].source or items[0].id, error.detail), items[0].id)
                return
            for item in items:
                await self._write([item])
            return
        with self.lock:
            for item in items:
                self.under_way.pop(item.id, None)
        self._count(indexed=len(items))

    # ---- any thread

    def _fail(self, problem: Problem, item_id: str | None = None) -> None:
        with self.lock:
            self.report.failed += 1
            if len(self.report.problems) < MAX_LISTED:
                self.report.problems.append(problem)
            if item_id is not None:
                self.under_way.pop(item_id, None)
            self.hooks.on_problem(problem)
        self._count()

    def _count(self, *, indexed: int = 0, present: int = 0) -> None:
        with self.lock:
            self.report.indexed += indexed
            self.report.present += present
            self.report.seconds = time.perf_counter() - self.started
            self.hooks.on_progress(self.report)

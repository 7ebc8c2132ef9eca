"""Compute the features of images. The steps for an image are: look in the cache, decode, preprocess, wait for a batch,
run the engine, pool, and store the result in the cache.

An image is decoded and preprocessed in a thread before it is put into a batch, as soon as there is memory for its
pixels (service/features/decode_memory.py). So a damaged image never reaches the engine and does not affect other
images. If the queue has no room for all images of a request, none of them is decoded.

The cache does not store final vectors but their parts: the class token and the mean of the patch tokens, float32,
before normalisation. `pooling` and `normalize` are applied when an entry is used, so one entry serves every combination
of them. The key is computed from the sha256 of the image file, the model's fingerprint (weights, architecture, and
preprocessing with the input size) and the precision.

If several requests need the same image at the same time, it is computed once. This computation is called a flight. It
is a separate task, which all these requests await. The flight continues as long as at least one request waits for it,
so a client that disconnects does not affect the others. When no request waits any more, the flight is cancelled.
However, a decoding that has begun cannot be stopped, so the image occupies its place in the queue until the decoding
ends. `queue_full` errors and /readyz therefore reflect the true load.

Legend: B images in a batch, P parts (see model/pooling.py), D width of the model, N patches, R registers, H x W size of
the upright image (after EXIF rotation), h x w size of the network's input.
"""

import asyncio
import hashlib
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact
from model.decode import DecodeLimits, OnSize
from model.engines.protocol import Engine
from model.pooling import PARTS, Pooling, pool
from model.preprocess import PreprocessSpec, crop_box, output_size, preprocess
from service.clients import current_sender
from service.costs import current_cost
from service.errors import BrokenImage, InvalidRequest, ServiceError
from service.fair import FairSlots, FairThreads
from service.features.batch_limit import measured_limit, unmeasured_limit
from service.features.batcher import Batcher
from service.features.cache import Cache, cache_key
from service.features.decode_memory import MustWait, Reservation
from service.features.forward import Forward, Row
from service.features.images import Decoding, decode, forget_frames
from service.features.patch_cache import PatchCache, as_is, patches_key
from service.features.patch_store import PatchStore
from service.features.patches import Patches
from service.outcomes import Outcome, successes
from service.settings import Settings
from service.telemetry import Metrics
from service.tracing import RequestTrace, current_trace, record_stage

FloatArray = npt.NDArray[np.float32]

S = TypeVar("S")
T = TypeVar("T")

ANSWER_BYTES: Final = 16
"""Memory per pixel for an image that is analysed: 3 bytes are its pixels, and the others are masks and pictures of its
size."""
_HEAD = struct.Struct("<I")  # head of a cache entry: number of tokens; P * D floats follow


@dataclass(frozen=True)
class Embedded:
    """The parts of one image's features, in the order of `PARTS`: the class token and the mean of the patch tokens. The
    vector for any pooling is computed from these parts."""

    parts: FloatArray  # [P, D]
    tokens: int
    cached: bool = False
    timings: dict[str, float] = field(default_factory=dict)  # stage -> seconds
    patches: Patches | None = None  # if they were asked for, and are not on disk yet

    def vector(self, pooling: Pooling, normalize: bool) -> FloatArray:
        """Return the vector for this pooling, float32 [width(pooling, D)]. If `normalize` is true, the vector is scaled
        to length 1. If the pooling joins several parts, `normalize` also scales each part to length 1 before they are
        joined."""
        unit = _unit if normalize else _as_is
        parts = dict(zip(PARTS, self.parts, strict=True))
        return unit(pool(parts, pooling, unit=unit, join=np.concatenate))

    def to_bytes(self) -> bytes:
        return _HEAD.pack(self.tokens) + self.parts.astype("<f4").tobytes()

    @staticmethod
    def from_bytes(data: bytes, dims: int) -> "Embedded | None":
        """Parse a cache entry and return it. Return None if the entry is invalid, that is, if a part is missing or does
        not have `dims` finite numbers. A cache that several services share may contain invalid entries."""
        if len(data) != _HEAD.size + 4 * len(PARTS) * dims:
            return None
        parts = np.frombuffer(data, dtype="<f4", offset=_HEAD.size).astype(np.float32).reshape(len(PARTS), dims)
        if not np.isfinite(parts).all():
            return None
        return Embedded(parts, _HEAD.unpack_from(data)[0], cached=True)


@dataclass(frozen=True)
class Analysed:
    """One decoded image, and all the features that one forward pass computes from it.

    `spec` is the preprocessing of the image. `outputs` contains the inner outputs that the caller asked for, keyed by
    name.
    """

    embedded: Embedded
    patches: FloatArray  # [N, D]
    registers: FloatArray  # [R, D]
    grid: tuple[int, int]  # patches down, patches across
    image: npt.NDArray[np.uint8]  # [H, W, 3]
    spec: PreprocessSpec
    outputs: Mapping[str, FloatArray] = field(default_factory=dict)  # each [T, D]

    @property
    def size(self) -> tuple[int, int]:
        """The size of the upright image in pixels, (H, W)."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def crop_box(self) -> tuple[float, float, float, float]:
        """The part of the image that the network sees, (x, y, width, height) in pixels."""
        return crop_box(*self.size, self.spec)


@dataclass(frozen=True)
class View:
    """Says what `Pipeline.analyse` computes from an image. `outputs` are the names of the inner outputs to compute (see
    `model/engines/protocol.py`). `spec` is the preprocessing. If it is None, the artifact's own is used, and the
    embedding is cached."""

    outputs: tuple[str, ...] = ()
    spec: PreprocessSpec | None = None


PLAIN: Final = View()


class _Decoded(NamedTuple):
    pixels: FloatArray  # [3, h, w]
    image: npt.NDArray[np.uint8] | None
    size: tuple[int, int]  # H, W
    memory: Reservation  # of `image`
    started: float  # of `time.perf_counter()`
    decode_s: float
    preprocess_s: float


@dataclass
class _Flight:
    """A running computation of one image's features, the number of requests that await it, and the trace of the request
    that started it."""

    task: "asyncio.Task[Embedded]"
    waiters: int = 0
    with_patches: bool = False  # whether a request needs the patch features too
    trace: RequestTrace | None = field(default_factory=current_trace)


@dataclass(frozen=True)
class PipelineLimits:
    """The limits of a pipeline. `Settings` describes them."""

    decode: DecodeLimits
    decode_workers: int
    batch_max_patches: int | None
    queue_max_images: int
    queue_max_patches: int
    hang_timeout_s: float
    client_share: float = 1.0
    patch_cache_bytes: int = 0
    max_input_patches: int = 4096

    @staticmethod
    def of(settings: Settings) -> "PipelineLimits":
        return PipelineLimits(
            decode=DecodeLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels),
            decode_workers=settings.decode_workers,
            batch_max_patches=settings.batch_max_patches,
            queue_max_images=settings.queue_max_images,
            queue_max_patches=settings.queue_max_patches,
            hang_timeout_s=settings.hang_timeout_s,
            client_share=settings.client_share,
            patch_cache_bytes=settings.patch_cache_bytes,
            max_input_patches=settings.max_input_patches,
        )


class Pipeline:
    """A pipeline that computes the features of images and caches them. It must be created and closed on the event
    loop's thread.

    `open_general` opens an engine for the images that `engine` cannot run (see `service/features/forward.py`).
    `patch_store` keeps patch features on disk. Several pipelines may share `decoding`,
    which the caller closes.
    """

    def __init__(
        self,
        artifact: Artifact,
        engine: Engine,
        cache: Cache,
        metrics: Metrics,
        limits: PipelineLimits,
        open_general: Callable[[], Engine] | None,
        patch_store: PatchStore,
        decoding: Decoding,
    ) -> None:
        self.artifact = artifact
        self.engine = engine
        self.cache = cache
        self.decoding = decoding
        self.dims = artifact.manifest.config.embed_dim
        self._spec = artifact.manifest.preprocess
        self._patch_size = artifact.manifest.config.patch_size
        self._decode_limits = limits.decode
        self._max_input_patches = limits.max_input_patches
        self._measures_batches = limits.batch_max_patches is None
        self._forward = Forward(engine, open_general)
        self._metrics = metrics
        self._hits, self._misses = metrics.cache_hits.labels(cache.name), metrics.cache_misses.labels(cache.name)
        metrics.decode_workers.set(limits.decode_workers)
        self._loop = asyncio.get_running_loop()
        self._flights: dict[str, _Flight] = {}
        self._decoders = FairThreads(limits.decode_workers, "decode")
        self._answerers = FairThreads(limits.decode_workers, "answer")
        self._encoders = FairThreads(limits.decode_workers, "encode")
        self._hasher = FairThreads(1, "hash")  # its own thread, so cached images do not wait for decoding
        self._kept_images = FairSlots(limits.decode_workers)  # see `analyse`
        in_thread = partial(self._in_thread, self._answerers)
        self.patch_cache = PatchCache(self._patches_key, limits.patch_cache_bytes, patch_store, in_thread, metrics)
        self.batcher: Batcher[Row] = Batcher(
            self._forward,
            patch_size=self._patch_size,
            batch_max_patches=limits.batch_max_patches or unmeasured_limit(engine, artifact),
            queue_max_images=limits.queue_max_images,
            queue_max_patches=limits.queue_max_patches,
            metrics=metrics,
            hang_timeout_s=limits.hang_timeout_s,
            client_share=limits.client_share,
            probe=lambda: self._forward(self._zeros()[None]),
        )

    async def embed(self, images: Sequence[Outcome[bytes]], *, with_patches: bool = False) -> list[Outcome[Embedded]]:
        """Compute the features of one request's images, or take them from the cache. For each image, in order, return
        its features or its error. If `with_patches` is true, the features include the patch features, unless the store
        on disk has them. The caller writes them to the store. Images whose vectors are cached but whose patch features
        are not stored are computed again.

        An image that already has an error keeps this error. Each returned outcome has the same index as the outcome in
        `images`.

        Raises:
            QueueFull, ShareUsed, ShuttingDown, ModelUnavailable: the queue does not accept the images. No image was
                decoded.
        """
        keys = await self._keys(images)
        by_key = {key.result(): image.result() for key, image in zip(keys, images, strict=True) if key.error is None}
        with_patches = with_patches and self.patch_cache.is_on_disk
        cached = await self._from_cache(list(by_key))
        if with_patches and cached:
            cached = await self._with_stored_patches(cached, by_key)
        missing = {key: image for key, image in by_key.items() if key not in cached}
        computed = await self._compute_all(missing, with_patches)

        def embedded(key: str) -> Embedded:
            return cached[key] if key in cached else computed[key].result()

        outcomes = [key.then(embedded) for key in keys]
        self._metrics.count_failed(outcomes)
        return outcomes

    async def analyse(self, image: bytes, answer: Callable[[Analysed], T], view: View = PLAIN) -> T:
        """Compute all features of one image. Then call `answer` in a thread, with the decoded image and its features,
        and return its result. The class token and the mean of the patch tokens are also cached, unless `view` asks for
        another preprocessing than the artifact's.

        The decoded image stays in memory until `answer` returns. To limit memory, the number of images that are
        analysed at the same time is at most the number of decoding threads. Further images wait and are decoded later.

        Raises:
            ServiceError: the image cannot be decoded, the queue is full, the engine failed, or `answer` raised a
                ServiceError.
        """
        [outcome] = await self.analyse_all([Outcome(0, image)], answer, view)
        return outcome.result()

    async def analyse_all(
        self, images: Sequence[Outcome[bytes]], answer: Callable[[Analysed], T], view: View = PLAIN
    ) -> list[Outcome[T]]:
        """Analyse several images, as `analyse` does. For each image, in order, return the result of `answer` or the
        image's error. An image that already has an error keeps it.

        Raises:
            QueueFull, ShareUsed, ShuttingDown, ModelUnavailable: the queue does not accept the images. No image was
                decoded.
        """

        def start(image: bytes) -> "asyncio.Task[T]":
            task = asyncio.create_task(self._analyse(image, answer, view))
            task.add_done_callback(partial(self._ended, current_sender.get().client))
            return task

        return await self._all(images, start)

    async def encode(self, work: Callable[[], T]) -> T:
        """Call `work`, which encodes the results of a request, in a thread, and return its result. The number of calls
        at the same time is at most the number of decoding threads, because a picture of a large image takes a lot of
        memory."""
        started = time.perf_counter()
        try:
            return await self._in_thread(self._encoders, work)
        finally:
            record_stage("encode", started, time.perf_counter())

    async def kept_patches(self, digests: Iterable[str]) -> dict[str, Patches]:
        """Return the cached patch features of the images with these digests, as a dict by digest. A digest is the
        sha256 of an image's bytes in hex. The dict has no entry for an image without cached patch features."""
        return await self.patch_cache.read(digests, as_is)

    async def patches(self, images: Sequence[Outcome[tuple[str, bytes]]]) -> list[Outcome[Patches]]:
        """Compute and cache the patch features of images. Each image is a pair: the sha256 of its bytes, and the bytes.
        For each image, in order, return its patch features or its error. An image that already has an error keeps this
        error.

        Raises:
            QueueFull, ShareUsed, ShuttingDown, ModelUnavailable: the queue does not accept the images. No image was
                decoded.
        """
        return await self._all(images, self._start_patches)

    async def _all(self, images: Sequence[Outcome[S]], start: "Callable[[S], asyncio.Task[T]]") -> "list[Outcome[T]]":
        """Reserve a place in the queue for each image, start a task for each, and wait for all tasks."""
        self.batcher.reserve(sum(image.error is None for image in images), current_sender.get().client)
        outcomes = [image.then(start) for image in images]
        tasks = successes(outcomes)
        try:
            if tasks:
                await asyncio.wait(tasks)
            results = [outcome.then(_result) for outcome in outcomes]
            self._metrics.count_failed(results)
            return results
        finally:
            for task in tasks:
                task.cancel()  # the caller was cancelled

    async def warm_up(self) -> None:
        """Run one forward pass on zeros, so that the first request does not have to wait until the runtime is
        initialised. Then measure the largest batch, unless a setting gives it. Call this method before the pipeline is
        used."""
        await self._row(self._zeros())
        if self._measures_batches:
            limit = await asyncio.to_thread(measured_limit, self.engine, self.artifact, self._forward)
            self.batcher.batch_max_patches = limit

    def _zeros(self) -> FloatArray:
        """Return zeros of the input size, [3, h, w]."""
        return np.zeros((3, *self.artifact.manifest.input_size), np.float32)

    def forward_zeros(self, height: int, width: int) -> FloatArray:
        """Run one forward pass on zeros, and return the patch features [N, D]. Call this method in a worker thread, as
        it waits for the event loop.

        Raises:
            ServiceError: the forward pass failed, or the pipeline is closed.
        """
        return self.forward_pixels(np.zeros((3, height, width), np.float32)).patches

    def forward_pixels(self, pixels: FloatArray) -> Row:
        """Run one forward pass on pixels [3, h, w], and return its features. Call this method in a worker thread, as it
        waits for the event loop.

        Raises:
            ServiceError: the forward pass failed, or the pipeline is closed.
        """
        return asyncio.run_coroutine_threadsafe(self._row(pixels), self._loop).result()

    async def _row(self, pixels: FloatArray) -> Row:
        return (await self.batcher.submit(pixels)).row

    async def close(self) -> None:
        """Stop the pipeline. Images that are still in the queue fail with `ShuttingDown`."""
        self.batcher.close()
        self._forward.close()
        for threads in (self._decoders, self._answerers, self._encoders, self._hasher):
            threads.shutdown()
        await self.patch_cache.close()

    async def _keys(self, images: Sequence[Outcome[bytes]]) -> list[Outcome[str]]:
        """For each image, in order, return its cache key or its error. If the images exceed 256 KiB in total, they are
        hashed in a thread, so that hashing does not block the event loop."""

        def keys() -> list[Outcome[str]]:
            return [image.then(self._key) for image in images]

        size = sum(map(len, successes(images)))
        return keys() if size <= 2**18 else await self._in_thread(self._hasher, keys)

    def _key(self, image: bytes) -> str:
        digest = hashlib.sha256(image).hexdigest()
        return cache_key(digest, self.artifact.fingerprint, {"precision": self.engine.precision})

    def _patches_key(self, digest: str) -> str:
        return patches_key(digest, self.artifact.fingerprint, self.engine.precision)

    async def _from_cache(self, keys: list[str]) -> dict[str, Embedded]:
        started = time.perf_counter()
        cached: dict[str, Embedded] = {}
        for key, data in zip(keys, await self.cache.get_many(keys), strict=True):
            entry = None if data is None else Embedded.from_bytes(data, self.dims)
            if entry is not None:
                entry.timings["cache"] = time.perf_counter() - started
                cached[key] = entry
        record_stage("cache", started, time.perf_counter())
        self._hits.inc(len(cached))
        self._misses.inc(len(keys) - len(cached))
        return cached

    async def _with_stored_patches(
        self, cached: dict[str, Embedded], images: Mapping[str, bytes]
    ) -> dict[str, Embedded]:
        """Return those of the cached entries whose images have stored patch features. All dicts are by cache key."""

        def digests() -> dict[str, str]:
            return {hashlib.sha256(images[key]).hexdigest(): key for key in cached}

        keys = await self._in_thread(self._hasher, digests)
        missing = {keys[digest] for digest in await self.patch_cache.missing(keys)}
        return {key: entry for key, entry in cached.items() if key not in missing}

    async def _compute_all(self, wanted: dict[str, bytes], with_patches: bool) -> "dict[str, asyncio.Task[Embedded]]":
        """Compute the features of images, and return each image's task after it has finished. `wanted` and the result
        are dicts by cache key. If an image is already being computed, wait for that task instead of starting
        another. If `with_patches` is true, the features include the patch features."""
        new = [key for key in wanted if key not in self._flights]
        client = current_sender.get().client
        if new:
            self.batcher.reserve(len(new), client)  # all images of this request, or none
        self._metrics.coalesced.inc(len(wanted) - len(new))
        for key in new:
            task = asyncio.create_task(self._fly(key, wanted[key]))
            landed = partial(self._landed, client, key)
            task.add_done_callback(landed)  # also if the task is cancelled before its first step
            self._flights[key] = _Flight(task)
        flights = {key: self._flights[key] for key in wanted}
        for flight in flights.values():
            flight.waiters += 1
            flight.with_patches |= with_patches
        trace, began = current_trace(), time.perf_counter()
        try:
            if flights:
                await asyncio.wait([flight.task for flight in flights.values()])
            if trace is not None:
                for flight in flights.values():
                    if flight.trace is not trace:  # another request computed the image
                        trace.stage("coalesced", began, time.perf_counter(), flight.trace)
            return {key: flight.task for key, flight in flights.items()}
        finally:
            for key, flight in flights.items():
                flight.waiters -= 1
                if not flight.waiters and not flight.task.done():
                    flight.task.cancel()
                    self._forget(key, flight.task)

    async def _fly(self, key: str, image: bytes) -> Embedded:
        decoded = await self._decode(image, self._spec, keep_image=False)
        row, timings = await self._infer(decoded)
        embedded = Embedded(row.parts, row.tokens, timings=timings)
        await self.cache.set_many(
            {key: embedded.to_bytes()}
        )  # before the flight ends, so that a later request finds the entry or the flight
        flight = self._flights.get(key)
        if flight is None or not flight.with_patches:
            return embedded
        return replace(embedded, patches=await self._packed(row, decoded))

    async def _analyse(self, image: bytes, answer: Callable[[Analysed], T], view: View) -> T:
        async with self._kept_images.turn(current_sender.get()):
            decoded = await self._decode(image, view.spec or self._spec, keep_image=True)
            try:
                return await self._answer(image, decoded, answer, view)
            finally:
                decoded.memory.release()

    async def _answer(self, image: bytes, decoded: _Decoded, answer: Callable[[Analysed], T], view: View) -> T:
        spec = view.spec or self._spec
        row, timings = await self._infer(decoded, view.outputs)
        assert decoded.image is not None
        parts = row.parts
        if spec == self._spec and not row.by_serving:  # vectors of two engines are never mixed
            parts = (await self._infer(decoded))[0].parts
        embedded = Embedded(parts, row.tokens, timings=timings)
        if spec == self._spec:
            [key] = await self._keys([Outcome(0, image)])
            await self.cache.set_many({key.result(): embedded.to_bytes()})
        grid = self._grid(decoded.pixels)
        analysed = Analysed(embedded, row.patches, row.registers, grid, decoded.image, spec, row.outputs)
        began = time.perf_counter()
        try:
            return await self._in_thread(self._answerers, partial(answer, analysed))
        finally:
            record_stage("post", began, time.perf_counter())

    def _start_patches(self, digest_and_image: tuple[str, bytes]) -> "asyncio.Task[Patches]":
        task = asyncio.create_task(self._patches(*digest_and_image))
        task.add_done_callback(partial(self._ended, current_sender.get().client))
        return task

    async def _patches(self, digest: str, image: bytes) -> Patches:
        decoded = await self._decode(image, self._spec, keep_image=False)
        row, _ = await self._infer(decoded)
        patches = await self._packed(row, decoded)
        await self.patch_cache.add({digest: patches})
        return patches

    async def _packed(self, row: Row, decoded: _Decoded) -> Patches:
        work = partial(Patches.of, row.patches, self._grid(decoded.pixels), decoded.size)
        return await self._in_thread(self._answerers, work)

    def _grid(self, pixels: FloatArray) -> tuple[int, int]:
        return pixels.shape[1] // self._patch_size, pixels.shape[2] // self._patch_size

    def _landed(self, client: str, key: str, task: "asyncio.Task[Embedded]") -> None:
        self._ended(client, task)
        self._forget(key, task)

    def _ended(self, client: str, task: "asyncio.Task[Any]") -> None:
        """Release the queue place that was reserved for this task of a client, which has ended."""
        self.batcher.release(1, client)
        if not task.cancelled():
            task.exception()  # otherwise asyncio would log it, although the waiting requests get it

    def _forget(self, key: str, task: "asyncio.Task[Embedded]") -> None:
        """Remove `task` from the running computations. `key` is the cache key of its image. If a newer task for the
        same key has replaced `task`, do nothing."""
        if key in self._flights and self._flights[key].task is task:
            del self._flights[key]

    async def _decode(self, image: bytes, spec: PreprocessSpec, *, keep_image: bool) -> _Decoded:
        """Decode and preprocess an image in a thread, as soon as there is memory for it. If `keep_image` is true, the
        caller releases the memory; otherwise it is released here."""
        memory = Reservation(self.decoding.memory)
        work = partial(self._decode_now, image, spec, memory, keep_image, self._charging(spec))
        decoded = None
        try:
            while decoded is None:
                try:
                    decoded = await self._in_thread(self._decoders, work)
                except MustWait:
                    await memory.wait()
                except ServiceError as error:
                    forget_frames(error)
                    raise
            return decoded
        finally:
            if decoded is None or not keep_image:
                memory.release()

    def _decode_now(
        self, image: bytes, spec: PreprocessSpec, memory: Reservation, keep_image: bool, on_size: OnSize | None
    ) -> _Decoded:
        started, pixels_in_file = time.perf_counter(), 0

        def seen(width: int, height: int) -> None:
            nonlocal pixels_in_file
            pixels_in_file = width * height
            if on_size is not None:
                on_size(width, height)

        def take(n_bytes: int) -> None:
            memory.take(max(n_bytes, ANSWER_BYTES * pixels_in_file) if keep_image else n_bytes)

        processes = self.decoding.processes
        rgb = decode(image, self._decode_limits, on_size=seen, on_memory=take, processes=processes)
        decoded_at = time.perf_counter()
        try:
            if spec != self._spec:
                check_input_size(rgb.shape[0], rgb.shape[1], spec, self._max_input_patches)
            pixels = preprocess(rgb, spec)
        except ValueError as error:
            raise BrokenImage(str(error)) from error
        preprocess_s = time.perf_counter() - decoded_at
        size = (rgb.shape[0], rgb.shape[1])
        return _Decoded(pixels, rgb if keep_image else None, size, memory, started, decoded_at - started, preprocess_s)

    def _charging(self, spec: PreprocessSpec) -> OnSize | None:
        """Return a function that adds the cost of an image to that of the current request: the pixels that are decoded,
        and the pixels of the network's input. Return None if the request is not limited."""
        cost, most = current_cost.get(), self._max_input_patches * self._patch_size**2
        if cost is None:
            return None

        charged: set[tuple[int, int]] = set()

        def charge(width: int, height: int) -> None:
            if (width, height) in charged:  # the header is read again after the image has waited for memory
                return
            input_height, input_width = output_size(height, width, spec)
            cost.add(width * height + min(input_height * input_width, most))  # a larger input will be refused
            charged.add((width, height))

        return charge

    async def _in_thread(self, threads: FairThreads, work: Callable[[], T]) -> T:
        """Run `work` in a thread of the pool and return its result. Clients get a thread in turn. If the caller is
        cancelled before `work` has begun, `work` does not run. If the caller is cancelled later, wait until `work`
        ends, so that resources are not released while the thread still uses them."""
        running = threads.submit(current_sender.get(), work)
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            if not running.cancel():
                await asyncio.gather(asyncio.wrap_future(running), return_exceptions=True)
            raise

    async def _infer(self, decoded: _Decoded, outputs: tuple[str, ...] = ()) -> tuple[Row, dict[str, float]]:
        done = await self.batcher.submit(decoded.pixels, outputs)
        timings = {
            "decode": decoded.decode_s,
            "preprocess": decoded.preprocess_s,
            "queue": done.queue_s,
            "infer": done.infer_s,
        }
        for stage, seconds in timings.items():
            self._metrics.stage_seconds.labels(stage).observe(seconds)
        trace = current_trace()
        if trace is not None:
            trace.image(timings, decoded.started, done.started, done.batch)
        return done.row, timings


def _result(task: "asyncio.Task[T]") -> T:
    """Return the result of a finished task, or raise its exception."""
    return task.result()


def _as_is(vector: FloatArray) -> FloatArray:
    return vector


def _unit(vector: FloatArray) -> FloatArray:
    """Return a vector scaled to length 1. A zero vector is returned unchanged."""
    norm = np.linalg.norm(vector)
    return vector if norm == 0 else (vector / norm).astype(np.float32)


def check_input_size(height: int, width: int, spec: PreprocessSpec, most: int) -> None:
    """Check the size of the network's input for an image of this size. `most` is the highest number of patches.

    Raises:
        InvalidRequest: the input would have too many patches.
    """
    h, w = output_size(height, width, spec)
    patches = (h // spec.patch_size) * (w // spec.patch_size)
    if patches > most:
        raise InvalidRequest(
            f"size={spec.resize} gives this image of {width} x {height} pixels an input of {w} x {h} pixels with "
            f"{patches} patches; at most {most} are allowed: choose a smaller size",
            param="size",
        )

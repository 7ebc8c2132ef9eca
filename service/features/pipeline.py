"""The straight line of one image: bytes -> cache? -> decode -> preprocess -> batcher -> engine -> pool -> cache.

Decoding and preprocessing share one thread hop and end before batching, so a broken image is an error of its own item
and never reaches the engine. Nothing is decoded for a request that the queue has no room for.

What is cached is not the vector that a client asked for but what every such vector is made of: the class token and the
mean of the patch tokens, float32, before normalisation. `pooling` and `normalize` are applied on the way out, so one
forward pass and one entry serve every combination. The key holds the sha256 of the bytes as sent, the model's
fingerprint (weights, architecture, preprocessing, hence the input size) and the precision.

Identical images in flight compute once: the computation is a task of its own that every request waits for. It goes on
while anyone waits, so a client that leaves does not fail the others, and ends when nobody does. A thread cannot be
stopped, though: a decode that nobody waits for any more keeps its place in the queue until it is done, so that
`queue_full` and /readyz tell the truth.

Legend: D width of the model, N patches, H x W the image as sent (upright), h x w the network's input.
"""

import asyncio
import hashlib
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact
from model.decode import DecodeLimits
from model.engines.protocol import Engine
from model.pooling import Pooling, pool
from model.preprocess import preprocess
from service.errors import BrokenImage, EngineFailed
from service.features.batcher import Batcher
from service.features.cache import Cache, MemoryCache, cache_key
from service.features.images import decode
from service.features.patches import Patches
from service.outcomes import Outcome, successes
from service.settings import Settings
from service.telemetry import Metrics

FloatArray = npt.NDArray[np.float32]
T = TypeVar("T")

_HEAD = struct.Struct("<I")  # of a cache entry: tokens that the model saw; the 2 * D floats follow


class Row(NamedTuple):
    """One image's share of a forward pass; `patches` is a view into the batch."""

    cls: FloatArray  # [D]
    mean: FloatArray  # [D]
    patches: FloatArray  # [N, D]
    tokens: int  # that the model saw: class, registers, patches


@dataclass(frozen=True)
class Embedded:
    """What every vector of one image is made of."""

    cls: FloatArray  # [D]
    mean: FloatArray  # [D]
    tokens: int
    cached: bool = False
    timings: dict[str, float] = field(default_factory=dict)  # stage -> seconds

    def vector(self, pooling: Pooling, normalize: bool) -> FloatArray:
        """The vector of this pooling, [width(pooling, D)]; with `normalize`, the whole and its parts have length 1."""
        unit = _unit if normalize else _as_is
        return unit(pool({"cls": self.cls, "mean": self.mean}, pooling, unit=unit, join=np.concatenate))

    def to_bytes(self) -> bytes:
        return _HEAD.pack(self.tokens) + self.cls.astype("<f4").tobytes() + self.mean.astype("<f4").tobytes()

    @staticmethod
    def from_bytes(data: bytes, dims: int) -> "Embedded | None":
        """None when the entry is not one of this model's: whoever writes to a shared cache may be wrong."""
        if len(data) != _HEAD.size + 8 * dims:
            return None
        both = np.frombuffer(data, dtype="<f4", offset=_HEAD.size).astype(np.float32)
        if not np.isfinite(both).all():
            return None
        return Embedded(both[:dims], both[dims:], _HEAD.unpack_from(data)[0], cached=True)


@dataclass(frozen=True)
class Analysed:
    """Everything that one decode and one forward pass gave for one image."""

    embedded: Embedded
    patches: FloatArray  # [N, D]
    grid: tuple[int, int]  # patches down, patches across
    image: npt.NDArray[np.uint8]  # [H, W, 3]


class _Decoded(NamedTuple):
    pixels: FloatArray  # [3, h, w]
    image: npt.NDArray[np.uint8] | None
    size: tuple[int, int]  # H, W
    decode_s: float
    preprocess_s: float


@dataclass
class _Flight:
    """A computation that several requests may wait for."""

    task: "asyncio.Task[Embedded]"
    waiters: int = 0


@dataclass(frozen=True)
class PipelineLimits:
    """How much a pipeline takes on; the settings of the same names say what each is."""

    decode: DecodeLimits
    decode_workers: int
    batch_max_patches: int
    queue_max_images: int
    queue_max_patches: int
    hang_timeout_s: float
    patch_cache_bytes: int = 0

    @staticmethod
    def of(settings: Settings) -> "PipelineLimits":
        return PipelineLimits(
            decode=DecodeLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels),
            decode_workers=settings.decode_workers,
            batch_max_patches=settings.batch_max_patches,
            queue_max_images=settings.queue_max_images,
            queue_max_patches=settings.queue_max_patches,
            hang_timeout_s=settings.hang_timeout_s,
            patch_cache_bytes=settings.patch_cache_bytes,
        )


class Pipeline:
    """Owns the batcher and the threads around it; made and closed by `service.app`, on the event loop."""

    def __init__(
        self,
        artifact: Artifact,
        engine: Engine,
        cache: Cache,
        metrics: Metrics,
        limits: PipelineLimits,
    ) -> None:
        self.artifact = artifact
        self.engine = engine
        self.cache = cache
        self.dims = artifact.manifest.config.embed_dim
        self._spec = artifact.manifest.preprocess
        self._patch_size = artifact.manifest.config.patch_size
        self._decode_limits = limits.decode
        self._metrics = metrics
        self._patch_cache = MemoryCache(limits.patch_cache_bytes)  # never Redis: an entry is a hundred vectors
        self._flights: dict[str, _Flight] = {}
        self._decoders = ThreadPoolExecutor(limits.decode_workers, thread_name_prefix="decode")
        self._answerers = ThreadPoolExecutor(limits.decode_workers, thread_name_prefix="answer")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")  # so that what is cached waits for no decode
        self._kept_images = asyncio.Semaphore(limits.decode_workers)  # see `analyse`
        self.batcher: Batcher[Row] = Batcher(
            self._forward,
            patch_size=self._patch_size,
            batch_max_patches=limits.batch_max_patches,
            queue_max_images=limits.queue_max_images,
            queue_max_patches=limits.queue_max_patches,
            metrics=metrics,
            hang_timeout_s=limits.hang_timeout_s,
        )

    async def embed(self, images: Sequence[Outcome[bytes]]) -> list[Outcome[Embedded]]:
        """Embed the images of one request, in order; a bad one gives its error and does not hurt the others.

        An image that could not be read keeps its error, and every outcome its index.

        Raises:
            QueueFull, ShuttingDown, ModelUnavailable: of the request as a whole; nothing was begun.
        """
        keys = await self._keys(images)
        by_key = {key.result(): image.result() for key, image in zip(keys, images, strict=True) if key.error is None}
        cached = await self._from_cache(list(by_key))
        computed = await self._compute_all({key: image for key, image in by_key.items() if key not in cached})

        def embedded(key: str) -> Embedded:
            return cached[key] if key in cached else computed[key].result()

        return [key.then(embedded) for key in keys]

    async def analyse(self, image: bytes, answer: Callable[[Analysed], T]) -> T:
        """What `answer` makes, on a thread, of all features of one image; the vector goes into the cache on the way.

        The image as sent stays in memory from its decoding to the answer, so that only as many are begun as there are
        decode threads. The others wait as bytes.

        Raises:
            ServiceError: what is wrong with the image, or `QueueFull` and its like; and what `answer` raises.
        """
        self.batcher.reserve(1)
        task = asyncio.create_task(self._analyse(image, answer))
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        finally:
            task.cancel()  # of a caller that leaves: it ends when its thread does; else it is done already

    async def kept_patches(self, digests: Iterable[str]) -> dict[str, Patches]:
        """The patches of those images, by the sha256 of their bytes, that this process has kept."""
        keys = {digest: self._patches_key(digest) for digest in digests}
        kept = await self._patch_cache.get_many(list(keys.values()))
        return {d: Patches.from_bytes(data) for d, data in zip(keys, kept, strict=True) if data is not None}

    async def patches(self, images: Sequence[Outcome[tuple[str, bytes]]]) -> list[Outcome[Patches]]:
        """The patches of images, each with the sha256 of its bytes, in as few forward passes as they fit in; kept for
        the next time. An image that could not be read keeps its error.

        Raises:
            QueueFull, ShuttingDown, ModelUnavailable: of all of them; nothing was begun.
        """
        self.batcher.reserve(sum(image.error is None for image in images))
        outcomes = [image.then(self._start_patches) for image in images]
        tasks = successes(outcomes)
        try:
            if tasks:
                await asyncio.wait(tasks)
            return [outcome.then(_result) for outcome in outcomes]
        finally:
            for task in tasks:
                task.cancel()  # of a caller that leaves

    async def warm_up(self) -> None:
        """One forward pass, so that the first client does not pay for what the runtime does once."""
        height, width = self.artifact.manifest.input_size
        await self.batcher.submit(np.zeros((3, height, width), np.float32))

    async def close(self) -> None:
        """Stop; what is still waiting fails with `ShuttingDown`."""
        self.batcher.close()
        for threads in (self._decoders, self._answerers, self._hasher):
            threads.shutdown(wait=False, cancel_futures=True)

    def _forward(self, pixels: FloatArray) -> list[Row]:
        """One forward pass with pooling, on the worker's thread.

        Raises:
            EngineFailed: not every feature is finite. The batcher then tries the images singly.
        """
        features = self.engine.run(pixels)  # [B, D], [B, N, D], [B, R, D]
        means = features.patches.mean(axis=1)  # [B, D]
        if not (np.isfinite(features.cls).all() and np.isfinite(means).all()):  # a mean is only if all patches are
            raise EngineFailed("the engine's features are not finite")
        tokens = 1 + features.registers.shape[1] + features.patches.shape[1]
        return [Row(c, m, p, tokens) for c, m, p in zip(features.cls, means, features.patches, strict=True)]

    async def _keys(self, images: Sequence[Outcome[bytes]]) -> list[Outcome[str]]:
        """Cache keys; hashing more than a few hundred kilobytes would hold up the event loop."""

        def keys() -> list[Outcome[str]]:
            return [image.then(self._key) for image in images]

        size = sum(map(len, successes(images)))
        return keys() if size <= 2**18 else await asyncio.get_running_loop().run_in_executor(self._hasher, keys)

    def _key(self, image: bytes) -> str:
        digest = hashlib.sha256(image).hexdigest()
        return cache_key(digest, self.artifact.fingerprint, {"precision": self.engine.precision})

    def _patches_key(self, digest: str) -> str:
        return cache_key(digest, self.artifact.fingerprint, {"precision": self.engine.precision, "of": "patches"})

    async def _from_cache(self, keys: list[str]) -> dict[str, Embedded]:
        started = time.perf_counter()
        cached: dict[str, Embedded] = {}
        for key, data in zip(keys, await self.cache.get_many(keys), strict=True):
            entry = None if data is None else Embedded.from_bytes(data, self.dims)
            if entry is not None:
                entry.timings["cache"] = time.perf_counter() - started
                cached[key] = entry
        self._metrics.cache_hits.inc(len(cached))
        self._metrics.cache_misses.inc(len(keys) - len(cached))
        return cached

    async def _compute_all(self, wanted: dict[str, bytes]) -> "dict[str, asyncio.Task[Embedded]]":
        """Join the flights of these images, starting those that are not under way; all are left together, landed."""
        new = [key for key in wanted if key not in self._flights]
        if new:
            self.batcher.reserve(len(new))  # all of this request's images or none
        self._metrics.coalesced.inc(len(wanted) - len(new))
        for key in new:
            task = asyncio.create_task(self._fly(key, wanted[key]))
            task.add_done_callback(partial(self._landed, key))  # also when it is cancelled before its first step
            self._flights[key] = _Flight(task)
        flights = {key: self._flights[key] for key in wanted}
        for flight in flights.values():
            flight.waiters += 1
        try:
            if flights:
                await asyncio.wait([flight.task for flight in flights.values()])
            return {key: flight.task for key, flight in flights.items()}
        finally:
            for key, flight in flights.items():
                flight.waiters -= 1
                if not flight.waiters and not flight.task.done():
                    flight.task.cancel()
                    self._forget(key, flight.task)

    async def _fly(self, key: str, image: bytes) -> Embedded:
        decoded = await self._decode(image, keep_image=False)
        row, timings = await self._infer(decoded)
        embedded = Embedded(row.cls.copy(), row.mean, row.tokens, timings=timings)  # a copy: lets go of the whole batch
        await self.cache.set_many({key: embedded.to_bytes()})  # before landing: a later request meets one or the other
        return embedded

    async def _analyse(self, image: bytes, answer: Callable[[Analysed], T]) -> T:
        async with self._kept_images:
            decoded = await self._decode(image, keep_image=True)
            row, timings = await self._infer(decoded)
            assert decoded.image is not None
            embedded = Embedded(row.cls.copy(), row.mean, row.tokens, timings=timings)
            [key] = await self._keys([Outcome(0, image)])
            await self.cache.set_many({key.result(): embedded.to_bytes()})
            analysed = Analysed(embedded, row.patches, self._grid(decoded.pixels), decoded.image)
            return await self._in_thread(self._answerers, partial(answer, analysed))

    def _start_patches(self, digest_and_image: tuple[str, bytes]) -> "asyncio.Task[Patches]":
        task = asyncio.create_task(self._patches(*digest_and_image))
        task.add_done_callback(self._ended)
        return task

    async def _patches(self, digest: str, image: bytes) -> Patches:
        decoded = await self._decode(image, keep_image=False)
        row, _ = await self._infer(decoded)
        work = partial(Patches.of, row.patches, self._grid(decoded.pixels), decoded.size)
        patches = await self._in_thread(self._answerers, work)
        await self._patch_cache.set_many({self._patches_key(digest): patches.to_bytes()})
        return patches

    def _grid(self, pixels: FloatArray) -> tuple[int, int]:
        return pixels.shape[1] // self._patch_size, pixels.shape[2] // self._patch_size

    def _landed(self, key: str, task: "asyncio.Task[Embedded]") -> None:
        self._ended(task)
        self._forget(key, task)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        """Give back the one place in the queue that was reserved for a task."""
        self.batcher.release(1)
        if not task.cancelled():
            task.exception()  # seen: those who waited have it; nobody waiting is no news either

    def _forget(self, key: str, task: "asyncio.Task[Embedded]") -> None:
        """End a flight, unless a newer one has taken its place."""
        if key in self._flights and self._flights[key].task is task:
            del self._flights[key]

    async def _decode(self, image: bytes, *, keep_image: bool) -> _Decoded:
        def work() -> _Decoded:
            started = time.perf_counter()
            rgb = decode(image, self._decode_limits)
            decoded_at = time.perf_counter()
            try:
                pixels = preprocess(rgb, self._spec)
            except ValueError as error:
                raise BrokenImage(str(error)) from error
            preprocess_s = time.perf_counter() - decoded_at
            size = (rgb.shape[0], rgb.shape[1])
            return _Decoded(pixels, rgb if keep_image else None, size, decoded_at - started, preprocess_s)

        return await self._in_thread(self._decoders, work)

    async def _in_thread(self, threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        """The result of `work`. When cancelled, it ends at once if the work has not begun, else together with it:
        nothing counts as given back which a thread still uses."""
        running = threads.submit(work)
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            if not running.cancel():
                await asyncio.gather(asyncio.wrap_future(running), return_exceptions=True)
            raise

    async def _infer(self, decoded: _Decoded) -> tuple[Row, dict[str, float]]:
        done = await self.batcher.submit(decoded.pixels)
        timings = {
            "decode": decoded.decode_s,
            "preprocess": decoded.preprocess_s,
            "queue": done.queue_s,
            "infer": done.infer_s,
        }
        for stage, seconds in timings.items():
            self._metrics.stage_seconds.labels(stage).observe(seconds)
        return done.row, timings


def _result(task: "asyncio.Task[T]") -> T:
    """What a finished task returned; raises what it raised."""
    return task.result()


def _as_is(vector: FloatArray) -> FloatArray:
    return vector


def _unit(vector: FloatArray) -> FloatArray:
    """Scaled to length 1; a zero vector stays zero."""
    norm = np.linalg.norm(vector)
    return vector if norm == 0 else (vector / norm).astype(np.float32)

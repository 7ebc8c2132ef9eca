"""Caches the patch features of images by the images' sha256: the most recent ones in memory, and more on disk."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

from service.features.cache import MemoryCache, cache_key
from service.features.patch_store import PatchStore
from service.features.patches import Patches
from service.telemetry import Metrics

T = TypeVar("T")


class InThread(Protocol):
    """A function that runs `work` in a thread and returns its result."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


class PatchCache:
    """The cached patch features of images.

    Args:
        key: a function that returns the cache key of an image, given the sha256 of its bytes in hex.
        memory_bytes: the most memory that the features may take.
        store: the store on disk, or None.
        in_thread: a function that runs the store's reads and writes in a thread.
        metrics: counts the hits and misses.
    """

    def __init__(
        self,
        key: Callable[[str], str],
        memory_bytes: int,
        store: PatchStore | None,
        in_thread: InThread,
        metrics: Metrics,
    ) -> None:
        self._key = key
        self._memory = MemoryCache(memory_bytes)  # never in Redis: an entry is as large as fifty vectors
        self._store = store
        self._in_thread = in_thread
        self._metrics = metrics

    @property
    def is_on_disk(self) -> bool:
        return self._store is not None

    async def read(self, digests: Iterable[str], work: Callable[[dict[str, Patches]], T]) -> T:
        """Call `work` in a thread with the cached patch features of these images, and return its result. `work` gets
        the features as a dict keyed by digest, without the images that have no cached features."""
        keys = {digest: self._key(digest) for digest in dict.fromkeys(digests)}
        entries: dict[str, bytes | None] = dict(
            zip(keys, await self._memory.get_many(list(keys.values())), strict=True)
        )

        def find() -> T:
            missing = [digest for digest, data in entries.items() if data is None]
            self._count("patches_memory", len(entries) - len(missing), len(missing))
            if self._store is not None and missing:
                stored = self._store.get_many([keys[digest] for digest in missing])
                lost = sum(data is None for data in stored)
                self._count("patches_disk", len(stored) - lost, lost)
                entries.update(zip(missing, stored, strict=True))
            return work({digest: Patches.from_bytes(data) for digest, data in entries.items() if data is not None})

        return await self._in_thread(find)

    def _count(self, layer: str, hits: int, misses: int) -> None:
        self._metrics.cache_hits.labels(layer).inc(hits)
        self._metrics.cache_misses.labels(layer).inc(misses)

    async def add(self, digest: str, patches: Patches, *, recent: bool = True) -> None:
        """Add the patch features of an image. If `recent` is false, they are written only to disk, because they will
        probably not be needed soon."""
        key, data = self._key(digest), patches.to_bytes()
        if recent:
            await self._memory.set_many({key: data})
        if self._store is not None:
            store = self._store
            await self._in_thread(lambda: store.set_many({key: data}))

    async def close(self) -> None:
        if self._store is not None:
            self._store.close()


def patches_key(digest: str, fingerprint: str, precision: str) -> str:
    """Return the cache key of the patch features of an image. `digest` is the sha256 of the image's bytes in hex, and
    the other arguments describe the model and the engine that compute the features."""
    return cache_key(digest, fingerprint, {"precision": precision, "of": "patches"})


def as_is(patches: dict[str, Patches]) -> dict[str, Patches]:
    return patches

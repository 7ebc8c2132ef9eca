"""Caches the patch features of images by the images' sha256: the most recent ones in memory, and more on disk."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
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
    """The cached patch features of images. `store` is their store on disk.

    Args:
        key: a function that returns the cache key of an image, given the sha256 of its bytes in hex.
        memory_bytes: the most memory that the features may take.
        store: the store on disk.
        in_thread: a function that runs the store's reads and writes in a thread.
        metrics: counts the hits and misses.
    """

    def __init__(
        self,
        key: Callable[[str], str],
        memory_bytes: int,
        store: PatchStore,
        in_thread: InThread,
        metrics: Metrics,
    ) -> None:
        self._key = key
        self._memory = MemoryCache(memory_bytes)  # never in Redis: an entry is as large as fifty vectors
        self.store = store
        self._erasures = store.erasures()
        self._in_thread = in_thread
        self._metrics = metrics

    @property
    def is_on_disk(self) -> bool:
        return self.store.max_bytes > 0

    async def read(self, digests: Iterable[str], work: Callable[[dict[str, Patches]], T]) -> T:
        """Call `work` in a thread with the cached patch features of these images, and return its result. `work` gets
        the features as a dict keyed by digest, without the images that have no cached features."""
        self._forget_erased()
        keys = {digest: self._key(digest) for digest in dict.fromkeys(digests)}
        entries: dict[str, bytes | None] = dict(
            zip(keys, await self._memory.get_many(list(keys.values())), strict=True)
        )

        def find() -> T:
            missing = [digest for digest, data in entries.items() if data is None]
            self._count("patches_memory", len(entries) - len(missing), len(missing))
            if self.is_on_disk and missing:
                stored = self.store.get_many([keys[digest] for digest in missing])
                lost = sum(data is None for data in stored)
                self._count("patches_disk", len(stored) - lost, lost)
                entries.update(zip(missing, stored, strict=True))
            return work({digest: Patches.from_bytes(data) for digest, data in entries.items() if data is not None})

        return await self._in_thread(find)

    def _count(self, layer: str, hits: int, misses: int) -> None:
        self._metrics.cache_hits.labels(layer).inc(hits)
        self._metrics.cache_misses.labels(layer).inc(misses)

    async def missing(self, digests: Iterable[str]) -> set[str]:
        """Return those of the digests whose patch features are not on disk."""
        keys = {self._key(digest): digest for digest in digests}
        stored = await self._in_thread(lambda: self.store.stored(list(keys)))
        return {digest for key, digest in keys.items() if key not in stored}

    async def add(self, patches: Mapping[str, Patches], *, recent: bool = True) -> None:
        """Add the patch features of images, by digest. If `recent` is false, they are written only to disk, because
        they will probably not be needed soon."""
        entries = {self._key(digest): each.to_bytes() for digest, each in patches.items()}
        if recent:
            await self._memory.set_many(entries)
        if self.is_on_disk and entries:
            await self._in_thread(lambda: self.store.set_many(entries))

    async def erase(self, digests: Sequence[str]) -> None:
        """Erase the patch features of images, those of other models and in other processes too.

        Raises:
            StorageFailed: they cannot be erased.
        """
        await self._in_thread(lambda: self.store.erase(digests))

    def _forget_erased(self) -> None:
        """Empty the memory if images were erased since the last call, in this process or another one."""
        erasures = self.store.erasures()
        if erasures != self._erasures:
            self._erasures, self._memory = erasures, MemoryCache(self._memory.max_bytes)

    async def close(self) -> None:
        self.store.close()


def patches_key(digest: str, fingerprint: str, precision: str) -> str:
    """Return the cache key of the patch features of an image. `digest` is the sha256 of the image's bytes in hex, and
    the other arguments describe the model and the engine that compute the features. The key begins with the digest and
    a slash, as `PatchStore` requires."""
    return f"{digest}/{cache_key(digest, fingerprint, {'precision': precision, 'of': 'patches'})}"


def as_is(patches: dict[str, Patches]) -> dict[str, Patches]:
    return patches

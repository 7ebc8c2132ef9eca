"""Share the memory for decoding images among all decodings of the process.

A small file can contain many pixels, so the size of the bodies does not limit the memory that their images take. Each
image therefore takes its bytes from `DecodeMemory` when its header has been read, before there are any pixels. It gives
them back when its pixels are freed or have become the network's input.

An image that does not fit waits, without occupying a thread. Its header is read again when it is its turn. Clients that
wait get their turn as in a `FairQueue`. No image overtakes the one whose turn it is, so a large image does not wait
for ever. A quarter of the memory is only for small images, so they never wait for large ones.
"""

import asyncio
import threading
from typing import Final, NamedTuple

from model.decode import DecodeError, TooLarge
from model.memory import return_small_blocks
from service.clients import Sender, current_sender
from service.fair import FairQueue

SMALL_SHARE: Final = 4
"""A quarter of the memory is for small images, and an image is small if it takes at most a quarter of that."""
_MANY_BYTES: Final = 2**27
_TRIM_AFTER_S: Final = 1.0


class MustWait(DecodeError):
    """The error for an image that is not decoded now, because other images occupy the memory."""


class _Turn(NamedTuple):
    """An image that waits. `ready` belongs to `loop`."""

    n_bytes: int
    ready: "asyncio.Future[None]"
    loop: asyncio.AbstractEventLoop


class _Part:
    """A part of the memory, in bytes, with a queue of images that wait for it. Any thread may use it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._free = most
        self._queue: FairQueue[_Turn] = FairQueue()
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        return self.most - self._free

    def try_take(self, n_bytes: int) -> bool:
        """Take bytes if they are free and no image waits. Return whether they were taken."""
        with self._lock:
            if self._queue or n_bytes > self._free:
                return False
            self._free -= n_bytes
            return True

    async def take(self, n_bytes: int, sender: Sender) -> None:
        """Wait until it is this image's turn and the bytes are free, and take them."""
        loop = asyncio.get_running_loop()
        turn = _Turn(n_bytes, loop.create_future(), loop)
        with self._lock:
            self._queue.push(sender, turn)
            self._serve()
        try:
            await turn.ready
        except asyncio.CancelledError:
            with self._lock:
                if turn in self._queue.in_turn():
                    self._queue.remove(sender, turn)
                else:  # the bytes came at the same moment
                    self._free += n_bytes
                self._serve()
            raise

    def give_back(self, n_bytes: int) -> None:
        with self._lock:
            self._free += n_bytes
            self._serve()

    def _serve(self) -> None:
        """Give bytes to the images whose turn it is. The caller holds the lock."""
        while self._queue and self._queue.next().n_bytes <= self._free:
            turn = self._queue.pop()
            self._free -= turn.n_bytes
            turn.loop.call_soon_threadsafe(_set, turn.ready)


def _set(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


class DecodeMemory:
    """The memory for decoding images, `most` bytes in total."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._small = _Part(most // SMALL_SHARE)
        self._large = _Part(most - most // SMALL_SHARE)
        self._peak = 0  # since all bytes were free

    @property
    def held(self) -> int:
        """The number of bytes that images occupy now."""
        return self._small.held + self._large.held

    def note_taken(self) -> None:
        self._peak = max(self._peak, self.held)

    def note_given_back(self) -> None:
        """If many bytes were in use, and now none are, give memory that threads have freed back to the system soon."""
        if self._peak >= _MANY_BYTES and not self.held:
            self._peak = 0
            timer = threading.Timer(_TRIM_AFTER_S, return_small_blocks)
            timer.daemon = True
            timer.start()

    def part_for(self, n_bytes: int) -> _Part:
        """Return the part from which an image of this size takes its bytes.

        Raises:
            TooLarge: the image can never fit.
        """
        if n_bytes * SMALL_SHARE <= self._small.most:
            return self._small
        if n_bytes > self._large.most:
            raise TooLarge(
                f"decoding the image takes {n_bytes // 2**20} MiB of memory, and the service gives at most "
                f"{self._large.most // 2**20} MiB to one image: make it smaller, or raise DINOV2_DECODE_MEMORY_BYTES"
            )
        return self._large


class Reservation:
    """The bytes that one image occupies."""

    def __init__(self, memory: DecodeMemory) -> None:
        self._memory = memory
        self._part: _Part | None = None
        self._held = self._wanted = 0

    def take(self, n_bytes: int) -> None:
        """Take the bytes for an image, in the thread that decodes it. If the image has as many already, do nothing.

        Raises:
            TooLarge: the image can never fit.
            MustWait: other images occupy the memory. Nothing is held. Await `wait`, and then decode again.
        """
        if n_bytes <= self._held:
            return
        self.release()
        part = self._memory.part_for(n_bytes)
        self._part, self._wanted = part, n_bytes
        if not part.try_take(n_bytes):
            raise MustWait(f"the image waits for {n_bytes} bytes")
        self._held = n_bytes
        self._memory.note_taken()

    async def wait(self) -> None:
        """After `take` has raised MustWait: wait until the bytes are free, and take them."""
        assert self._part is not None
        await self._part.take(self._wanted, current_sender.get())
        self._held = self._wanted
        self._memory.note_taken()

    def release(self) -> None:
        """Give the bytes back. A second call does nothing."""
        held, self._held = self._held, 0
        if held and self._part is not None:
            self._part.give_back(held)
            self._memory.note_given_back()

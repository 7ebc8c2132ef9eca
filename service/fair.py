"""Shares out a queue, threads and memory among clients (docs/decisions/0045-fair-queues.md).

- `FairQueue` serves clients in turn, and the requests of each client in turn. However many items one client puts into
  the queue, the next item of every other client waits for one of them at most.
- `FairThreads` is a pool of threads with such a queue, and `FairSlots` limits tasks of the event loop in the same way.
- `Shares` limits how much of something each client may occupy: a part of what the other clients leave. So a few
  clients cannot fill it.
"""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

from service.clients import Sender

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A queue that serves clients in turn, and the requests of each client in turn. Items of one request keep their
    order. It is not safe for several threads."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[int, deque[T]]] = OrderedDict()  # those served longest ago first
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, sender: Sender, item: T) -> None:
        """Add an item to the line of its request."""
        requests = self._clients.setdefault(sender.client, OrderedDict())
        requests.setdefault(sender.request, deque()).append(item)
        self._size += 1

    def next(self) -> T:
        """Return the item that `pop` would return. The queue must not be empty."""
        return next(self.in_turn())

    def pop(self) -> T:
        """Remove and return the next item. The queue must not be empty."""
        client, requests = next(iter(self._clients.items()))
        request, line = next(iter(requests.items()))
        item = line[0]
        self.remove(Sender(client, request), item)
        return item

    def in_turn(self) -> Iterator[T]:
        """Yield all items, in the order in which `pop` would return them. The queue must not change meanwhile."""
        return _in_turn(_in_turn(map(iter, requests.values())) for requests in self._clients.values())

    def remove(self, sender: Sender, item: T) -> None:
        """Remove an item of `sender`. All other requests of its client, and all other clients, are served before the
        next item of this request."""
        requests = self._clients[sender.client]
        line = requests[sender.request]
        line.remove(item)
        requests.move_to_end(sender.request)
        self._clients.move_to_end(sender.client)
        if not line:
            del requests[sender.request]
        if not requests:
            del self._clients[sender.client]
        self._size -= 1

    def clear(self) -> list[T]:
        """Remove and return all items."""
        items = list(self.in_turn())
        self._clients.clear()
        self._size = 0
        return items


def _in_turn(lines: Iterable[Iterator[T]]) -> Iterator[T]:
    """Yield the first item of each line, then the second item of each line, and so on."""
    waiting = deque(lines)
    while waiting:
        line = waiting.popleft()
        for item in line:
            yield item
            waiting.append(line)
            break


class FairThreads:
    """A pool of `count` threads. Work that waits for a thread gets its turn as in a `FairQueue`."""

    def __init__(self, count: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._queue: FairQueue[tuple[Future[Any], Callable[[], Any]]] = FairQueue()
        self._lock = threading.Lock()

    def submit(self, sender: Sender, work: Callable[[], T]) -> "Future[T]":
        """Call `work` in a thread, and return a future for its result."""
        future: Future[T] = Future()
        with self._lock:
            self._queue.push(sender, (future, work))
        self._threads.submit(self._run_next)  # one call for each item; it takes the item whose turn it is
        return future

    def _run_next(self) -> None:
        with self._lock:
            if not self._queue:  # shut down
                return
            future, work = self._queue.pop()
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  the caller gets it from the future
            future.set_exception(error)
        else:
            future.set_result(result)

    def shutdown(self) -> None:
        """Cancel work that has not begun, and do not wait for running work."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            waiting = self._queue.clear()
        for future, _ in waiting:
            future.cancel()


class FairSlots:
    """Limits how many tasks of the event loop do something at the same time. Tasks that wait get their turn as in a
    `FairQueue`."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    @asynccontextmanager
    async def turn(self, sender: Sender) -> AsyncIterator[None]:
        """Wait for a free slot, and occupy it during the `async with` block."""
        if self._free:
            self._free -= 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.push(sender, turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # the slot came at the same moment
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            turn = self._waiting.pop()
            if not turn.done():  # its task was not cancelled
                turn.set_result(None)
                return
        self._free += 1


class Shares:
    """How much each client occupies of something that is limited, such as places in a queue or bytes of memory.

    All clients together occupy at most `limit`. A client may occupy at most the share `share` of what the other clients
    leave. With a share of 0.5, the first client gets up to a half, the second up to a quarter, and as the work of the
    first ends, each of them a third. The share does not limit the first request of a client, so that no request is
    refused on an idle service. Work of the service itself has no share.
    """

    def __init__(self, limit: int, share: float) -> None:
        self.limit = limit
        self.used = 0
        self._share = share
        self._held: dict[str, int] = {}

    @property
    def is_full(self) -> bool:
        """Whether the limit is reached, and not by one client alone."""
        return self.used >= self.limit and len(self._held) > 1

    def fits(self, amount: int) -> bool:
        """Return whether there is room for `amount` more, whoever wants it."""
        return self.used + amount <= self.limit

    def may_add(self, client: str, amount: int, own: int = 0) -> bool:
        """Return whether the share of a client allows it to occupy `amount` more. `own` is what the same request of the
        client occupies already."""
        held = self._held.get(client, 0)
        if not client or held <= own or self._share == 1:
            return True
        return held + amount <= self._share * (self.limit - self.used + held)

    def held(self, client: str) -> int:
        """Return how much a client occupies."""
        return self._held.get(client, 0)

    def add(self, client: str, amount: int) -> None:
        """Note that a client occupies `amount` more. A negative amount is given back."""
        held = self._held.get(client, 0) + amount
        assert held >= 0
        self.used += amount
        if held:
            self._held[client] = held
        else:
            self._held.pop(client, None)

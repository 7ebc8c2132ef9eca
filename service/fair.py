"""Shares out a queue, threads and memory among clients (docs/decisions/0045-fair-queues.md).

- `FairQueue` serves clients in turn, and the requests of each client in turn. However many items one client puts into
  the queue, the next item of every other client waits for one of them at most.
- `FairThreads` is a pool of threads with such a queue, and `FairSlots` limits tasks of the event loop in the same way.
- `Shares` limits how much of something each client may occupy: a part of what the other clients leave. So a few
  clients cannot fill it.
"""

import asyncio
import threading
from collections import Counter, OrderedDict, deque
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

    def pop(self, client: str | None = None) -> T:
        """Remove and return the next item, or that of a client. There must be one."""
        client = next(iter(self._clients)) if client is None else client
        request, line = next(iter(self._clients[client].items()))
        item = line[0]
        self.remove(Sender(client, request), item)
        return item

    def clients(self) -> Iterable[str]:
        """Return the clients that wait, in the order of their turns."""
        return self._clients.keys()

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


class _Work(Future[T]):
    """Work that waits for a thread. If it is cancelled, the function is forgotten at once: it may hold the body of a
    request, which is counted nowhere any more once the request has ended."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__()
        self._function: Callable[[], T] | None = function

    def cancel(self) -> bool:
        is_cancelled = super().cancel()
        if is_cancelled:
            self._function = None
        return is_cancelled

    def run(self) -> None:
        """Call the function unless it was cancelled."""
        if not self.set_running_or_notify_cancel():
            return
        function, self._function = self._function, None
        assert function is not None
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  the caller gets it from the future
            self.set_exception(error)
        else:
            self.set_result(result)


class _Running:
    """Counts what each client occupies of `count` places and a spare one. A client may occupy `count` of them, so the
    others find a place even if one client has filled its places with work that takes long."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._by_client: Counter[str] = Counter()

    def may_start(self, client: str) -> bool:
        return self._by_client.total() <= self._count and self._by_client[client] < self._count

    def started(self, client: str) -> None:
        self._by_client[client] += 1

    def ended(self, client: str) -> None:
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]


class FairThreads:
    """A pool of threads. Work that waits for a thread gets its turn as in a `FairQueue`. A client may use `count` of
    them at the same time, and there is one more, so that other clients do not wait for long work of a single one."""

    def __init__(self, count: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(count + 1, thread_name_prefix=name)
        self._queue: FairQueue[_Work[Any]] = FairQueue()
        self._running = _Running(count)
        self._lock = threading.Lock()

    def submit(self, sender: Sender, work: Callable[[], T]) -> "Future[T]":
        """Call `work` in a thread, and return a future for its result."""
        waiting = _Work(work)
        with self._lock:
            self._queue.push(sender, waiting)
        self._threads.submit(self._run)
        return waiting

    def _run(self) -> None:
        """Run work until there is none that may run now. Whoever ends the work of a client looks for more of it."""
        while (found := self._next()) is not None:
            client, work = found
            try:
                work.run()
            finally:
                del found, work  # the result belongs to the caller
                with self._lock:
                    self._running.ended(client)

    def _next(self) -> "tuple[str, _Work[Any]] | None":
        with self._lock:
            for client in self._queue.clients():
                if self._running.may_start(client):
                    self._running.started(client)
                    return client, self._queue.pop(client)
        return None

    def shutdown(self, *, wait: bool = False) -> None:
        """Cancel work that has not begun. If `wait` is true, wait for running work."""
        with self._lock:
            waiting = self._queue.clear()
        for work in waiting:
            work.cancel()
        self._threads.shutdown(wait=wait, cancel_futures=True)


class FairSlots:
    """Limits how many tasks of the event loop do something at the same time. Tasks that wait get their turn as in a
    `FairQueue`. As in `FairThreads`, a client may occupy `count` slots, and there is one more."""

    def __init__(self, count: int) -> None:
        self._occupied = _Running(count)
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    @asynccontextmanager
    async def turn(self, sender: Sender) -> AsyncIterator[None]:
        """Wait for a free slot, and occupy it during the `async with` block."""
        if self._occupied.may_start(sender.client):
            self._occupied.started(sender.client)
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.push(sender, turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # the slot came at the same moment
                    self._pass_on(sender.client)
                raise
        try:
            yield
        finally:
            self._pass_on(sender.client)

    def _pass_on(self, ended: str) -> None:
        self._occupied.ended(ended)
        while (client := next(filter(self._occupied.may_start, self._waiting.clients()), None)) is not None:
            turn = self._waiting.pop(client)
            if not turn.done():  # its task was not cancelled
                self._occupied.started(client)
                turn.set_result(None)


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

"""Tests of the fair queue, the threads and slots that use it, and the shares of clients."""

import asyncio
import random
import threading
import weakref
from concurrent.futures import CancelledError

import pytest

from service.buffer import SMALL_BYTES, Buffer
from service.clients import ITSELF, Sender, client_of, current_sender
from service.errors import ShareUsed, Unavailable
from service.fair import FairQueue, FairSlots, FairThreads, Shares
from tests.fakes import until

A, B, C = Sender("a", 1), Sender("b", 2), Sender("c", 3)


def filled(*items: tuple[Sender, str]) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue()
    for sender, item in items:
        queue.push(sender, item)
    return queue


def emptied(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_items_of_one_request_keep_their_order():
    assert emptied(filled((A, "1"), (A, "2"), (A, "3"))) == ["1", "2", "3"]


def test_clients_are_served_in_turn_however_much_one_of_them_waits_for():
    queue = filled(*((A, f"a{i}") for i in range(4)), (B, "b0"), (B, "b1"), (C, "c0"))
    assert emptied(queue) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_a_new_client_waits_for_one_item_of_each_other_client():
    queue = filled(*((A, f"a{i}") for i in range(50)), *((B, f"b{i}") for i in range(50)))
    first = [queue.pop() for _ in range(7)]
    queue.push(C, "new")
    assert len(first) == 7
    assert "new" in [queue.pop() for _ in range(3)]


def test_the_requests_of_one_client_are_served_in_turn_too():
    other = Sender("a", 9)
    queue = filled(*((A, f"a{i}") for i in range(4)), (other, "single"), (B, "b0"))
    assert emptied(queue) == ["a0", "b0", "single", "a1", "a2", "a3"]


def test_many_requests_of_one_client_do_not_give_it_more_turns():
    queue = filled(*((Sender("a", i), f"a{i}") for i in range(10)), (B, "b0"), (B, "b1"))
    assert emptied(queue)[:4] == ["a0", "b0", "a1", "b1"]


def test_the_order_that_is_shown_is_the_order_in_which_items_are_taken():
    chance = random.Random(0)
    for _ in range(50):
        items = [(Sender(chance.choice("abc"), chance.randrange(3)), str(number)) for number in range(20)]
        queue = filled(*items)
        for _ in range(chance.randrange(10)):
            queue.pop()
        shown = list(queue.in_turn())
        assert len(queue) == len(shown)
        assert emptied(queue) == shown


def test_an_item_can_be_taken_out_of_turn():
    queue = filled((A, "a0"), (A, "a1"), (B, "b0"))
    queue.remove(A, "a1")
    assert emptied(queue) == ["b0", "a0"]  # the turn of the client is used
    assert not queue
    assert queue.clear() == []


def test_threads_serve_clients_in_turn():
    threads, gate, order = FairThreads(1, "test"), threading.Event(), []
    threads.submit(A, lambda: gate.wait(10))
    many = [threads.submit(A, lambda i=i: order.append(f"a{i}")) for i in range(5)]
    single = threads.submit(B, lambda: order.append("b"))
    gate.set()
    for future in (*many, single):
        future.result(10)
    assert order == ["a0", "b", "a1", "a2", "a3", "a4"] or order == ["b", "a0", "a1", "a2", "a3", "a4"]
    threads.shutdown()


def test_a_thread_survives_an_error_and_does_not_run_what_was_cancelled():
    threads, gate, ran = FairThreads(1, "test"), threading.Event(), []

    def fail() -> None:
        raise ValueError("told to fail")

    threads.submit(A, lambda: gate.wait(10))
    failing, cancelled = threads.submit(A, fail), threads.submit(A, lambda: ran.append("cancelled"))
    last = threads.submit(A, lambda: ran.append("last"))
    assert cancelled.cancel()
    gate.set()
    last.result(10)
    assert ran == ["last"]
    with pytest.raises(ValueError, match="told to fail"):
        failing.result(10)
    threads.shutdown()


def test_closed_threads_cancel_what_waits():
    threads, gate = FairThreads(1, "test"), threading.Event()
    running = threads.submit(A, lambda: gate.wait(10))
    waiting = threads.submit(A, lambda: None)
    threads.shutdown()
    gate.set()
    assert running.result(10)
    with pytest.raises(CancelledError):
        waiting.result(10)


async def test_slots_are_given_to_clients_in_turn():
    slots, order, gate = FairSlots(1), [], asyncio.Event()

    async def occupy(sender: Sender, name: str) -> None:
        async with slots.turn(sender):
            order.append(name)
            await gate.wait()

    tasks = [asyncio.create_task(occupy(A, f"a{i}")) for i in range(4)]
    tasks.append(asyncio.create_task(occupy(B, "b")))  # gets the spare slot
    tasks.append(asyncio.create_task(occupy(Sender("c", 9), "c")))
    await until(lambda: order == ["a0", "b"])
    gate.set()
    await asyncio.gather(*tasks)
    assert order == ["a0", "b", "a1", "c", "a2", "a3"]


async def test_a_slot_is_not_lost_when_a_waiting_task_is_cancelled():
    slots, gate = FairSlots(1), asyncio.Event()
    inside = []

    async def occupy(name: str) -> None:
        async with slots.turn(A):
            inside.append(name)
            await gate.wait()

    first, cancelled, at_once, last = (asyncio.create_task(occupy(str(i))) for i in range(4))
    await until(lambda: inside == ["0"])
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    gate.set()
    await first
    at_once.cancel()  # the slot has just been given to this task
    await asyncio.gather(at_once, return_exceptions=True)
    await asyncio.wait_for(last, 5)
    async with slots.turn(B):
        inside.append("free")
    assert inside[-1] == "free"


def test_a_client_gets_a_share_of_what_the_others_leave():
    shares = Shares(100, 0.5)
    assert most(shares, "a") == 50
    shares.add("a", 50)
    assert most(shares, "b") == 25
    shares.add("b", 25)
    assert most(shares, "c") == 12
    shares.add("a", -50)
    assert most(shares, "b") == 25  # in addition to the 25 that it has


def most(shares: Shares, client: str) -> int:
    """Return how much a client can add one by one, after the first of its requests."""
    added = 0
    while shares.fits(1) and shares.may_add(client, 1):
        shares.add(client, 1)
        added += 1
    shares.add(client, -added)
    return added


@pytest.mark.parametrize("clients", [1, 2, 3, 6])
def test_a_newcomer_finds_room_and_the_queue_is_not_called_full(clients):
    shares = Shares(256, 0.5)
    for _ in range(3):
        for client in map(str, range(clients)):
            shares.add(client, most(shares, client))
    assert shares.used >= 128
    assert not shares.is_full
    assert shares.fits(1)
    assert shares.may_add("new", 1)


def test_the_first_request_of_a_client_is_limited_by_the_room_only():
    shares = Shares(10, 0.5)
    assert shares.may_add("a", 10)
    assert shares.fits(10)
    shares.add("a", 10)
    assert not shares.is_full  # one client alone
    assert not shares.fits(1)
    assert not shares.may_add("a", 1)
    shares.add("a", -1)
    shares.add("b", 1)
    assert shares.is_full


def test_the_service_itself_has_no_share():
    shares = Shares(10, 0.1)
    shares.add(ITSELF.client, 5)
    assert shares.may_add(ITSELF.client, 5)


def test_a_request_does_not_count_against_itself():
    shares = Shares(100, 0.5)
    shares.add("a", 60)
    assert shares.may_add("a", 10, own=60)
    assert not shares.may_add("a", 10, own=59)


def test_nothing_is_kept_of_a_client_that_occupies_nothing():
    shares = Shares(100, 0.5)
    for i in range(1000):
        shares.add(str(i), 1)
        shares.add(str(i), -1)
    assert shares._held == {}


MIB = 2**20


def test_slow_large_bodies_of_one_client_leave_room_for_everyone_else():
    buffer = Buffer(1024 * MIB, 0.5)
    for _ in range(8):
        buffer.take("slow", 63 * MIB, 0)
    with pytest.raises(ShareUsed, match="more would exceed its share"):
        buffer.take("slow", 63 * MIB, 0)
    assert buffer.used == 504 * MIB
    buffer.take("other", 20 * MIB, 0)


def test_large_bodies_of_many_clients_leave_a_reserve_for_small_ones():
    buffer = Buffer(1024 * MIB, 0.5)
    for i in range(14):
        buffer.take(str(i), 64 * MIB, 0)
    assert buffer.used == 7 / 8 * 1024 * MIB
    with pytest.raises(Unavailable, match="try again later"):
        buffer.take("large", 5 * MIB, 0)
    for i in range(32):
        buffer.take(f"small {i}", SMALL_BYTES, 0)
    assert buffer.used <= 1024 * MIB
    with pytest.raises(Unavailable):
        buffer.take("late", SMALL_BYTES, 0)


def test_a_request_that_is_alone_is_never_refused():
    buffer = Buffer(100, 0.1)
    buffer.take("a", 1000, 0)
    buffer.take("a", 1000, 1000)
    with pytest.raises(ShareUsed):
        buffer.take("a", 1, 0)  # another request of the same client
    assert buffer.used == 2000
    buffer.add("a", -2000)
    assert buffer.used == 0


def test_a_client_is_a_key_or_an_address():
    class Principal:
        key_id = "k1"

    class Nobody:
        key_id = None

    assert client_of(Principal(), "192.0.2.1") == "key:k1"
    assert client_of(Nobody(), "192.0.2.1") == client_of(None, "192.0.2.1") == "address:192.0.2.1"
    assert client_of(None, "2001:db8::1") == client_of(None, "2001:db8::ffff") == "address:2001:db8::/64"


async def test_a_task_inherits_the_sender():
    current_sender.set(A)

    async def sender() -> Sender:
        return current_sender.get()

    task = asyncio.create_task(sender())
    current_sender.set(ITSELF)
    assert await task == A


def test_work_that_is_cancelled_before_its_turn_is_not_kept():
    class Body:
        pass

    threads, gate, body = FairThreads(1, "test"), threading.Event(), Body()
    threads.submit(A, lambda: gate.wait(10))
    cancelled = threads.submit(A, lambda body=body: body)
    last, kept = threads.submit(B, lambda: "last"), weakref.ref(body)
    del body
    assert cancelled.cancel()
    assert kept() is None
    gate.set()
    assert last.result(10) == "last"
    threads.shutdown()


def test_long_work_of_one_client_leaves_a_thread_to_the_others():
    threads, gate = FairThreads(2, "test"), threading.Event()
    long = [threads.submit(A, lambda: gate.wait(10)) for _ in range(5)]
    assert threads.submit(B, lambda: "b").result(5) == "b"
    assert sum(each.running() for each in long) == 2
    gate.set()
    assert all(each.result(10) for each in long)
    threads.shutdown()


async def test_long_work_of_one_client_leaves_a_slot_to_the_others():
    slots, gate, began = FairSlots(2), asyncio.Event(), []

    async def occupy(sender: Sender, name: str) -> None:
        async with slots.turn(sender):
            began.append(name)
            await gate.wait()

    tasks = [asyncio.create_task(occupy(A, "a")) for _ in range(5)]
    tasks.append(asyncio.create_task(occupy(B, "b")))
    await until(lambda: began == ["a", "a", "b"])
    for task in tasks[1:3]:
        task.cancel()
    await until(lambda: began == ["a", "a", "b", "a"])
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with slots.turn(A), slots.turn(A), slots.turn(B):
        pass

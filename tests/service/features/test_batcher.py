"""Batching by itself: shapes, bounds, the departed, failures, a worker that dies or hangs."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from service.errors import EngineFailed, ModelUnavailable, QueueFull, ShuttingDown
from service.features.batcher import Batcher
from service.telemetry import Metrics
from tests.fakes import FakeEngine, WorkerKilled, until


def image(value: float = 0.0, side: int = 28) -> np.ndarray:
    return np.full((3, side, side), value, np.float32)


@asynccontextmanager
async def batching(engine: FakeEngine, **bounds) -> AsyncIterator[Batcher]:
    settings = {"batch_max_patches": 32, "queue_max_images": 100, "queue_max_patches": 1000} | bounds
    batcher = Batcher(lambda x: list(engine.run(x).cls), patch_size=14, metrics=Metrics(), **settings)
    try:
        yield batcher
    finally:
        if engine.gate is not None:
            engine.gate.set()
        batcher.close()


async def held(batcher: Batcher, engine: FakeEngine) -> asyncio.Future:
    """Put the engine into a pass that lasts until its gate opens."""
    engine.gate = threading.Event()
    engine.entered.clear()
    first = batcher.submit(image(-1))
    await until(engine.entered.is_set)
    return first


async def test_an_idle_engine_takes_one_image_at_once():
    engine = FakeEngine()
    async with batching(engine) as batcher:
        done = await batcher.submit(image(0.5))
    np.testing.assert_array_equal(done.row, engine.run(image(0.5)[None]).cls[0])
    assert engine.batches[0] == (1, 3, 28, 28)


async def test_what_waits_becomes_the_next_batch_bounded_by_patches_in_order():
    engine = FakeEngine()
    async with batching(engine, batch_max_patches=16) as batcher:
        first = await held(batcher, engine)
        rest = [batcher.submit(image(i)) for i in range(10)]  # 4 patches each
        engine.gate.set()
        await asyncio.gather(first, *rest)
        for value, future in enumerate(rest):
            np.testing.assert_allclose(future.result().row, engine.run(image(value)[None]).cls[0], atol=1e-6)
    assert [shape[0] for shape in engine.batches[:4]] == [1, 4, 4, 2]


async def test_only_images_of_one_shape_share_a_batch_and_none_starves():
    engine = FakeEngine()
    async with batching(engine) as batcher:
        first = await held(batcher, engine)
        rest = [batcher.submit(image(0, side)) for side in (28, 56, 28, 56, 28)]
        engine.gate.set()
        await asyncio.gather(first, *rest)
    assert engine.batches == [(1, 3, 28, 28), (3, 3, 28, 28), (2, 3, 56, 56)]


async def test_an_image_larger_than_a_batch_still_goes_alone():
    engine = FakeEngine()
    async with batching(engine, batch_max_patches=4) as batcher:
        await batcher.submit(image(0, 56))  # 16 patches
    assert engine.batches == [(1, 3, 56, 56)]


async def test_the_departed_cost_no_engine_time():
    engine = FakeEngine()
    async with batching(engine) as batcher:
        first = await held(batcher, engine)
        rest = [batcher.submit(image(i)) for i in range(4)]
        rest[1].cancel()
        rest[2].cancel()
        engine.gate.set()
        await asyncio.gather(first, rest[0], rest[3])
    assert [shape[0] for shape in engine.batches] == [1, 2]


async def test_a_full_queue_refuses_with_a_retry_after_from_the_measured_rate():
    engine = FakeEngine(delay_s=0.1)
    async with batching(engine, queue_max_images=30, queue_max_patches=8) as batcher:
        await batcher.submit(image())  # about 10 images a second, seen from here on
        batcher.reserve(30)
        with pytest.raises(QueueFull) as by_images:
            batcher.reserve(1)
        assert by_images.value.headers["Retry-After"] in ("3", "4", "5", "6")
        batcher.release(30)
        first = await held(batcher, engine)
        waiting = [batcher.submit(image()), batcher.submit(image())]  # 8 patches
        assert batcher.full
        with pytest.raises(QueueFull):
            batcher.submit(image())
        engine.gate.set()
        await asyncio.gather(first, *waiting)


async def test_reserving_takes_all_or_nothing():
    async with batching(FakeEngine(), queue_max_images=5) as batcher:
        batcher.reserve(3)
        with pytest.raises(QueueFull):
            batcher.reserve(3)
        batcher.reserve(2)
        assert batcher.images == 5


async def test_a_poison_image_fails_alone():
    engine = FakeEngine(fails=lambda pixels: bool((pixels == 13).any()))
    async with batching(engine) as batcher:
        first = await held(batcher, engine)
        rest = [batcher.submit(image(value)) for value in (1, 13, 2)]
        engine.gate.set()
        outcomes = await asyncio.gather(first, *rest, return_exceptions=True)
        assert isinstance(outcomes[2], EngineFailed)
        assert "secret" not in outcomes[2].detail
        for outcome, value in ((outcomes[1], 1), (outcomes[3], 2)):
            np.testing.assert_allclose(outcome.row, engine.run(image(value)[None]).cls[0], atol=1e-6)
        assert batcher.health() is None
        await batcher.submit(image(3))  # and the worker goes on


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_dead_worker_fails_everything_and_says_so():
    engine = FakeEngine()
    async with batching(engine) as batcher:
        first = await held(batcher, engine)
        waiting = batcher.submit(image())
        engine.killed = True
        engine.gate.set()
        outcomes = await asyncio.gather(first, waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineFailed, EngineFailed]
        await until(lambda: batcher.health() is not None)
        assert "died" in batcher.health()
        with pytest.raises(ModelUnavailable):
            batcher.submit(image())
        with pytest.raises(ModelUnavailable):
            batcher.reserve(1)
    assert issubclass(WorkerKilled, BaseException)


async def test_a_hung_worker_is_seen():
    engine = FakeEngine()
    async with batching(engine, hang_timeout_s=0.05) as batcher:
        first = await held(batcher, engine)
        await until(lambda: batcher.health() is not None)
        assert "one forward pass" in batcher.health()
        engine.gate.set()
        await first
        await until(lambda: batcher.health() is None)


async def test_closing_fails_what_waits_and_refuses_more():
    engine = FakeEngine()
    async with batching(engine) as batcher:
        first = await held(batcher, engine)
        waiting = batcher.submit(image())
        threading.Timer(0.05, engine.gate.set).start()
        batcher.close()
        await first
        with pytest.raises(ShuttingDown):
            await waiting
        with pytest.raises(ShuttingDown):
            batcher.submit(image())


async def test_wrong_number_of_rows_is_an_engine_failure():
    batcher = Batcher(
        lambda pixels: [],
        patch_size=14,
        metrics=Metrics(),
        batch_max_patches=8,
        queue_max_images=8,
        queue_max_patches=64,
    )
    with pytest.raises(EngineFailed):
        await batcher.submit(image())
    batcher.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_what_comes_after_the_workers_death_is_refused_before_its_thread_has_ended():
    engine = FakeEngine()
    async with batching(engine) as batcher:
        first = await held(batcher, engine)
        deliver, last = batcher._deliver, threading.Event()

        def slow_to_end(outcomes):
            deliver(outcomes)
            last.wait(10)

        batcher._deliver = slow_to_end
        engine.killed = True
        engine.gate.set()
        try:
            with pytest.raises(EngineFailed):
                await first
            assert batcher._thread.is_alive()
            with pytest.raises(ModelUnavailable):
                batcher.submit(image())
        finally:
            last.set()

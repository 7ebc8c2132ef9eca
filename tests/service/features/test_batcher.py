"""Tests of the batcher alone: shapes, limits, clients that leave, failures, and a worker that dies or hangs."""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from service.clients import ITSELF, Sender, current_sender
from service.errors import EngineFailed, ModelUnavailable, QueueFull, ShareUsed, ShuttingDown
from service.features import batcher as service_batcher
from service.features import engine_faults
from service.features.batcher import OUTPUTS_PER_PATCH, Batcher
from service.features.engine_faults import MOST_FAILED, EngineFaults
from service.telemetry import Metrics
from tests.fakes import FakeEngine, WorkerKilled, until


def image(value: float = 0.0, side: int = 28) -> np.ndarray:
    return np.full((3, side, side), value, np.float32)


@asynccontextmanager
async def batching(engine: FakeEngine, *, metrics: Metrics | None = None, **bounds) -> AsyncIterator[Batcher]:
    settings = {"batch_max_patches": 32, "queue_max_images": 100, "queue_max_patches": 1000} | bounds
    batcher = Batcher(
        lambda x, outputs: list(engine.run(x).cls), patch_size=14, metrics=metrics or Metrics(), **settings
    )
    try:
        yield batcher
    finally:
        if engine.gate is not None:
            engine.gate.set()
        batcher.close()


async def held(batcher: Batcher, engine: FakeEngine) -> asyncio.Future:
    """Start an engine pass that lasts until the engine's gate opens."""
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


async def test_batches_share_one_buffer_and_keep_their_own_features():
    engine = FakeEngine()
    taken = []

    def run(pixels, outputs):
        taken.append(pixels)
        return list(engine.run(pixels).cls)

    batcher = Batcher(
        run, patch_size=14, batch_max_patches=16, queue_max_images=100, queue_max_patches=1000, metrics=Metrics()
    )
    try:
        rows = []
        for first in (0, 3):
            held_back = await held(batcher, engine)
            futures = [batcher.submit(image(first + i)) for i in range(3)]
            engine.gate.set()
            rows += [done.row for done in await asyncio.gather(held_back, *futures)][1:]
            engine.gate = None
    finally:
        batcher.close()
    pairs = [pixels for pixels in taken if len(pixels) == 3]
    assert np.shares_memory(pairs[0], pairs[1])
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row, engine.run(image(i)[None]).cls[0])


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


async def test_images_of_another_shape_keep_their_place():
    engine = FakeEngine()
    async with batching(engine, batch_max_patches=20) as batcher:
        first = await held(batcher, engine)
        rest = [batcher.submit(image(0, side)) for side in (28, 56, 42, 28, 28, 28, 28, 28)]  # 4, 16, 9, 4, ... patches
        engine.gate.set()
        await asyncio.gather(first, *rest)
    assert [(shape[0], shape[2]) for shape in engine.batches[1:]] == [(5, 28), (1, 56), (1, 42), (1, 28)]


async def test_images_that_need_other_outputs_are_not_in_one_batch():
    ran: list[tuple[int, tuple[str, ...]]] = []
    gate = threading.Event()

    def run(pixels: np.ndarray, outputs: tuple[str, ...]) -> list[int]:
        gate.wait(5)
        ran.append((len(pixels), outputs))
        return [0] * len(pixels)

    limits = {"batch_max_patches": 32, "queue_max_images": 8, "queue_max_patches": 64}
    batcher = Batcher(run, patch_size=14, metrics=Metrics(), **limits)
    first = batcher.submit(image())
    await until(lambda: batcher.waiting == 0)
    keys = ("keys.0",)
    rest = [batcher.submit(image(), outputs) for outputs in ((), keys, (), keys, ())]
    gate.set()
    await asyncio.gather(first, *rest)
    batcher.close()
    assert ran == [(1, ()), (3, ()), (2, keys)]


async def test_an_image_with_many_outputs_counts_for_more_patches():
    sizes: list[int] = []
    gate = threading.Event()

    def run(pixels: np.ndarray, outputs: tuple[str, ...]) -> list[int]:
        gate.wait(5)
        sizes.append(len(pixels))
        return [0] * len(pixels)

    limits = {"batch_max_patches": 32, "queue_max_images": 8, "queue_max_patches": 100}
    batcher = Batcher(run, patch_size=14, metrics=Metrics(), **limits)
    outputs = tuple(f"keys.{i}" for i in range(OUTPUTS_PER_PATCH))  # each image counts for 2 * 4 patches
    first = batcher.submit(image())
    await until(lambda: batcher.waiting == 0)
    rest = [batcher.submit(image(), outputs) for _ in range(5)]
    gate.set()
    await asyncio.gather(first, *rest)
    batcher.close()
    assert sizes == [1, 4, 1]


def submit_as(batcher: Batcher, sender: Sender, pixels: np.ndarray) -> asyncio.Future:
    token = current_sender.set(sender)
    try:
        return batcher.submit(pixels)
    finally:
        current_sender.reset(token)


async def test_an_image_of_another_client_is_in_the_next_batch_however_many_wait():
    engine = FakeEngine()
    async with batching(engine, batch_max_patches=16) as batcher:
        first = await held(batcher, engine)
        many = [submit_as(batcher, Sender("many", 1), image(i)) for i in range(12)]  # 3 batches
        one = submit_as(batcher, Sender("one", 2), image(100))
        engine.gate.set()
        await asyncio.gather(first, one, *many)
    assert not [future for future in many if future.result().started < one.result().started]
    assert [shape[0] for shape in engine.batches] == [1, 4, 4, 4, 1]


async def test_a_client_cannot_delay_others_with_images_of_many_shapes():
    engine = FakeEngine()
    async with batching(engine) as batcher:
        first = await held(batcher, engine)
        many = [submit_as(batcher, Sender("many", 1), image(0, 14 * side)) for side in (1, 2, 3, 4, 5)]
        one = submit_as(batcher, Sender("one", 2), image(0, 14 * 9))
        engine.gate.set()
        await asyncio.gather(first, one, *many)
    assert [shape[2] // 14 for shape in engine.batches] == [2, 1, 9, 2, 3, 4, 5]


async def test_a_client_that_has_used_its_share_does_not_keep_others_out():
    async with batching(FakeEngine(), queue_max_images=100, client_share=0.5) as batcher:
        batcher.reserve(40, "many")
        batcher.reserve(10, "many")
        with pytest.raises(ShareUsed, match="50 images of this client are in the queue") as refused:
            batcher.reserve(1, "many")
        assert refused.value.headers["Retry-After"] == "1"
        assert not batcher.full
        batcher.reserve(40, "other")
        batcher.release(50, "many")
        batcher.reserve(30, "many")
        with pytest.raises(QueueFull):
            batcher.reserve(31, "third")


async def test_the_queue_is_not_full_if_one_client_alone_has_filled_it():
    async with batching(FakeEngine(), queue_max_images=5, client_share=0.5) as batcher:
        batcher.reserve(5, "many")
        assert not batcher.full
        batcher.release(1, "many")
        batcher.reserve(1, "other")
        assert batcher.full


async def test_patches_are_shared_out_too():
    engine = FakeEngine()
    async with batching(engine, queue_max_patches=40, client_share=0.5) as batcher:
        first = await held(batcher, engine)
        many = [submit_as(batcher, Sender("many", 1), image()) for _ in range(5)]  # 4 patches each
        with pytest.raises(ShareUsed, match="20 patches of this client"):
            submit_as(batcher, Sender("many", 2), image())
        many.append(submit_as(batcher, Sender("other", 3), image()))
        many.append(submit_as(batcher, ITSELF, image()))
        engine.gate.set()
        await asyncio.gather(first, *many)
        assert batcher.patches == 0


async def test_patches_of_mixed_shapes_are_given_back():
    engine = FakeEngine()
    async with batching(engine, queue_max_patches=64) as batcher:
        for _ in range(3):
            first = await held(batcher, engine)
            rest = [batcher.submit(image(0, side)) for side in (28, 56, 28, 42, 56)]
            assert batcher.patches == 4 + 16 + 4 + 9 + 16
            engine.gate.set()
            await asyncio.gather(first, *rest)
            assert batcher.patches == 0
            assert not batcher.full
        await held(batcher, engine)
        batcher.submit(image(0, 84))
        submit_as(batcher, Sender("other", 1), image(0, 56))
        submit_as(batcher, Sender("third", 2), image(0, 42))
        assert not batcher.full
        submit_as(batcher, Sender("fourth", 3), np.zeros((3, 14, 42), np.float32))
        assert batcher.full  # 36 + 16 + 9 + 3 patches


async def test_patches_are_counted_along_both_sides():
    engine = FakeEngine()
    async with batching(engine, batch_max_patches=8) as batcher:
        first = await held(batcher, engine)
        wide = [batcher.submit(np.zeros((3, 28, 56), np.float32)) for _ in range(2)]  # 2 x 4 patches
        engine.gate.set()
        await asyncio.gather(first, *wide)
    assert [shape[0] for shape in engine.batches] == [1, 1, 1]


async def test_one_image_above_the_limit_is_accepted_when_nothing_waits():
    engine = FakeEngine()
    async with batching(engine, queue_max_patches=8) as batcher:
        first = await held(batcher, engine)
        large = batcher.submit(image(0, 56))  # 16 patches
        with pytest.raises(QueueFull):
            batcher.submit(image())
        engine.gate.set()
        await asyncio.gather(first, large)
        await batcher.submit(image(0, 56))


async def test_an_image_larger_than_a_batch_still_goes_alone():
    engine = FakeEngine()
    async with batching(engine, batch_max_patches=4) as batcher:
        await batcher.submit(image(0, 56))  # 16 patches
    assert engine.batches == [(1, 3, 56, 56)]


async def test_the_departed_cost_no_engine_time():
    engine, metrics = FakeEngine(), Metrics()
    async with batching(engine, queue_max_patches=16, metrics=metrics) as batcher:
        first = await held(batcher, engine)
        rest = [batcher.submit(image(i)) for i in range(4)]
        rest[1].cancel()
        rest[2].cancel()
        engine.gate.set()
        await asyncio.gather(first, rest[0], rest[3])
        assert not batcher.full  # their patches are given back
    assert [shape[0] for shape in engine.batches] == [1, 2]
    assert metrics.registry.get_sample_value("dinov2_dropped_images_total") == 2
    assert batcher.patches == 0


async def test_whoever_leaves_a_batch_that_fails_is_not_tried_singly():
    engine = FakeEngine(fails=lambda pixels: len(pixels) > 1)
    async with batching(engine) as batcher:
        first = await held(batcher, engine)
        rest = [batcher.submit(image(i)) for i in range(3)]
        engine.entered.clear()
        gate, engine.gate = engine.gate, threading.Event()  # the next pass waits at a gate of its own
        gate.set()
        await until(engine.entered.is_set)
        rest[1].cancel()
        engine.gate.set()
        await asyncio.gather(first, rest[0], rest[2])
    assert [shape[0] for shape in engine.batches] == [1, 3, 1, 1]


async def test_time_in_the_queue_and_in_the_pass_are_told_apart():
    engine = FakeEngine()
    async with batching(engine) as batcher:
        started = time.perf_counter()
        first = await held(batcher, engine)
        waiting = batcher.submit(image())
        await asyncio.sleep(0.03)
        engine.gate.set()
        done = await first
        assert done.infer_s >= 0.03
        assert done.queue_s + done.infer_s <= time.perf_counter() - started
        assert (await waiting).queue_s >= 0.03


async def test_the_figures_count_images_and_failed_passes():
    engine, metrics = FakeEngine(fails=lambda pixels: bool((pixels == 13).any())), Metrics()
    async with batching(engine, metrics=metrics) as batcher:
        first = await held(batcher, engine)
        rest = [batcher.submit(image(value)) for value in (1, 2, 3)]
        engine.gate.set()
        await asyncio.gather(first, *rest)
        with pytest.raises(EngineFailed):
            await batcher.submit(image(13))
        batcher.reserve(3)
        assert batcher.images == 3
        batcher.release(2)
        assert batcher.images == 1
    assert metrics.registry.get_sample_value("dinov2_images_total") == 4
    assert metrics.registry.get_sample_value("dinov2_batch_images_sum") == 4
    assert metrics.registry.get_sample_value("dinov2_engine_errors_total") == 1


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
        waiting = [batcher.submit(image()), submit_as(batcher, Sender("other", 1), image())]  # 8 patches
        assert batcher.full
        with pytest.raises(QueueFull):
            batcher.submit(image())
        engine.gate.set()
        await asyncio.gather(first, *waiting)


async def test_retry_after_follows_the_rate_and_is_bounded():
    async with batching(FakeEngine(), queue_max_images=1000) as batcher:
        assert batcher.retry_after_s() == 1  # nothing is measured yet
        batcher.reserve(100)
        batcher._images_per_s = 10.0
        assert batcher.retry_after_s() == 10
        batcher._images_per_s = 9.9
        assert batcher.retry_after_s() == 11
        batcher._images_per_s = 0.5
        assert batcher.retry_after_s() == 60
        batcher._images_per_s = 1e6
        assert batcher.retry_after_s() == 1


async def test_the_rate_counts_the_images_of_a_batch_and_changes_slowly(monkeypatch):
    two_s_later = itertools.count(0.0, 2.0)  # each look at the clock; a pass takes two
    monkeypatch.setattr(
        service_batcher, "time", SimpleNamespace(perf_counter=lambda: next(two_s_later), monotonic=time.monotonic)
    )
    engine = FakeEngine()
    async with batching(engine) as batcher:
        first = await held(batcher, engine)
        rest = [batcher.submit(image()) for _ in range(8)]
        engine.gate.set()
        await asyncio.gather(first, *rest)
        assert batcher._images_per_s == pytest.approx(0.8 * 1 / 2 + 0.2 * 8 / 2)


async def test_reserving_takes_all_or_nothing():
    async with batching(FakeEngine(), queue_max_images=5) as batcher:
        batcher.reserve(3)
        with pytest.raises(QueueFull):
            batcher.reserve(3)
        assert not batcher.full
        batcher.reserve(2, "other")
        assert batcher.images == 5
        assert batcher.full


async def test_a_poison_image_fails_alone():
    engine = FakeEngine(fails=lambda pixels: bool((pixels == 13).any()))
    async with batching(engine) as batcher:
        first = await held(batcher, engine)
        rest = [batcher.submit(image(value)) for value in (1, 13, 2)]
        engine.gate.set()
        outcomes = await asyncio.gather(first, *rest, return_exceptions=True)
        assert isinstance(outcomes[2], EngineFailed)
        assert "secret" not in outcomes[2].detail
        assert "told to fail" in str(outcomes[2].__cause__)  # for the log
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
        await asyncio.sleep(0.06)
        assert batcher.health() is None  # waiting for work is no hang


class Broken:
    """An engine that raises `error` as soon as one is set. `probe` is the pass that is known to work."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.passes = self.probes = 0

    def run(self, pixels: np.ndarray, outputs: tuple[str, ...]) -> list[float]:
        self.passes += 1
        if self.error is not None:
            raise self.error
        return [0.0] * len(pixels)

    def probe(self) -> None:
        self.probes += 1
        if self.error is not None:
            raise self.error


@asynccontextmanager
async def breaking() -> AsyncIterator[tuple[Broken, Batcher]]:
    engine, limits = Broken(), {"batch_max_patches": 32, "queue_max_images": 100, "queue_max_patches": 1000}
    batcher = Batcher(engine.run, patch_size=14, metrics=Metrics(), probe=engine.probe, **limits)
    try:
        yield engine, batcher
    finally:
        batcher.close()


async def test_a_sticky_error_of_the_gpu_ends_the_worker_at_once():
    async with breaking() as (engine, batcher):
        await batcher.submit(image())
        engine.error = RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0")
        with pytest.raises(EngineFailed):
            await batcher.submit(image())
        await until(lambda: not batcher._thread.is_alive())
        assert "the GPU has failed" in batcher.health()
        assert (engine.passes, engine.probes) == (2, 0)
        engine.error = None
        with pytest.raises(ModelUnavailable, match=r"the GPU has failed.*must be restarted"):
            batcher.submit(image())
        with pytest.raises(ModelUnavailable):
            batcher.reserve(1)


async def test_a_batch_is_not_tried_singly_after_a_sticky_error():
    async with breaking() as (engine, batcher):
        engine.error = RuntimeError("CUDA error: unspecified launch failure")
        with batcher._wake:  # so that all images are in one batch
            futures = [batcher.submit(image()) for _ in range(5)]
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [EngineFailed] * 5
    assert engine.passes == 1


async def test_an_engine_that_fails_with_input_that_is_known_to_work_is_not_healthy_until_it_works_again(monkeypatch):
    monkeypatch.setattr(engine_faults, "PROBE_S", 0.01)
    async with breaking() as (engine, batcher):
        engine.error = RuntimeError("CUDA out of memory")
        with pytest.raises(EngineFailed):
            await batcher.submit(image())
        await until(lambda: batcher.health() is not None)
        assert "forward passes in a row have failed" in batcher.health()
        assert engine.probes >= MOST_FAILED
        engine.error = None
        await until(lambda: batcher.health() is None)  # it is probed although no image waits
        probes = engine.probes
        await batcher.submit(image())
        await asyncio.sleep(0.05)
    assert engine.probes == probes


async def test_one_failed_probe_is_not_enough_and_images_that_fail_never_are():
    engine = FakeEngine(fails=lambda pixels: bool((pixels == 13).any()))
    async with batching(engine, probe=lambda: engine.run(image()[None])) as batcher:
        for _ in range(2 * MOST_FAILED):
            with pytest.raises(EngineFailed):
                await batcher.submit(image(13))
            assert batcher.health() is None
    faults = EngineFaults(lambda: 1 / 0)
    for _ in range(MOST_FAILED):
        assert faults.fault is None
        faults.failed(RuntimeError("out of memory"))
    assert "3 forward passes" in faults.fault


async def test_closing_fails_what_waits_and_refuses_more():
    engine = FakeEngine()
    async with batching(engine) as batcher:
        first = await held(batcher, engine)
        waiting = batcher.submit(image())
        threading.Timer(0.3, engine.gate.set).start()
        batcher.close()
        await first
        async with asyncio.timeout(5):
            with pytest.raises(ShuttingDown):
                await waiting
        with pytest.raises(ShuttingDown) as refused:
            batcher.submit(image())
        assert refused.value.headers["Retry-After"] == "1"


@pytest.mark.parametrize("rows", [0, 2])
async def test_wrong_number_of_rows_is_an_engine_failure(rows):
    batcher = Batcher(
        lambda pixels, outputs: [0.0] * rows,
        patch_size=14,
        metrics=Metrics(),
        batch_max_patches=8,
        queue_max_images=8,
        queue_max_patches=64,
    )
    with pytest.raises(EngineFailed, match="failed on this image"):
        await batcher.submit(image())
    assert batcher.health() is None  # the worker goes on
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

"""Tests of what the workers of one service know about each other: their metrics as one page, and who has started."""

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as open_metrics

from service import siblings
from service.siblings import Place, Siblings, bury, dumped, merged
from tests.fakes import running


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: the path of a socket has at most 108 characters."""
    made = Path(tempfile.mkdtemp())
    yield made
    shutil.rmtree(made)


class Process:
    """The metrics of a worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("requests", "Requests.", ["route"], registry=self.registry)
        self.seconds = Histogram("seconds", "Time.", buckets=(0.1, 1.0), registry=self.registry)
        self.queue = Gauge("queue", "Images.", registry=self.registry)
        self.asked = 0

    async def observed(self) -> CollectorRegistry:
        self.asked += 1
        return self.registry


def test_counters_and_histograms_are_added_up_and_gauges_are_by_worker() -> None:
    one, two = Process(), Process()
    one.requests.labels("/a").inc(3)
    two.requests.labels("/a").inc(4)
    two.requests.labels("/b").inc(5)
    one.seconds.observe(0.05, {"trace_id": "t"})
    two.seconds.observe(0.5)
    one.queue.set(7)
    two.queue.set(8)
    page = merged([("0", dumped(one.registry)), ("1", dumped(two.registry)), ("", dumped(two.registry))])
    lines = generate_latest(page).decode().splitlines()
    assert {
        'requests_total{route="/a"} 11.0',
        'requests_total{route="/b"} 10.0',
        'seconds_bucket{le="0.1"} 1.0',
        'seconds_bucket{le="1.0"} 3.0',
        'seconds_bucket{le="+Inf"} 3.0',
        "seconds_count 3.0",
        "seconds_sum 1.05",
        'queue{worker="0"} 7.0',
        'queue{worker="1"} 8.0',
    } == {line for line in lines if not line.startswith("#")}
    assert lines.count("# TYPE requests_total counter") == 1
    assert 'trace_id="t"' in open_metrics(page).decode()


async def test_each_worker_answers_for_all(folder: Path) -> None:
    processes = [Process(), Process(), Process()]
    workers = [Siblings(Place(number, 3, folder, 0)) for number in range(3)]
    for number, process in enumerate(processes):
        process.requests.labels("/a").inc(10**number)
        process.queue.set(number)
    async with (
        workers[0].answering(processes[0].observed),
        workers[1].answering(processes[1].observed),
        workers[2].answering(processes[2].observed),
    ):
        pages = [
            generate_latest(await worker.page(process.registry))
            for worker, process in zip(workers, processes, strict=True)
        ]
    assert len(set(pages)) == 1
    assert b'requests_total{route="/a"} 111.0' in pages[0]
    assert [b'queue{worker="%d"} %d.0' % (number, number) in pages[0] for number in range(3)] == [True] * 3
    assert [process.asked for process in processes] == [2, 2, 2]


async def test_a_sum_never_becomes_smaller(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that hangs, that is killed, and that is started again keeps what was shown of it."""
    monkeypatch.setattr(siblings, "PAGE_LIMIT_S", 20)
    one, two = Process(), Process()
    place = Place(1, 2, folder, 0)
    two.requests.labels("/a").inc(5)
    two.queue.set(1)

    async def hangs() -> CollectorRegistry:
        await asyncio.Event().wait()
        return two.registry

    async def page() -> tuple[bool, bool]:
        """Return whether the counter of the second worker and its gauge are shown."""
        text = generate_latest(await Siblings(Place(0, 2, folder, 0)).page(one.registry))
        return b'requests_total{route="/a"} 5.0' in text, b'queue{worker="1"}' in text

    assert await page() == (False, False)  # has not started
    async with Siblings(place).answering(two.observed):
        assert await page() == (True, True)
    monkeypatch.setattr(siblings, "PAGE_LIMIT_S", 0.05)
    async with Siblings(place).answering(hangs):
        assert await page() == (True, False)
    monkeypatch.setattr(siblings, "PAGE_LIMIT_S", 20)
    bury(place)
    assert await page() == (True, False)
    async with Siblings(place).answering(Process().observed):
        assert await page() == (True, True)
    bury(place)
    bury(place)  # a worker that has ended before it was asked
    assert await page() == (True, False)


async def test_a_service_is_ready_when_all_workers_have_started(tmp_path: Path, folder: Path) -> None:
    own = Siblings(Place(0, 2, folder, 0))
    own.mark_ready("hello")
    async with running(tmp_path) as run:
        run.app.state.siblings = own
        waiting = await run.client.get("/readyz")
        Siblings(Place(1, 2, folder, 0)).mark_ready("hello")
        ready = await run.client.get("/readyz")
        Place(1, 2, folder, 0).path("ready").unlink()
        again = await run.client.get("/readyz")
        metrics = (await run.client.get("/metrics")).text
    assert (waiting.status_code, waiting.json()["reasons"]) == (503, {"workers": "1 have not started yet"})
    assert (ready.status_code, again.status_code) == (200, 200)
    assert 'dinov2_engine_up{worker="0"} 1.0' in metrics
    assert 'dinov2_requests_total{method="GET",route="/readyz",status="503"} 1.0' in metrics

"""What the workers of one service know about each other: whether all of them have started, and their metrics.

`service/workers.py` starts the workers. They share a private folder, in which each of them has up to three files, named
after its number n:

    n.ready    exists since the worker first answered requests; contains the startup message
    n.sock     a socket; to connect to it makes the worker write its metrics
    n.json     the metrics of the worker, as it last wrote them
    *.ended    the metrics of workers that have ended

Prometheus reads one of the workers, which answers for all. It adds up counters and histograms, and gives each gauge the
label `worker`. What it adds up is only what is in the files, so a sum never becomes smaller when a worker dies:
Prometheus would take that for a restart, and count everything again.
"""

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from model.files import write_bytes, write_text

log = logging.getLogger(__name__)

PAGE_LIMIT_S: Final = 2.0
"""The time limit for the metrics of another worker, in seconds. If it is exceeded, its gauges are left out."""
_SUMMED: Final = frozenset({"counter", "histogram"})
_Series = tuple[str, tuple[tuple[str, str], ...]]  # the name of a sample, and its labels


@dataclass(frozen=True)
class Place:
    """The place of a worker among the workers of a service. `folder` is their private folder, `port` the port that all
    of them listen on, and `is_restart` says that the worker replaces one that has ended."""

    number: int
    count: int
    folder: Path
    port: int
    is_restart: bool = False

    def path(self, kind: str) -> Path:
        """Return the path of a file of this worker."""
        return self.folder / f"{self.number}.{kind}"


class Siblings:
    """The workers of a service, as one of them sees them."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._have_started = False
        self._writing = asyncio.Lock()  # an older page must not replace a newer one

    def mark_ready(self, greeting: str) -> None:
        """Note that this worker answers requests. `greeting` is the startup message."""
        write_text(self.place.path("ready"), greeting)

    @property
    def starting(self) -> int:
        """The number of workers that have never answered requests. A worker that is started again does not count."""
        if not self._have_started:
            ready = len(list(self.place.folder.glob("*.ready")))
            self._have_started = ready >= self.place.count
            return self.place.count - ready
        return 0

    @contextlib.asynccontextmanager
    async def answering(self, observed: Callable[[], Awaitable[Collector]]) -> AsyncIterator[None]:
        """Write the metrics of this worker whenever another worker asks for them. `observed` returns them."""

        async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await self._write(await observed())
            except Exception:
                log.exception("the metrics cannot be written for another worker")
            finally:
                writer.close()

        path = self.place.path("sock")
        path.unlink(missing_ok=True)  # of a worker that was killed
        server = await asyncio.start_unix_server(answer, str(path))
        try:
            yield
        finally:
            server.close()

    async def page(self, own: Collector) -> Collector:
        """Return the metrics of all workers. `own` contains those of this worker."""
        place = self.place
        others = [number for number in range(place.count) if number != place.number]
        answers = await asyncio.gather(self._write(own), *(self._ask(number) for number in others))
        current = {place.number, *(number for number, has in zip(others, answers[1:], strict=True) if has)}
        return await asyncio.to_thread(_read_all, place.folder, current)

    async def _write(self, own: Collector) -> bool:
        async with self._writing:
            data = await asyncio.to_thread(dumped, own)
            await asyncio.to_thread(write_bytes, self.place.path("json"), data)
        return True

    async def _ask(self, number: int) -> bool:
        """Make another worker write its metrics. Return whether it did."""
        try:
            async with asyncio.timeout(PAGE_LIMIT_S):
                reader, writer = await asyncio.open_unix_connection(str(self.place.folder / f"{number}.sock"))
                with contextlib.closing(writer):
                    await reader.read()
        except (OSError, TimeoutError) as error:
            log.warning("worker %d does not answer with its metrics: %s", number, error or "time limit")
            return False
        return True


def bury(place: Place) -> None:
    """Keep the counters of a worker that has ended."""
    with contextlib.suppress(FileNotFoundError):
        place.path("json").rename(place.folder / f"{place.number}-{uuid.uuid4().hex}.ended")


# ---- pages


class _Page:
    """Metrics that were read from files."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def dumped(collector: Collector) -> bytes:
    """Return metrics as JSON."""
    return json.dumps(
        [
            [
                family.name,
                family.documentation,
                family.type,
                [[each.name, each.labels, each.value, each.exemplar] for each in family.samples],
            ]
            for family in collector.collect()
        ]
    ).encode()


def merged(pages: Iterable[tuple[str, bytes]]) -> Collector:
    """Return the metrics of several pages as one page. Each page comes with the number of its worker, or with an empty
    text if only its counters and histograms count."""
    families: dict[str, Metric] = {}
    sums: dict[str, dict[_Series, float]] = {}  # by the name of the family
    exemplars: dict[_Series, Exemplar] = {}
    for worker, page in pages:
        for name, text, kind, samples in json.loads(page):
            family = families.setdefault(name, Metric(name, text, kind))
            for sample, labels, value, exemplar in samples:
                if kind in _SUMMED:
                    series, of_family = (sample, tuple(labels.items())), sums.setdefault(name, {})
                    of_family[series] = of_family.get(series, 0.0) + value
                    if exemplar is not None:
                        exemplars[series] = Exemplar(*exemplar)
                elif worker:
                    family.add_sample(sample, labels | {"worker": worker}, value)
    for name, of_family in sums.items():
        for series, value in of_family.items():
            families[name].add_sample(series[0], dict(series[1]), value, exemplar=exemplars.get(series))
    return _Page([family for family in families.values() if family.samples])


def _read_all(folder: Path, current: set[int]) -> Collector:
    """Return the metrics in all files of a folder. Only the workers in `current` have gauges that are up to date."""
    while True:
        pages: list[tuple[str, bytes]] = []
        try:
            for path in sorted(folder.iterdir()):
                if path.suffix == ".json":
                    pages.append((path.stem if int(path.stem) in current else "", path.read_bytes()))
                elif path.suffix == ".ended":
                    pages.append(("", path.read_bytes()))
        except FileNotFoundError:  # the worker has ended in the meantime, so its file has another name
            continue
        return merged(pages)

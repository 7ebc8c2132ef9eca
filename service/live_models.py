"""Keep the models that this process has loaded in step with the record of generations.

Every process watches the record (service/generations.py). When a candidate appears, it loads the candidate in a thread
while it goes on answering. When another generation becomes live, requests that begin from then on use its model, and
requests that have begun keep theirs. A model that is retired is closed when no request can use it any more.
"""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

from model.artifact import Artifact
from model.engines.protocol import Engine, Tried
from model.files import lock_file
from service.assembly import with_model
from service.errors import ServiceError
from service.generations import LOADED, Generation, Generations
from service.retiring import end_window
from service.search.partners import migrations_of
from service.state import Service
from service.tags import model_of

log = logging.getLogger(__name__)

POLL_S: Final = 0.2
BEAT_S: Final = 1.0
RETRY_S: Final = 10.0
TIDY_S: Final = 5.0
TELL_S: Final = 60.0
CLOSE_AFTER_S: Final = 5.0
"""The time in seconds that a retired model is kept beyond the deadline of requests, which may still use it."""


class Opened(NamedTuple):
    """A model that has been loaded: its artifact, its engine, and the engines that were tried."""

    artifact: Artifact
    engine: Engine
    tried: tuple[Tried, ...] = ()


Load = Callable[[Generation], Opened]


@dataclass(frozen=True)
class Record:
    """The record of generations, the generation with which this process starts, and the function that loads others."""

    generations: Generations
    first: Generation
    load: Load


class LiveModels:
    """The models of one process. `service` is the service with the first model. `on_live` is called with the service of
    the live generation after each change of the record."""

    def __init__(self, service: Service, record: Record, on_live: Callable[[Service], Awaitable[None]]) -> None:
        self._base = service
        self._record = record
        self._on_live = on_live
        self._replica = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._loaded: dict[int, Service] = {record.first.number: service}
        self._live = record.first.number
        self._stamp = -1
        self._retry_at = self._beat_at = self._tidy_at = self._tell_at = 0.0
        self._closing: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._register()

    async def start(self) -> None:
        """Load the models of the record, note in it that this process is running, and begin to watch it.

        The models are loaded before the first request, so that every write reaches both sets of vectors of a collection
        that has two.
        """
        self._stamp = self._record.generations.stamp()
        await self._follow()
        await self._beat()
        self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop watching, and close the models that were loaded since the start."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await asyncio.sleep(0)  # a task that is cancelled before it runs would not close its model
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        for service in self._loaded.values():
            if service is not self._base:  # the application closes its first model
                await _close(service)
        with suppress(ServiceError):
            await asyncio.to_thread(self._record.generations.leave, self._replica)

    async def _watch(self) -> None:
        while True:
            try:
                await self._step()
            except ServiceError as error:
                if time.monotonic() >= self._tell_at:
                    self._tell_at = time.monotonic() + TELL_S
                    log.error("%s", error.detail)
            except Exception:
                log.exception("the record of models")
            await asyncio.sleep(POLL_S)

    async def _step(self) -> None:
        now, stamp = time.monotonic(), self._record.generations.stamp()
        if stamp != self._stamp or (self._retry_at and now >= self._retry_at):
            self._retry_at = 0.0
            await self._follow()
            self._stamp = stamp
        if now >= self._beat_at:
            await self._beat()
        if now >= self._tidy_at:
            self._tidy_at = now + TIDY_S
            await self._end_windows()

    async def _follow(self) -> None:
        """Load, promote and release models until this process has those of the record."""
        wanted = [each for each in await asyncio.to_thread(self._record.generations.all) if each.state in LOADED]
        self._base.loaded.expected = frozenset(each.model for each in wanted)
        for model in self._base.loaded.failures.keys() - self._base.loaded.expected:
            del self._base.loaded.failures[model]
        for generation in sorted(wanted, key=lambda each: each.state != "live"):
            if generation.number not in self._loaded:
                await self._load(generation)
        live = next((each for each in wanted if each.state == "live"), None)
        self._base.loaded.is_behind = live is not None and live.number not in self._loaded
        if live is not None and live.number != self._live and live.number in self._loaded:
            self._live = live.number
            log.info("generation %d is live: %s (%s)", live.number, live.name, live.precision)
        numbers = {each.number for each in wanted} | {self._live}
        for number in self._loaded.keys() - numbers:
            self._release(number)
        self._register()
        self._set_metrics(wanted)
        await self._on_live(self._loaded[self._live])

    async def _load(self, generation: Generation) -> None:
        log.info("loading generation %d: %s", generation.number, generation.name)
        try:
            opened = await asyncio.to_thread(self._record.load, generation)
            service = with_model(self._base, opened.artifact, opened.engine, opened.tried)
            try:
                await service.pipeline.warm_up()
            except BaseException:
                await _close(service)
                raise
        except Exception as error:
            known = isinstance(error, (ValueError, OSError, ModuleNotFoundError, ServiceError))
            log.error("generation %d cannot be loaded: %s", generation.number, error, exc_info=not known)
            self._base.loaded.failures[generation.model] = str(error) if known else "see the log of the service"
            self._retry_at = time.monotonic() + RETRY_S
            return
        self._base.loaded.failures.pop(generation.model, None)
        self._loaded[generation.number] = service
        self._register()
        await self._beat()

    def _release(self, number: int) -> None:
        """Stop using a model, and close it when no request can use it any more."""
        service = self._loaded.pop(number)
        if service is self._base:
            return  # the application closes its first model

        async def close() -> None:
            try:
                await asyncio.sleep(service.settings.request_deadline_s + CLOSE_AFTER_S)
            finally:
                await _close(service)

        task = asyncio.create_task(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _register(self) -> None:
        services = self._loaded.values()
        self._base.loaded.services = {(each.artifact.fingerprint, each.engine.precision): each for each in services}

    async def _beat(self) -> None:
        self._beat_at = time.monotonic() + BEAT_S
        await asyncio.to_thread(self._record.generations.beat, self._replica, list(self._loaded))

    async def _end_windows(self) -> None:
        """End the window of a former generation whose time is over: delete its vectors, then retire it. Also delete
        former vectors of models that are not loaded any more. A running migration may still need them, so this waits
        for its end."""
        if not (await self._ended() or await self._forgotten()):
            return
        lock = lock_file(self._base.settings.data_dir / "migration.lock")
        if lock is None:
            return
        with lock:
            for former in await self._ended():
                await end_window(self._base.store, self._record.generations, former)
            for name in await self._forgotten():
                await migrations_of(self._base.store).end(name)

    async def _ended(self) -> list[Generation]:
        """Return the former generations whose window is over."""
        now = time.time()
        every = await asyncio.to_thread(self._record.generations.all)
        return [
            each for each in every if each.state == "former" and each.keep_until is not None and each.keep_until < now
        ]

    async def _forgotten(self) -> list[str]:
        """Return the collections with former vectors of a model that is not loaded any more. This happens if the
        operator starts the service with a third model while the window is open, or if a migration was killed after the
        switch."""
        if "migrations" not in self._base.store.capabilities:
            return []
        formers = [each for each in await migrations_of(self._base.store).partnerships() if each.role == "former"]
        if not formers:
            return []
        every = await asyncio.to_thread(self._record.generations.all)
        models = {each.model for each in every if each.state in LOADED}
        return [each.collection.name for each in formers if model_of(each.partner.tag) not in models]

    def _set_metrics(self, wanted: list[Generation]) -> None:
        metrics = self._base.metrics
        metrics.generation.set(self._live)
        metrics.model_info.clear()
        for each in wanted:
            if (service := self._loaded.get(each.number)) is not None:
                name, engine = service.artifact.manifest.name, service.engine
                labels = (name, each.fingerprint, engine.name, engine.precision, each.state)
                metrics.model_info.labels(*labels).set(1)


async def _close(service: Service) -> None:
    await service.pipeline.close()
    await asyncio.to_thread(service.engine.close)

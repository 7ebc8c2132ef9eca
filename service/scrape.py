"""Set the metrics that describe the state at the moment: the queue, the engine, the cache, the disk, the last backup,
and the jobs. `GET /metrics` calls this before it answers."""

import asyncio
import logging
import shutil
from contextlib import suppress
from typing import Final, cast

from service.backup import last_backup
from service.errors import ServiceError
from service.features.batcher import Batcher
from service.features.forward import Row
from service.jobs.opened import OpenedJobs
from service.jobs.records import STATES
from service.search.partners import migrations_of
from service.search.store import HealthStore, StoreHealth
from service.state import Service
from service.tags import model_of, tag_parts
from service.telemetry import Metrics

STORE_LIMIT_S: Final = 2.0
"""The time limit for asking the vector store about the models of its collections, in seconds."""
CACHE_LIMIT_S: Final = 1.0
"""The time limit for asking the cache for its status, in seconds."""

log = logging.getLogger(__name__)


async def observe(service: Service, jobs: OpenedJobs) -> None:
    """Set the metrics of the state at the moment. A part that cannot be observed does not affect the others."""
    metrics = service.metrics
    _observe_queues(service)
    metrics.cache_up.set(await _cache_works(service))
    folder = service.settings.data_dir
    try:
        disk = await asyncio.to_thread(shutil.disk_usage, folder)
    except OSError as error:
        log.warning("metrics of the disk of %s: %s", folder, error)
    else:
        metrics.disk_free_bytes.set(disk.free)
        metrics.disk_bytes.set(disk.total)
    health = await storage_health(service)
    metrics.data_dir_in_place.set(not health.is_replaced)
    metrics.damaged_collections.set(len(health.damaged))
    metrics.writes_refused.set(health.is_full)
    await observe_collections(service)
    backup = await asyncio.to_thread(last_backup, folder)
    metrics.last_backup.set(0 if backup is None else backup)
    await _observe_jobs(jobs, metrics)


async def storage_health(service: Service) -> StoreHealth:
    """Return what is wrong with the vector store and with the folder of the stored images. If the store cannot tell,
    nothing is wrong with it."""
    health = StoreHealth()
    if "health" in service.store.capabilities:
        with suppress(ServiceError):  # its other routes tell the reason
            health = await cast(HealthStore, service.store).health()
    return health if service.originals.is_in_place() else health._replace(is_replaced=True)


async def _observe_jobs(jobs: OpenedJobs, metrics: Metrics) -> None:
    """Set the metrics of jobs. Without a job store there are no jobs. The zeros are set nevertheless, because an alert
    compares the number of failed jobs with an earlier one."""
    try:
        figures = await asyncio.to_thread(jobs.figures)
    except ServiceError as error:
        log.warning("metrics of jobs: %s", error)
        return
    for state in STATES:
        metrics.jobs.labels(state).set(0 if figures is None else figures.counts[state])
    metrics.jobs_blocked.set(0 if figures is None else figures.blocked)
    if figures is not None:
        metrics.job_quiet.set(figures.quiet_s)
        metrics.worker_heartbeat_age.set(figures.silent_s)


def _observe_queues(service: Service) -> None:
    """Set the metrics of the queues of all loaded models, added up."""
    metrics, all_batchers = service.metrics, batchers(service)
    metrics.queue_images.set(sum(batcher.images for batcher in all_batchers))
    metrics.queue_patches.set(sum(batcher.patches for batcher in all_batchers))
    metrics.buffered_bytes.set(service.lifecycle.buffer.used)
    metrics.queue_age.set(max(batcher.oldest_s for batcher in all_batchers))
    metrics.engine_up.set(all(batcher.health() is None for batcher in all_batchers))


def batchers(service: Service) -> list[Batcher[Row]]:
    """Return the batchers of all loaded models."""
    pipelines = dict.fromkeys(each.pipeline for each in (service, *service.loaded.services.values()))
    return [pipeline.batcher for pipeline in pipelines]


async def observe_collections(service: Service) -> list[str]:
    """Set the metrics of the collections that have no vectors of the live model. Return the names of those that cannot
    be searched by image, because their model is not loaded."""
    live = (service.artifact.fingerprint, service.engine.precision)
    loaded = {live, *service.loaded.services}
    metrics, unsearchable, pending = service.metrics, [], 0
    metrics.items_without_live_vector.clear()
    try:
        async with asyncio.timeout(STORE_LIMIT_S):
            for info in await service.store.collections():
                model = model_of(info.tag)
                if model != live and info.count:
                    metrics.items_without_live_vector.labels(info.name).set(info.count)
                if model not in loaded and tag_parts(info.tag).pooling is not None:
                    unsearchable.append(info.name)
            if "migrations" in service.store.capabilities:
                pending = await migrations_of(service.store).pending()
    except (ServiceError, TimeoutError) as error:
        log.warning("metrics of the models of the collections: %s", error or "the vector store does not answer")
    metrics.unsearchable_collections.set(len(unsearchable))
    metrics.migration_pending_items.set(pending)
    service.loaded.unsearchable = len(unsearchable)
    return unsearchable


async def _cache_works(service: Service) -> bool:
    try:
        async with asyncio.timeout(CACHE_LIMIT_S):
            return await service.pipeline.cache.status() == "ok"
    except TimeoutError:
        return False

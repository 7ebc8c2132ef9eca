"""Set the metrics that describe the state at the moment: the queue, the engine, the cache, the disk and the last
backup. `GET /metrics` calls this before it answers."""

import asyncio
import logging
import shutil
from typing import Final

from service.backup import last_backup
from service.state import Service

CACHE_LIMIT_S: Final = 1.0
"""The time limit for asking the cache for its status, in seconds."""

log = logging.getLogger(__name__)


async def observe(service: Service) -> None:
    """Set the metrics of the state at the moment. A part that cannot be observed does not affect the others."""
    metrics, batcher = service.metrics, service.pipeline.batcher
    metrics.queue_age.set(batcher.oldest_s)
    metrics.engine_up.set(batcher.health() is None)
    metrics.cache_up.set(await _cache_works(service))
    folder = service.settings.data_dir
    try:
        disk = await asyncio.to_thread(shutil.disk_usage, folder)
    except OSError as error:
        log.warning("metrics of the disk of %s: %s", folder, error)
    else:
        metrics.disk_free_bytes.set(disk.free)
        metrics.disk_bytes.set(disk.total)
    backup = await asyncio.to_thread(last_backup, folder)
    metrics.last_backup.set(0 if backup is None else backup)


async def _cache_works(service: Service) -> bool:
    try:
        async with asyncio.timeout(CACHE_LIMIT_S):
            return await service.pipeline.cache.status() == "ok"
    except TimeoutError:
        return False

"""Report liveness, readiness and metrics: /livez, /readyz and /metrics.

`/livez` fails if the worker thread that runs the network has died or hangs, or if the engine is broken. The service
must then be restarted. `/readyz` fails if requests cannot be served at the moment: the service is not warmed up or is
shutting down, the worker thread has failed, the queue is full, the data folder was removed or replaced, or another
worker of the service has not started yet. If Redis
fails, requests are still answered but nothing is cached, so /readyz answers 200 with the status `degraded`. It does the
same if the disk is full or a collection is damaged: a service that is not ready gets no requests, but searches and the
deletions that make space still work. Anyone may call these routes, so the answers name only the kind of fault. The log
has the full error, which may include the address of Redis.
"""

import asyncio
import logging
import re
from collections.abc import Mapping
from typing import Any, Final, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from service.answer_schemas import LivezAnswer, ReadyzAnswer
from service.errors import ServiceError
from service.routes.answers import Content, JsonAnswer, json_response
from service.routes.describe import Operation, describe
from service.routes.direct import DirectRoute, service_of
from service.scrape import batchers, observe, storage_health
from service.search.store import StoreHealth, UsageStore, VectorStore
from service.siblings import Siblings
from service.state import Service
from service.telemetry import Metrics

log = logging.getLogger(__name__)
USAGE_LIMIT_S: Final = 2.0
"""The time limit for asking the vector store about its collections, in seconds."""
router = APIRouter(tags=["health"], route_class=DirectRoute)


@router.get("/livez", summary="Check liveness")
@describe(Operation(statuses=(200, 503)))
async def livez(request: Request) -> JsonAnswer[LivezAnswer]:
    """Return 200 if the process is healthy. Return 503 with the reason if the process must be restarted, because the
    thread that runs the network has died or hangs, or because the GPU has failed."""
    fault = next(filter(None, (batcher.health() for batcher in batchers(service_of(request)))), None)
    return _answer({"status": "alive"} if fault is None else {"status": "dead", "reason": fault}, fault is None)


@router.get("/readyz", summary="Check readiness")
@describe(Operation(statuses=(200, 503)))
async def readyz(request: Request) -> JsonAnswer[ReadyzAnswer]:
    """Return 200 if requests can be served at the moment, and 503 with the reasons otherwise. The field `status` is
    `ready` or `degraded` with 200, and `unready` with 503. `degraded` means that some requests are slower, because the
    cache has failed, or are refused, because the disk is full or a collection is damaged."""
    service = service_of(request)
    batcher = service.pipeline.batcher
    health = await storage_health(service)
    checks = {
        "shutdown": "shutting down" if service.lifecycle.draining else None,
        "warm_up": None if service.lifecycle.warm else "not warmed up",
        "worker": batcher.health(),
        "queue": "full" if batcher.full else None,
        "generation": "loading the live model" if service.loaded.is_behind else None,
        "storage": "the data folder was removed or replaced" if health.is_replaced else None,
        "workers": _starting(request.app.state.siblings),
    }
    reasons = {name: fault for name, fault in checks.items() if fault is not None}
    cache = service.pipeline.cache
    cache_status = await cache.status()
    _log_change(request.app.state, cache_status)
    shown_status = cache_status if cache_status == "ok" else _kind_of_fault(cache_status)
    body: ReadyzAnswer = {
        "status": "ready" if not reasons else "unready",
        "model": service.artifact.name,
        "fingerprint": service.artifact.fingerprint,
        "cache": {"name": cache.name, "status": shown_status},
        "unsearchable_collections": service.loaded.unsearchable,
    }
    refused = _refused(health)
    if reasons or refused:
        body["reasons"] = refused | reasons
    if (cache_status != "ok" or refused) and not reasons:
        body["status"] = "degraded"
    return _answer(body, not reasons)


def _starting(siblings: Siblings | None) -> str | None:
    """Return that other workers are starting, or None if there are no others or all have started."""
    starting = 0 if siblings is None else siblings.starting
    return f"{starting} have not started yet" if starting else None


def _refused(health: StoreHealth) -> dict[str, str]:
    """Return the reasons for which a service that is ready refuses some requests."""
    reasons = {}
    if health.is_full:
        reasons["storage"] = "the disk is full: writes are refused, deletions are not"
    if health.damaged:
        reasons["collections"] = f"{len(health.damaged)} damaged"
    return reasons


@router.get("/metrics", summary="Get Prometheus metrics")
@describe(Operation(media_types=("text/plain", "application/openmetrics-text")))
async def metrics(request: Request) -> Response:
    """Return the metrics of the service in the text format of Prometheus, or in the format of OpenMetrics if the Accept
    header asks for it. Only OpenMetrics has the ids of traces. If the service has several workers, counters and
    histograms are added up, and each gauge has the label `worker`."""
    recorded = await observed(request.app.state)
    siblings: Siblings | None = request.app.state.siblings
    page = None if siblings is None else await siblings.page(recorded.registry)
    accept = request.headers.get("accept", "")
    content, content_type = await asyncio.to_thread(recorded.render_for, accept, page)  # takes up to 10 ms
    return Response(content, headers={"Content-Type": content_type})


async def observed(state: Any) -> Metrics:
    """Return the metrics of this process, after those of the state at the moment were set. `state` is the state of the
    application."""
    service: Service = state.service
    recorded = service.metrics
    await observe(service, state.jobs)
    try:
        async with asyncio.timeout(USAGE_LIMIT_S):
            recorded.set_usage(*await _usage(service.store))
    except (ServiceError, TimeoutError) as error:  # the other metrics matter most when the store is in trouble
        log.warning("metrics of the collections: %s", error or "the vector store does not answer")
        recorded.set_usage([], {})  # old values would look like current ones
    return recorded


async def _usage(store: VectorStore) -> tuple[list[tuple[str, int, int | None]], Mapping[str, int]]:
    """Return the name, the number of items and the disk space of each collection, and the disk space of the store's
    parts. If the store cannot measure disk space, it is None for each collection, and there are no parts."""
    if "usage" in store.capabilities:
        usage = await cast(UsageStore, store).usage()
        return [(one.name, one.items, one.disk_bytes) for one in usage.collections], usage.parts
    return [(info.name, info.count, None) for info in await store.collections()], {}


def _log_change(state: Any, status: str) -> None:
    """Log the status of the cache if it differs from the last status that was logged."""
    if status != state.cache_status:
        state.cache_status = status
        log.log(logging.INFO if status == "ok" else logging.WARNING, "cache: %s", status)


def _kind_of_fault(status: str) -> str:
    """Shorten the status of a failed cache to the word `degraded` and the class names of the exceptions. Addresses and
    messages are left out."""
    kinds = sorted(set(re.findall(r"(?<=: )[A-Za-z]+Error(?=:)", status)))
    return f"degraded: {', '.join(kinds)}" if kinds else "degraded"


def _answer(body: Content, good: bool) -> JsonAnswer[Content]:
    return json_response(body, status=200 if good else 503, headers={"Cache-Control": "no-store"})

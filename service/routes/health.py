"""Report liveness, readiness and metrics: /livez, /readyz and /metrics.

`/livez` fails if the worker thread that runs the network has died or hangs, or if the engine is broken. The service
must then be restarted. `/readyz` fails if requests cannot be served at the moment: the service is not warmed up or is
shutting down, the worker thread has failed, or the queue is full. If Redis fails, requests are still answered but
nothing is cached, so /readyz answers 200 with the status `degraded`. Anyone may call these routes, so the answers name
only the kind of fault. The log has the full error, which may include the address of Redis.
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
from service.scrape import batchers, observe
from service.search.store import UsageStore, VectorStore

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
    `ready` or `degraded` with 200, and `unready` with 503. `degraded` means that the cache has failed. Requests are
    then still served, but may take longer."""
    service = service_of(request)
    batcher = service.pipeline.batcher
    checks = {
        "shutdown": "shutting down" if service.lifecycle.draining else None,
        "warm_up": None if service.lifecycle.warm else "not warmed up",
        "worker": batcher.health(),
        "queue": "full" if batcher.full else None,
        "generation": "loading the live model" if service.loaded.is_behind else None,
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
    if reasons:
        body["reasons"] = reasons
    if cache_status != "ok" and not reasons:
        body["status"] = "degraded"
    return _answer(body, not reasons)


@router.get("/metrics", summary="Get Prometheus metrics")
@describe(Operation(media_types=("text/plain", "application/openmetrics-text")))
async def metrics(request: Request) -> Response:
    """Return the metrics of this process in the text format of Prometheus, or in the format of OpenMetrics if the
    Accept header asks for it. Only OpenMetrics has the ids of traces."""
    service = service_of(request)
    recorded = service.metrics
    await observe(service, request.app.state.jobs)
    try:
        async with asyncio.timeout(USAGE_LIMIT_S):
            recorded.set_usage(*await _usage(service.store))
    except (ServiceError, TimeoutError) as error:  # the other metrics matter most when the store is in trouble
        log.warning("metrics of the collections: %s", error or "the vector store does not answer")
        recorded.set_usage([], {})  # old values would look like current ones
    accept = request.headers.get("accept", "")
    content, content_type = await asyncio.to_thread(recorded.render_for, accept)  # takes up to 10 ms
    return Response(content, headers={"Content-Type": content_type})


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

"""Liveness, readiness and metrics: /livez, /readyz and /metrics. They need no model, cache or key.

`/livez` answers whether a restart would help. It fails if the worker thread that runs the network has died or hangs.
`/readyz` answers whether a request would be served now: the service is warmed up, not shutting down, and the queue has
room. If Redis is down, requests are still answered but nothing is cached. So /readyz answers 200 with the status
`degraded`. Anyone may call these routes, so the answer names only the kind of fault. The log has the full reason with
the address of Redis.
"""

import logging
import re
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service.routes.direct import DirectRoute, service_of

log = logging.getLogger(__name__)
router = APIRouter(tags=["health"], route_class=DirectRoute)


@router.get("/livez", summary="Check liveness")
async def livez(request: Request) -> JSONResponse:
    """Return 200 if the process is healthy. Return 503 with the reason if the thread that runs the network has died or
    hangs, so the process should be restarted."""
    fault = service_of(request).pipeline.batcher.health()
    return _answer({"status": "alive"} if fault is None else {"status": "dead", "reason": fault}, fault is None)


@router.get("/readyz", summary="Check readiness")
async def readyz(request: Request) -> JSONResponse:
    """Return 200 if a request would be served now, else 503 with the reasons. The status is `ready`, `degraded` or
    `unready`. `degraded` is a 200 and means that the cache is down, so requests are served but may be slower."""
    service = service_of(request)
    batcher = service.pipeline.batcher
    checks = {
        "shutdown": "shutting down" if service.lifecycle.draining else None,
        "warm_up": None if service.lifecycle.warm else "not warmed up",
        "worker": batcher.health(),
        "queue": "full" if batcher.full else None,
    }
    reasons = {name: fault for name, fault in checks.items() if fault is not None}
    body: dict[str, Any] = {"status": "ready" if not reasons else "unready", **service.identity()}
    if reasons:
        body["reasons"] = reasons
    cache = service.pipeline.cache
    cache_status = await cache.status()
    _log_change(request.app.state, cache_status)
    shown_status = cache_status if cache_status == "ok" else _kind_of_fault(cache_status)
    body["cache"] = {"name": cache.name, "status": shown_status}
    if cache_status != "ok" and not reasons:
        body["status"] = "degraded"
    return _answer(body, not reasons)


@router.get("/metrics", summary="Get Prometheus metrics")
async def metrics(request: Request) -> Response:
    """Return the metrics of this process in the text format of Prometheus."""
    recorded = service_of(request).metrics
    return Response(recorded.render(), media_type=recorded.content_type)


def _log_change(state: Any, status: str) -> None:
    """Log the status of the cache only if it differs from the last one that was logged."""
    if status != state.cache_status:
        state.cache_status = status
        log.log(logging.INFO if status == "ok" else logging.WARNING, "cache: %s", status)


def _kind_of_fault(status: str) -> str:
    """Return `degraded` with the names of the exceptions that occur in `status`, but without addresses and messages."""
    kinds = sorted(set(re.findall(r"(?<=: )[A-Za-z]+Error(?=:)", status)))
    return f"degraded: {', '.join(kinds)}" if kinds else "degraded"


def _answer(body: dict[str, Any], good: bool) -> JSONResponse:
    return JSONResponse(body, status_code=200 if good else 503, headers={"Cache-Control": "no-store"})

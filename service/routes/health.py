"""Liveness, readiness and metrics: /livez, /readyz and /metrics. They need no model, cache or key.

`/livez` answers whether a restart would help: it fails if the engine's worker thread has died or hangs. `/readyz`
answers whether a request would be served now: the service is warmed up, not shutting down, and the queue has room. A
Redis that is down costs cache hits but no answers, so the status is `degraded` and still 200. Anyone may call these
routes, so the answer names only the kind of fault. The log has the reason with Redis' address.
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
    """Return 200, or 503 with the reason if the engine's worker has died or hangs."""
    fault = service_of(request).pipeline.batcher.health()
    return _answer({"status": "alive"} if fault is None else {"status": "dead", "reason": fault}, fault is None)


@router.get("/readyz", summary="Check readiness")
async def readyz(request: Request) -> JSONResponse:
    """Return 200 if a request would be served now, else 503 with the reasons. `degraded` means that requests are served
    but slower."""
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
    """Return counters and histograms in Prometheus' text format."""
    recorded = service_of(request).metrics
    return Response(recorded.render(), media_type=recorded.content_type)


def _log_change(state: Any, status: str) -> None:
    """Log a change of the cache's status, but not every query."""
    if status != state.cache_status:
        state.cache_status = status
        log.log(logging.INFO if status == "ok" else logging.WARNING, "cache: %s", status)


def _kind_of_fault(status: str) -> str:
    """Return `degraded` with the exception names in the status, without addresses and messages."""
    kinds = sorted(set(re.findall(r"(?<=: )[A-Za-z]+Error(?=:)", status)))
    return f"degraded: {', '.join(kinds)}" if kinds else "degraded"


def _answer(body: dict[str, Any], good: bool) -> JSONResponse:
    return JSONResponse(body, status_code=200 if good else 503, headers={"Cache-Control": "no-store"})

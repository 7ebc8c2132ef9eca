"""Is it alive, can it answer, what has it done: /livez, /readyz, /metrics. No model, no cache and no key needed.

`/livez` asks whether a restart would help: the engine's worker thread lives and is not stuck. `/readyz` asks whether a
request would be answered now: warmed up, not shutting down, room in the queue. A Redis that is down costs cache hits,
not answers, so it is `degraded` and still 200. Anyone may ask, so the answer has the kind of fault only; the reason,
with Redis' address, is in the log.
"""

import logging
import re
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service.routes.direct import DirectRoute, service_of

log = logging.getLogger(__name__)
router = APIRouter(tags=["health"], route_class=DirectRoute)


@router.get("/livez", summary="Alive?")
async def livez(request: Request) -> JSONResponse:
    """200, or 503 with the reason when the engine's worker has died or hangs."""
    fault = service_of(request).pipeline.batcher.health()
    return _answer({"status": "alive"} if fault is None else {"status": "dead", "reason": fault}, fault is None)


@router.get("/readyz", summary="Ready?")
async def readyz(request: Request) -> JSONResponse:
    """200 when a request would be answered now, else 503 with the reasons; `degraded` names what only slows it."""
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


@router.get("/metrics", summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    """Counters and histograms in Prometheus' text format."""
    recorded = service_of(request).metrics
    return Response(recorded.render(), media_type=recorded.content_type)


def _log_change(state: Any, status: str) -> None:
    """One line when the cache's state changes, not one for each time that somebody asks."""
    if status != state.cache_status:
        state.cache_status = status
        log.log(logging.INFO if status == "ok" else logging.WARNING, "cache: %s", status)


def _kind_of_fault(status: str) -> str:
    """`degraded`, with the names of the exceptions that the reason begins its parts with: no addresses, no messages."""
    kinds = sorted(set(re.findall(r"(?<=: )[A-Za-z]+Error(?=:)", status)))
    return f"degraded: {', '.join(kinds)}" if kinds else "degraded"


def _answer(body: dict[str, Any], good: bool) -> JSONResponse:
    return JSONResponse(body, status_code=200 if good else 503, headers={"Cache-Control": "no-store"})

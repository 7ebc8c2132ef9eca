"""Build the application from the settings, the artifact (an exported model) and the engine. A request passes through
these layers:

    Border (id, limits, deadline, errors, metrics)  ->  dispatcher  ->  routes  ->  Pipeline, VectorStore

The dispatcher passes requests without a route of this service on to FastAPI.

The engine, the cache and the store can be passed in, so that tests can use fakes. The pipeline, the cache and the store
need a running event loop. So they are opened when the application starts, and closed in reverse order when it stops.
"""

import asyncio
import logging
import platform
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from model.artifact import Artifact
from model.engines.protocol import Engine, Tried
from service.assembly import opened_service
from service.errors import BadRequest, MethodNotAllowed, NotFound, ServiceError, StorageFailed
from service.features.cache import Cache
from service.jobs.opened import OpenedJobs
from service.limits import Limits
from service.live_models import LiveModels, Record
from service.middleware import Border, error_body
from service.routes import (
    add_items,
    aliases,
    analyze,
    classify,
    collections,
    duplicates,
    embeddings,
    find_region,
    health,
    items,
    job_events,
    jobs,
    models,
    openapi,
    originals,
    playground,
    schedules,
    search,
    vision,
)
from service.routes.direct import (
    accept_trailing_slash,
    allowed_methods,
    answers_get,
    dispatcher,
    find_route,
    head_route,
    protect,
    tell_root_path,
)
from service.scrape import observe_collections
from service.search import opening
from service.search.store import VectorStore
from service.security import Security
from service.settings import Settings
from service.siblings import Siblings
from service.state import Lifecycle, Service
from service.telemetry import Metrics
from service.tracing import Tracing, open_tracing

log = logging.getLogger(__name__)

RESOURCES: Final = (
    search,
    embeddings,
    models,
    collections,
    aliases,
    add_items,
    items,
    duplicates,
    find_region,
    originals,
    vision,
    analyze,
    classify,
    job_events,  # before `jobs`, because "events" would be the id of a job
    jobs,
    schedules,
    health,
    playground,
)
"""The modules with the routes. The first route that matches a path answers a request."""
SAVE_LAST_USED_S = 60.0
DESCRIPTION = """DINOv2 image features: embeddings, similarity search, segmentation, attention maps, depth, classes.

Errors are RFC 9457 problems (`application/problem+json`). On `/v1/embeddings` they have OpenAI's format."""


def create_app(
    settings: Settings,
    artifact: Artifact,
    engine: Engine,
    *,
    tried: tuple[Tried, ...] = (),
    cache: Cache | None = None,
    open_store: Callable[[], Awaitable[VectorStore]] | None = None,
    record: Record | None = None,
    siblings: Siblings | None = None,
) -> "App":
    """Build and return the application.

    Args:
        settings: the operator's settings.
        artifact: the exported model, already verified.
        engine: the engine that has loaded the model.
        tried: the engines that were tried at startup. /v1/models lists them.
        cache: the vector cache. If None, the cache that the settings specify is created.
        open_store: a function that opens the vector store. If None, the store that the settings specify is opened.
        record: the record of generations, which can change the model while the application runs. If None, the model
            stays the same.
        siblings: the other workers of the service. If None, there are none.
    """
    metrics = Metrics()
    tracing = open_tracing(
        settings.otlp_traces_url,
        settings.trace_ratio,
        _version(),
        on_spans=lambda result, count: metrics.spans.labels(result).inc(count),
    )
    limits, security = Limits.of(settings, metrics), Security(settings)
    lifecycle = Lifecycle.of(settings)
    start = _Start(
        settings, artifact, engine, tried, cache, open_store, metrics, tracing, limits, security, lifecycle, record
    )
    app = App(
        title="dinov2-service",
        version=_version(),
        description=DESCRIPTION,
        lifespan=partial(_lifespan, start=start),
        docs_url=None,  # FastAPI's pages load scripts from a CDN; `playground` has a page that works offline
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat the Host header, which the client chooses
    )
    app.state.border = start.border()
    app.state.security = security
    app.state.tracing = tracing
    app.state.lifecycle = lifecycle
    app.state.jobs = OpenedJobs(settings)
    app.state.streams = job_events.OpenStreams()
    app.state.siblings = siblings
    app.state.cache_status = "ok"  # the status that /readyz logged last
    app.state.root_path = settings.root_path
    app.state.web_files = playground.opened_files(settings)
    _add_routes(app)
    app.add_exception_handler(HTTPException, _framework_error)
    return app


def _add_routes(app: "App") -> None:
    """Add the routes of all resources to the application."""
    for route in app.routes:  # the framework's own, for instance /docs
        accept_trailing_slash(route)
        tell_root_path(route, app.state.root_path)
        protect(route)
    routes = [route for resource in RESOURCES for route in resource.router.routes]
    # Put the routes before the framework's own, without the wrappers that `include_router` would add.
    app.router.routes[:0] = [*routes, *(head_route(route) for route in routes if answers_get(route))]


@asynccontextmanager
async def _lifespan(app: FastAPI, *, start: "_Start") -> AsyncIterator[None]:
    """Open the parts of the service before the `yield`, and close them after it."""
    async with AsyncExitStack() as stack:
        if start.tracing is not None:
            stack.push_async_callback(start.tracing.close)
        stack.push_async_callback(asyncio.to_thread, app.state.jobs.close)
        service = app.state.service = await start.service(stack)
        if names := await observe_collections(service):
            log.warning(
                "the vectors of %s come from another model than the live one, %s: embed them again with dinov2 reindex",
                ", ".join(names),
                service.artifact.name,
            )
        if start.record is not None:
            service.generations = start.record.generations
            models = LiveModels(service, start.record, partial(_go_live, app))
            stack.push_async_callback(models.close)
            await models.start()
        if (siblings := app.state.siblings) is not None:
            await stack.enter_async_context(siblings.answering(partial(_registry, app)))
        yield
        start.lifecycle.draining = True


async def _registry(app: FastAPI) -> CollectorRegistry:
    return (await health.observed(app.state)).registry


class App(FastAPI):
    """A FastAPI application with a single layer of middleware around the routes of this service: `Border`
    (service/middleware.py). Each further layer would add measurable latency to a search. Starlette's
    ExceptionMiddleware only handles requests without such a route. FastAPI's other layers are not needed, because
    `Border` handles unexpected errors and no route has dependencies that need an exit stack."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, which /openapi.json serves."""
        if self.openapi_schema is None:
            about = {"title": self.title, "version": self.version, "description": self.description}
            about["server"] = self.state.root_path or "/"
            self.openapi_schema = openapi.document(self.routes, **about)
        return self.openapi_schema

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the layers. FastAPI's own method would first look for OpenTelemetry's settings in the
        environment on each request; `service/tracing.py` records traces."""
        if self.middleware_stack is None:
            self.middleware_stack = self.build_middleware_stack()
        scope["app"] = self
        await self.middleware_stack(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        framework = ExceptionMiddleware(self.router, handlers=dict(self.exception_handlers))
        direct = dispatcher(self.routes, otherwise=framework)
        border: ASGIApp = self.state.border(direct, find_route=partial(find_route, self.routes))
        return border


@dataclass(frozen=True)
class _Start:
    """The parts of a service that exist before the event loop runs. The method `service` creates the other parts."""

    settings: Settings
    artifact: Artifact
    engine: Engine
    tried: tuple[Tried, ...]
    cache: Cache | None
    open_store: Callable[[], Awaitable[VectorStore]] | None
    metrics: Metrics
    tracing: Tracing | None
    limits: Limits | None
    security: Security
    lifecycle: Lifecycle
    record: Record | None = None

    def border(self) -> "partial[Border]":
        """Return a function that puts the `Border` around an application."""
        return partial(
            Border,
            settings=self.settings,
            metrics=self.metrics,
            lifecycle=self.lifecycle,
            limits=self.limits,
            tracing=self.tracing,
            security=self.security,
        )

    async def service(self, stack: AsyncExitStack) -> Service:
        """Create the parts that need the event loop, warm up the engine, and return the service. Push callbacks that
        close these parts onto `stack`."""
        self.security.open()
        stack.push_async_callback(_stop_saving, asyncio.create_task(_save_last_used(self.security)), self.security)
        if self.limits is not None:
            stack.push_async_callback(self.limits.close)
        store = await self._store()
        stack.push_async_callback(store.close)
        parts = opened_service(
            self.settings,
            self.artifact,
            self.engine,
            store,
            tried=self.tried,
            cache=self.cache,
            metrics=self.metrics,
            lifecycle=self.lifecycle,
        )
        service = await stack.enter_async_context(parts)
        await service.pipeline.warm_up()
        self.lifecycle.warm = True
        self.metrics.build_info.labels(_version(), platform.python_version()).set(1)
        manifest, engine = self.artifact.manifest, self.engine
        labels = (manifest.name, manifest.fingerprint, engine.name, engine.precision, "live")
        self.metrics.model_info.labels(*labels).set(1)
        log.info("ready", extra={"fields": {**service.identity(), "settings": self.settings.shown()}})
        return service

    async def _store(self) -> VectorStore:
        if self.open_store is not None:
            return await self.open_store()
        return await opening.open_store(self.settings, on_recall=self._recall)

    def _recall(self, collection: str, ratio: float) -> None:
        self.metrics.index_recall.labels(collection).set(ratio)


async def _save_last_used(security: Security) -> None:
    """Store every minute when the API keys were last used."""
    while True:
        await asyncio.sleep(SAVE_LAST_USED_S)
        with suppress(StorageFailed):  # the times are only information
            await security.save_last_used()


async def _stop_saving(task: asyncio.Task[None], security: Security) -> None:
    """Stop the task that `_save_last_used` runs in, and store the times a last time."""
    task.cancel()
    with suppress(StorageFailed):
        await security.save_last_used()


async def _go_live(app: FastAPI, service: Service) -> None:
    """Use another model for the requests that begin from now on."""
    app.state.service = service
    await observe_collections(service)


async def _framework_error(request: Request, error: Exception) -> Response:
    """Return the response for an error that FastAPI or Starlette raised, for instance because no route has the
    requested path. It has the same format as the responses for the service's own errors."""
    state = request.scope["state"]
    # A sender without a key does not learn which routes there are.
    translated = state["denial"] if "denial" in state else _translated(request, error)
    request.state.error = translated  # for the access log
    content_type, body = error_body(translated, request.url.path, request.state.request_id, request.app.state.root_path)
    return Response(
        body, status_code=translated.status, headers=translated.headers, media_type=content_type.decode("ascii")
    )


def _translated(request: Request, error: Exception) -> ServiceError:
    assert isinstance(error, HTTPException)
    if error.status_code == NotFound("").status:
        return NotFound(f"there is no route {request.url.path[:200]!r}: see /docs for all routes")
    if error.status_code == MethodNotAllowed("").status:
        allowed = ", ".join(allowed_methods(request))
        return MethodNotAllowed(
            f"{request.method} is not allowed here; allowed methods: {allowed}", headers={"Allow": allowed}
        )
    return BadRequest(str(error.detail)) if error.status_code < 500 else ServiceError("an internal error")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dinov2-service")
    except PackageNotFoundError:  # run from a checkout without installation
        return "unknown"

"""The only wiring: settings, artifact and engine become a running application.

    Border (id, limits, deadline, errors, metrics)  ->  FastAPI  ->  routes  ->  Pipeline, VectorStore

Collaborators are passed in, so a test gives a fake engine. What needs the event loop (pipeline, cache, store) is made
when the application starts and closed when it stops, in the opposite order.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp

from model.artifact import Artifact
from model.decode import DecodeLimits
from model.engines.protocol import Engine, Tried
from service.errors import BadRequest, InvalidRequest, MethodNotAllowed, NotFound, ServiceError
from service.features.cache import Cache, make_cache
from service.features.pipeline import Pipeline
from service.middleware import Border, error_body
from service.originals import Originals
from service.routes import (
    add_items,
    aliases,
    collections,
    duplicates,
    embeddings,
    health,
    items,
    models,
    search,
    segment,
)
from service.search.opening import open_store
from service.search.store import VectorStore
from service.settings import Settings
from service.state import Service
from service.telemetry import Metrics

log = logging.getLogger(__name__)

DESCRIPTION = """DINOv2 image features: embeddings, similarity search, segmentation.

Errors are RFC 9457 problems (`application/problem+json`); on `/v1/embeddings` they have OpenAI's shape."""


def create_app(
    settings: Settings,
    artifact: Artifact,
    engine: Engine,
    *,
    tried: tuple[Tried, ...] = (),
    cache: Cache | None = None,
    open_vectors: Callable[[], Awaitable[VectorStore]] | None = None,
) -> FastAPI:
    """The application.

    Args:
        settings: what the operator chose.
        artifact, engine: the verified model and the runtime that has it loaded.
        tried: the engines that were tried before it, for /v1/models.
        cache: None makes the one that the settings ask for.
        open_vectors: opens the vector store; None opens the one that the settings name.
    """
    service = Service(settings=settings, artifact=artifact, engine=engine, metrics=Metrics(), tried=tried)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await _start(service, stack, cache, open_vectors)
            yield
            service.draining = True

    app = _App(
        title="dinov2-service",
        version=_version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,  # the redirect's address would be made of the Host header, which the client chooses
    )
    app.state.service = service
    app.state.cache_status = "ok"  # what /readyz has logged last
    resources = (search, embeddings, models, collections, aliases, add_items, items, duplicates, segment, health)
    # In front of the framework's own, and not wrapped once more, as `include_router` would.
    app.router.routes[:0] = [route for resource in resources for route in resource.router.routes]
    app.add_exception_handler(HTTPException, _framework_error)
    app.add_exception_handler(RequestValidationError, _framework_error)
    return app


class _App(FastAPI):
    """FastAPI with the border around its router instead of its own layers, each of which a search would feel; what they
    do (errors, a limit on bodies, exit stacks of dependencies) the border does, or no route needs."""

    def build_middleware_stack(self) -> ASGIApp:
        return Border(ExceptionMiddleware(self.router, handlers=dict(self.exception_handlers)), self.state.service)


async def _start(
    service: Service,
    stack: AsyncExitStack,
    cache: Cache | None,
    open_vectors: Callable[[], Awaitable[VectorStore]] | None,
) -> None:
    """Make what needs the event loop, warm the engine up, and leave with `stack` how each is closed."""
    settings, metrics, artifact = service.settings, service.metrics, service.artifact

    def measured(collection: str, ratio: float) -> None:
        metrics.index_recall.labels(collection).set(ratio)

    service.store = await (open_vectors() if open_vectors else open_store(settings, on_recall=measured))
    stack.push_async_callback(service.store.close)
    service.originals = Originals(settings.originals_place)
    stack.push_async_callback(service.originals.close)
    service.cache = (
        cache
        if cache is not None
        else make_cache(
            settings.redis_url if settings.cache_bytes else None,
            max_bytes=settings.cache_bytes,
            ttl_s=settings.cache_ttl_s,
            on_event=lambda event: metrics.cache_events.labels(event).inc(),
        )
    )
    stack.push_async_callback(service.cache.close)
    service.pipeline = Pipeline(
        artifact,
        service.engine,
        service.cache,
        metrics,
        limits=DecodeLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels),
        decode_workers=settings.decode_workers,
        batch_max_patches=settings.batch_max_patches,
        queue_max_images=settings.queue_max_images,
        queue_max_patches=settings.queue_max_patches,
        hang_timeout_s=settings.hang_timeout_s,
        patch_cache_bytes=settings.patch_cache_bytes,
    )
    stack.push_async_callback(service.pipeline.close)
    await service.pipeline.warm_up()
    service.warm = True
    metrics.model_info.labels(
        artifact.manifest.name, artifact.fingerprint, service.engine.name, service.engine.precision
    ).set(1)
    log.info("ready", extra={"fields": {**service.identity(), "settings": settings.shown()}})


async def _framework_error(request: Request, error: Exception) -> Response:
    """The framework's own errors in the shapes of ours."""
    translated = _translated(request, error)
    content_type, body = error_body(translated, request.url.path, request.state.request_id)
    return Response(
        body, status_code=translated.status, headers=translated.headers, media_type=content_type.decode("ascii")
    )


def _translated(request: Request, error: Exception) -> ServiceError:
    if isinstance(error, RequestValidationError):
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        return InvalidRequest("; ".join(problems))
    assert isinstance(error, HTTPException)
    if error.status_code == NotFound("").status:
        return NotFound(f"no route {request.url.path[:200]!r}: /docs lists them")
    if error.status_code == MethodNotAllowed("").status:
        allowed = (error.headers or {}).get("Allow", "")
        return MethodNotAllowed(f"{request.method} is not allowed here: {allowed}", headers=error.headers)
    return BadRequest(str(error.detail)) if error.status_code < 500 else ServiceError("an internal error")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dinov2-service")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"

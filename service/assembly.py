"""Put the parts of a `Service` together. The application does this when it starts, and a command that needs a service
does it without a web server."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial

from model.artifact import Artifact
from model.cpus import available_cpus
from model.engines.general import open_general
from model.engines.protocol import Engine, Tried
from service.features.cache import Cache, make_cache
from service.features.decode_memory import DecodeMemory
from service.features.decode_processes import DecodeProcesses
from service.features.images import Decoding
from service.features.patch_store import patch_store_of
from service.features.pipeline import Pipeline, PipelineLimits
from service.features.served_model import ServedModel
from service.originals import Originals
from service.search.store import VectorStore
from service.settings import Settings
from service.state import Lifecycle, Service
from service.telemetry import Metrics
from service.web_images import WebImages


@asynccontextmanager
async def opened_service(
    settings: Settings,
    artifact: Artifact,
    engine: Engine,
    store: VectorStore,
    *,
    tried: tuple[Tried, ...] = (),
    cache: Cache | None = None,
    metrics: Metrics | None = None,
    lifecycle: Lifecycle | None = None,
) -> AsyncIterator[Service]:
    """Open the parts that need a running event loop, yield the service, and close these parts at the end. The store
    stays open.

    Args:
        settings: the operator's settings.
        artifact: the exported model.
        engine: the engine that has loaded the model.
        store: the vector store.
        tried: the engines that were tried, in order.
        cache: the vector cache. If None, the cache that the settings specify is created.
        metrics, lifecycle: these objects of the process. If None, new ones are created.
    """
    metrics, lifecycle = metrics or Metrics(), lifecycle or Lifecycle.of(settings)
    async with AsyncExitStack() as stack:
        originals = Originals(settings.originals_place, max_bytes=settings.max_originals_bytes)
        stack.push_async_callback(originals.close)
        cache = _cache(settings, metrics) if cache is None else cache
        stack.push_async_callback(cache.close)
        processes = DecodeProcesses(on_death=lambda reason: metrics.decode_process_deaths.labels(reason).inc())
        stack.callback(processes.close)
        decoding = Decoding(DecodeMemory(settings.memory_for_decoding), processes)
        pipeline = make_pipeline(settings, artifact, engine, cache, metrics, decoding)
        stack.push_async_callback(pipeline.close)
        web_images = WebImages(
            settings, lifecycle.buffer, on_result=lambda result: metrics.image_urls.labels(result).inc()
        )
        stack.push_async_callback(web_images.close)
        yield Service(
            settings=settings,
            artifact=artifact,
            engine=engine,
            tried=tried,
            metrics=metrics,
            lifecycle=lifecycle,
            store=store,
            originals=originals,
            pipeline=pipeline,
            model=ServedModel(artifact, pipeline.forward_zeros, pipeline.forward_pixels),
            web_images=web_images,
        )


def make_pipeline(
    settings: Settings, artifact: Artifact, engine: Engine, cache: Cache, metrics: Metrics, decoding: Decoding
) -> Pipeline:
    """Return a pipeline for one model. A running event loop is needed. The arguments are those of `opened_service`,
    and what all pipelines of a process share to decode images."""
    general = partial(open_general, artifact, engine, threads=settings.threads or available_cpus())
    limits = PipelineLimits.of(settings)
    return Pipeline(artifact, engine, cache, metrics, limits, general, patch_store_of(settings), decoding)


def with_model(service: Service, artifact: Artifact, engine: Engine, tried: tuple[Tried, ...] = ()) -> Service:
    """Return a service that shares everything with `service` except the model. The caller closes its pipeline."""
    shared = service.pipeline
    pipeline = make_pipeline(service.settings, artifact, engine, shared.cache, service.metrics, shared.decoding)
    model = ServedModel(artifact, pipeline.forward_zeros, pipeline.forward_pixels)
    return replace(service, artifact=artifact, engine=engine, tried=tried, pipeline=pipeline, model=model)


def _cache(settings: Settings, metrics: Metrics) -> Cache:
    return make_cache(
        settings.redis_url if settings.cache_bytes else None,
        max_bytes=settings.cache_bytes,
        ttl_s=settings.cache_ttl_s,
        on_event=lambda event: metrics.cache_events.labels(event).inc(),
    )

"""The metrics of the service, and the format of its log.

The names of metrics follow the conventions of Prometheus: a prefix, base units, and the suffix `_total` for counters.
Each `Metrics` object has its own registry, so two services in one process (in tests) do not share counters. Each label
has a limited number of values. The label `route` is the template of the route and not the path of the request, because
clients could send any number of different paths.
"""

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

STAGES: Final = ("decode", "preprocess", "queue", "infer", "post")
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
HTTP_SECONDS: Final = (
    *(0.001, 0.0025),  # a search by vector
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(30.0, 60.0),  # the default deadline
)
"""The buckets of the duration of a request. The middle row has the buckets of OpenTelemetry's convention for HTTP."""
BATCH: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FILL: Final = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
MOST_COLLECTIONS: Final = 100
"""The highest number of collections that have their own values of the label `collection`. These are the collections
with the most items."""
OTHERS: Final = "_others"  # not allowed as the name of a collection
_OTHERS_TEXT: Final = f"Collections beyond the {MOST_COLLECTIONS} largest are added up as {OTHERS}."
_LAYERS_TEXT: Final = "Vectors: memory or redis. Patch features: patches_memory, then patches_disk."

MAX_LOGGED_CHARS: Final = 500
"""The highest number of characters of a path or an error message in the access log."""
_MOST_SERIES: Final = 4096
_TRACEPARENT: Final = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")

access_log = logging.getLogger("service.access")
audit_log = logging.getLogger("audit")
disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each counter and histogram, and no query uses it
M = TypeVar("M", covariant=True)


class _Make(Protocol[M]):
    """A function that creates a metric from its name, its text and its labels."""

    def __call__(self, name: str, text: str, /, *labels: str) -> M: ...


class _MakeHistogram(Protocol):
    def __call__(self, name: str, text: str, buckets: tuple[float, ...], /, *labels: str) -> Histogram: ...


class _Coded(Protocol):
    @property
    def code(self) -> str: ...


class _Failing(Protocol):
    """The outcome of an image, which may have an error."""

    @property
    def error(self) -> _Coded | None: ...


class Metrics:
    """The metrics of one service. The requests update most of them. `service/scrape.py` sets the others when /metrics
    is read."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dinov2_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"dinov2_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"dinov2_{name}", text, labels, buckets=buckets, registry=self.registry)

        self._add_requests(counter, gauge, histogram)
        self._add_images(counter, gauge, histogram)
        self._add_limits(counter, gauge)
        self._add_store(gauge)
        self._add_process(counter, gauge)
        self._add_jobs(gauge)
        for stage in STAGES:
            self.stage_seconds.labels(stage)

    def _add_requests(self, counter: _Make[Counter], gauge: _Make[Gauge], histogram: _MakeHistogram) -> None:
        self.requests = counter("requests_total", "Requests that were answered.", "method", "route", "status")
        self.request_seconds = histogram(
            "request_duration_seconds", "Time from a request to the end of its answer.", HTTP_SECONDS, "route"
        )
        self.requests_in_flight = gauge("requests_in_flight", "Requests that are being answered.")
        self.request_errors = counter(
            "request_errors_total", "Requests that were refused or failed, by the code of the error.", "route", "code"
        )
        self.request_bytes = counter("request_bytes_total", "Bytes of request bodies, as they were sent.", "route")
        # `labels` takes a lock and converts each value, so the series of each route are remembered.
        self._requests_of = lru_cache(_MOST_SERIES)(self.requests.labels)
        self._seconds_of = lru_cache(_MOST_SERIES)(self.request_seconds.labels)
        self._bytes_of = lru_cache(_MOST_SERIES)(self.request_bytes.labels)

    def _add_images(self, counter: _Make[Counter], gauge: _Make[Gauge], histogram: _MakeHistogram) -> None:
        self.stage_seconds = histogram(
            "stage_duration_seconds", "Time that one image spends in one stage.", SECONDS, "stage"
        )
        self.batch_images = histogram("batch_images", "Images in one forward pass.", BATCH)
        self.batch_fill = histogram(
            "batch_fill_ratio", "Patches in one forward pass, as a share of the largest batch.", FILL
        )
        self.queue_images = gauge("queue_images", "Images that are accepted and not yet answered.")
        self.queue_images_limit = gauge("queue_images_limit", "The setting queue_max_images.")
        self.queue_patches = gauge("queue_patches", "Patches that wait for the engine.")
        self.queue_age = gauge("queue_oldest_seconds", "Time that the oldest image has waited for the engine.")
        self.decode_workers = gauge("decode_workers", "Number of decoding threads.")
        self.decode_process_deaths = counter(
            "decode_process_deaths_total",
            "Processes that ended while they decoded an image: crash, or time if it took too long.",
            "reason",
        )
        self.images = counter("images_total", "Images that the engine processed.")
        self.dropped = counter("dropped_images_total", "Images whose clients disconnected while they were queued.")
        self.engine_errors = counter("engine_errors_total", "Forward passes that failed.")
        self.engine_up = gauge("engine_up", "1 if the engine and the thread of each loaded model work; 0 otherwise.")
        self.failed_images = counter(
            "failed_images_total",
            "Images that were refused or could not be processed, by the code of the error.",
            "code",
        )
        self.cache_hits = counter("cache_hits_total", f"Results that were found in a cache. {_LAYERS_TEXT}", "layer")
        self.cache_misses = counter(
            "cache_misses_total", f"Results that were not found in a cache. {_LAYERS_TEXT}", "layer"
        )
        self.cache_up = gauge("cache_up", "1 if the cache of vectors works; 0 if /readyz reports it as degraded.")
        self.cache_events = counter(
            "cache_events_total",
            "Events of the cache in Redis: failed calls, skipped calls, invalid values and recoveries.",
            "event",
        )
        self.coalesced = counter(
            "coalesced_images_total", "Images that shared the running computation of an identical image."
        )
        self.image_urls = counter(
            "image_urls_total", "URLs of images that were requested: fetched or failed.", "result"
        )

    def _add_limits(self, counter: _Make[Counter], gauge: _Make[Gauge]) -> None:
        self.connections = gauge("connections", "Open connections of clients.")
        self.refused_connections = counter(
            "refused_connections_total", "Connections that were closed at once, because too many were open."
        )
        self.buffered_bytes = gauge(
            "buffered_bytes", "Memory for request bodies, fetched images and answers that clients have not read."
        )
        self.rate_limited = counter(
            "rate_limited_requests_total",
            'Requests that a rate limit refused: all of them ("rate"), or images of a single costly request ("cost").',
            "reason",
        )
        self.rate_limit_pixels = counter(
            "rate_limit_pixels_total",
            "Pixels that rate limits charged, by API key. Clients without a key are added up as _addresses, and keys "
            f"beyond the first 100 as {OTHERS}.",
            "client",
        )
        self.rate_limit_degraded = gauge(
            "rate_limit_degraded",
            "1 if Redis should share the rate limits but has failed, so this process limits its clients alone.",
        )
        self.rate_limit_events = counter(
            "rate_limit_redis_events_total",
            "Events of the rate limits in Redis: failed calls, skipped calls and recoveries.",
            "event",
        )

    def _add_store(self, gauge: _Make[Gauge]) -> None:
        self.index_recall = gauge(
            "index_recall_ratio", "Share of the true ten nearest items that sampled live searches found.", "collection"
        )
        self.collection_items = gauge("collection_items", f"Items in a collection. {_OTHERS_TEXT}", "collection")
        self.collection_bytes = gauge(
            "collection_disk_bytes",
            f"Disk space of a collection's vectors and segments, without its metadata. {_OTHERS_TEXT}",
            "collection",
        )
        self.store_bytes = gauge(
            "store_disk_bytes",
            "Disk space of the vector store: the database of all collections, and snapshots.",
            "part",
        )
        self.disk_free_bytes = gauge("data_dir_free_bytes", "Free space on the disk of the data folder.")
        self.disk_bytes = gauge("data_dir_size_bytes", "Size of the disk of the data folder.")
        self.data_dir_in_place = gauge(
            "data_dir_in_place",
            "1 if the data folder is the one that was opened; 0 if it was removed or replaced, and writes are refused.",
        )
        self.writes_refused = gauge(
            "data_dir_only_deletions", "1 if the disk is so full that only deletions are sure to work; 0 otherwise."
        )
        self.damaged_collections = gauge(
            "damaged_collections", "Collections whose items can neither be read nor written, because rows are damaged."
        )
        self.last_backup = gauge(
            "last_backup_timestamp_seconds",
            "Time of the last complete `dinov2 backup`, in seconds since 1970; 0: there was none.",
        )

    def _add_process(self, counter: _Make[Counter], gauge: _Make[Gauge]) -> None:
        self.build_info = gauge(
            "build_info", "The version of the service and of Python; the value is always 1.", "version", "python"
        )
        self.spans = counter("trace_spans_total", "Spans that were sent to the collector, or that were lost.", "result")
        self.model_info = gauge(
            "model_info",
            "A loaded model, its engine, and its role: live, candidate or former; the value is always 1.",
            "name",
            "fingerprint",
            "engine",
            "precision",
            "role",
        )
        self.generation = gauge("generation", "Number of the live generation in this process; 0: there is no record.")
        self.unsearchable_collections = gauge(
            "unsearchable_collections", "Collections whose model is not loaded, so they cannot be searched by image."
        )
        self.items_without_live_vector = gauge(
            "items_without_live_vector",
            "Items of a collection that have no vector of the live model; collections without such items are left out.",
            "collection",
        )
        self.migration_pending_items = gauge(
            "migration_pending_items", "Items that a running migration has not embedded with the new model yet."
        )

    def _add_jobs(self, gauge: _Make[Gauge]) -> None:
        self.jobs = gauge("jobs", "Jobs of this data folder in a state; finished jobs are kept for a while.", "state")
        self.jobs_blocked = gauge(
            "jobs_blocked",
            "Queued jobs that are due, but that none of the running workers can start.",
        )
        self.job_quiet = gauge(
            "job_seconds_since_progress",
            "Longest time for which a running job has shown neither progress nor output; 0: no job is running.",
        )
        self.worker_heartbeat_age = gauge(
            "worker_heartbeat_age_seconds",
            "Longest time since a worker reported that it is alive; 0: there are no workers. A worker that was killed "
            "is forgotten after an hour.",
        )

    def count_request(
        self,
        method: str,
        route: str,
        status: int,
        seconds: float,
        received_bytes: int,
        code: str | None,
        trace_id: str | None,
    ) -> None:
        """Count a finished request. `code` is the code of the error that was its answer. If `trace_id` is not None, it
        becomes the exemplar of the request's bucket: a link from the histogram to one trace."""
        self._requests_of(method, route, str(status)).inc()
        self._seconds_of(route).observe(seconds, None if trace_id is None else {"trace_id": trace_id})
        if received_bytes:
            self._bytes_of(route).inc(received_bytes)
        if code is not None:
            self.request_errors.labels(route, code).inc()

    def count_failed(self, outcomes: Iterable[_Failing]) -> None:
        """Count the images that have an error."""
        for outcome in outcomes:
            if outcome.error is not None:
                self.failed_images.labels(outcome.error.code).inc()

    def set_usage(self, collections: Sequence[tuple[str, int, int | None]], parts: Mapping[str, int]) -> None:
        """Set the metrics of all collections and of the store. Each collection is a tuple of its name, its number of
        items, and its disk space in bytes, which is None if unknown. `parts` maps the parts of the store to their disk
        space."""
        for metric in (self.collection_items, self.collection_bytes, self.store_bytes):
            metric.clear()
        ordered = sorted(collections, key=lambda collection: (-collection[1], collection[0]))
        for position, (name, count, size) in enumerate(ordered):
            label = name if position < MOST_COLLECTIONS else OTHERS
            self.collection_items.labels(label).inc(count)
            if size is not None:
                self.collection_bytes.labels(label).inc(size)
        for part, size in parts.items():
            self.store_bytes.labels(part).set(size)

    def render(self) -> bytes:
        """Return the metrics in the text format of Prometheus, as bytes."""
        return self.render_for("")[0]

    def render_for(self, accept: str, page: Collector | None = None) -> tuple[bytes, str]:
        """Return the metrics in the format that an Accept header asks for, and their content type. The format is
        OpenMetrics, which has exemplars, or the text format of Prometheus, which has none. `page` has the metrics of
        all workers, if there are several."""
        encode, content_type = choose_encoder(accept)
        return encode(page or self.registry), content_type


class JsonLines(logging.Formatter):
    """A log formatter that writes each record as one line of JSON. The line has the time, level, logger and message of
    the record, and the entries of the record's attribute `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging(level: str, audit_file: Path | None = None) -> None:
    """Write all log records of at least this level to standard error, as lines of JSON. Lines of the audit log are
    written at every level, and also appended to `audit_file` if it is given. If another program moves this file away,
    a new one is created.

    Raises:
        OSError: `audit_file` cannot be opened.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    audit_log.setLevel(logging.INFO)
    audit_log.handlers[:] = []
    if audit_file is not None:
        audit_file.parent.mkdir(parents=True, exist_ok=True)
        audit_handler = WatchedFileHandler(audit_file, encoding="utf-8")
        audit_handler.setFormatter(JsonLines())
        audit_log.addHandler(audit_handler)
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells which of its builds it has tried
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)  # Pillow warns about every unusual image


def trace_id(traceparent: bytes) -> str | None:
    """Return the trace id in a `traceparent` header (W3C Trace Context), or None if the header is not valid."""
    match = _TRACEPARENT.fullmatch(traceparent)
    return match[1].decode() if match else None


def client_address(peer: str, forwarded_for: bytes, proxies: int) -> str:
    """Return the address of the client that sent a request.

    Args:
        peer: the address of the other end of the connection.
        forwarded_for: the value of the header X-Forwarded-For. Each proxy appends the address from which it received
            the request. A client can send any value, so only the last `proxies` entries can be trusted.
        proxies: the number of trusted proxies in front of the service. If the header has fewer entries, it is ignored.
    """
    entries = forwarded_for.split(b",") if forwarded_for else []
    if not 0 < proxies <= len(entries):
        return peer
    return entries[-proxies].strip()[:64].decode("latin-1")


def shortened(text: str) -> str:
    """Return a text. If it has more than `MAX_LOGGED_CHARS` characters, replace the rest with `...`."""
    return text if len(text) <= MAX_LOGGED_CHARS else f"{text[:MAX_LOGGED_CHARS]}..."


def log_request(method: str, route: str, status: int, seconds: float, request_id: str, **fields: str | int) -> None:
    """Log a finished request in one line. The line contains no part of the query string. An error message may quote a
    short part of the body."""
    line = {"request_id": request_id, "method": method, "route": route, "status": status, **fields}
    access_log.info("request", extra={"fields": {**line, "ms": round(seconds * 1e3, 2)}})

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
from collections.abc import Mapping, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

STAGES: Final = ("decode", "preprocess", "queue", "infer", "post")
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCH: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MOST_COLLECTIONS: Final = 100
"""The highest number of collections that have their own values of the label `collection`. These are the collections
with the most items."""
OTHERS: Final = "_others"  # not allowed as the name of a collection
_OTHERS_TEXT: Final = f"Collections beyond the {MOST_COLLECTIONS} largest are added up as {OTHERS}."

MAX_LOGGED_CHARS: Final = 500
"""The highest number of characters of a path or an error message in the access log."""
_TRACEPARENT: Final = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")

access_log = logging.getLogger("service.access")


class Metrics:
    """The metrics of one service."""

    content_type = CONTENT_TYPE_LATEST

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

        self.requests = counter("requests_total", "Requests that were answered.", "method", "route", "status")
        self.request_seconds = histogram(
            "request_duration_seconds", "Time from a request to the end of its answer.", SECONDS, "route"
        )
        self.requests_in_flight = gauge("requests_in_flight", "Requests that are being answered.")
        self.stage_seconds = histogram(
            "stage_duration_seconds", "Time that one image spends in one stage.", SECONDS, "stage"
        )
        self.batch_images = histogram("batch_images", "Images in one forward pass.", BATCH)
        self.queue_images = gauge("queue_images", "Images that are accepted and not yet answered.")
        self.queue_patches = gauge("queue_patches", "Patches that wait for the engine.")
        self.images = counter("images_total", "Images that the engine processed.")
        self.dropped = counter("dropped_images_total", "Images whose clients disconnected while they were queued.")
        self.engine_errors = counter("engine_errors_total", "Forward passes that failed.")
        self.cache_hits = counter("cache_hits_total", "Vectors that were found in the cache.")
        self.cache_misses = counter("cache_misses_total", "Vectors that were not found in the cache.")
        self.cache_events = counter(
            "cache_events_total",
            "Events of the cache in Redis: failed calls, skipped calls, invalid values and recoveries.",
            "event",
        )
        self.coalesced = counter(
            "coalesced_images_total", "Images that shared the running computation of an identical image."
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
        self.rate_limit_shared = gauge(
            "rate_limit_shared", "1 if Redis shares the rate limits between processes; 0 if this process is alone."
        )
        self.rate_limit_events = counter(
            "rate_limit_redis_events_total",
            "Events of the rate limits in Redis: failed calls, skipped calls and recoveries.",
            "event",
        )
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
        self.model_info = gauge(
            "model_info",
            "The served model and its engine; the value is always 1.",
            "name",
            "fingerprint",
            "engine",
            "precision",
        )
        for stage in STAGES:
            self.stage_seconds.labels(stage)

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
        return generate_latest(self.registry)


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


def configure_logging(level: str) -> None:
    """Write all log records of at least this level to standard error, as lines of JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
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

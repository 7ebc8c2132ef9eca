"""Traces of requests in OpenTelemetry's format, recorded if the setting `otlp_endpoint` names a collector.

Each request to /v1/ has one server span. The stages of its images are child spans. They are made after a stage has
ended, from the times that the pipeline measures anyway. A forward pass may serve several requests, so its span starts a
trace of its own. It has links to the server spans of these requests, and their `infer` spans link to it.

If the setting is unset, OpenTelemetry is not imported and no request has a `RequestTrace`. A stage then costs one
look-up of a context variable. Spans are sent by a thread of OpenTelemetry's SDK from a bounded queue. If the collector
fails, spans are lost, but no request fails or waits.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from typing import Any, Final, Literal, Protocol

SpanResult = Literal["exported", "failed"]
OnSpans = Callable[[SpanResult, int], None]
"""A function that is called with the number of spans that were sent to the collector, or that could not be sent."""

CLOSE_LIMIT_S: Final = 3.0
"""The time limit in seconds for sending the last spans when the service stops."""
EXPORT_LIMIT_S: Final = 5.0
"""The time limit in seconds for sending spans to the collector once, including repeated attempts."""
INSTALL: Final = "python -m pip install 'dinov2-service[otel]'"

_current: ContextVar["RequestTrace | None"] = ContextVar("request_trace", default=None)


def current_trace() -> "RequestTrace | None":
    """Return the trace of the request that the calling code works for. Return None if there is no request, or if the
    request is not traced."""
    return _current.get()


def record_stage(name: str, started: float, ended: float) -> None:
    """Record a stage of the current request, if it is traced. The times are values of `time.perf_counter()`."""
    trace = _current.get()
    if trace is not None:
        trace.stage(name, started, ended)


class Traced(Protocol):
    """Something that may belong to a traced request, for instance an image in the queue."""

    @property
    def trace(self) -> "RequestTrace | None": ...


def record_batch(
    batch: Sequence[Traced], started: float, ended: float, patches: int, *, failed: bool = False
) -> "Batch | None":
    """Record a forward pass over a batch of images. Return its span, or None if no image belongs to a traced request.
    The times are values of `time.perf_counter()`. Any thread may call this function."""
    traces: dict[RequestTrace, None] | None = None  # in the order of the batch, and each request once
    for one in batch:
        if one.trace is not None:
            traces = traces or {}
            traces[one.trace] = None
    if traces is None:
        return None
    first = next(iter(traces))
    size = {"dinov2.batch.images": len(batch), "dinov2.batch.patches": patches}
    return first.tracing.batch(list(traces), (first.time_ns(started), first.time_ns(ended)), size, failed)


class Batch:
    """The span of a forward pass. It ends when it is created."""

    __slots__ = ("context",)

    def __init__(self, context: Any) -> None:
        self.context = context


class RequestTrace:
    """The spans of one traced request. Any thread may call its methods."""

    __slots__ = ("_context", "_offset_ns", "_span", "_token", "trace_id", "tracing")

    def __init__(self, tracing: "Tracing", span: Any, context: Any) -> None:
        self.tracing = tracing
        self._span, self._context = span, context
        self._offset_ns = time.time_ns() - time.perf_counter_ns()
        self._token: Token[RequestTrace | None] | None = None
        self.trace_id: str = f"{span.get_span_context().trace_id:032x}"

    @property
    def link(self) -> Any:
        """The context of the server span, for a link to it."""
        return self._span.get_span_context()

    def time_ns(self, at: float) -> int:
        """Convert a value of `time.perf_counter()` to nanoseconds since 1970."""
        return self._offset_ns + int(at * 1e9)

    def enter(self) -> None:
        """Make this the trace of the running task and of the tasks that it creates from now on."""
        self._token = _current.set(self)

    def stage(self, name: str, started: float, ended: float, link: "Batch | RequestTrace | None" = None) -> None:
        """Record a stage. `link` is the forward pass that computed the stage, or the other request that did."""
        target = None if link is None else link.context if isinstance(link, Batch) else link.link
        self.tracing.child(self._context, name, (self.time_ns(started), self.time_ns(ended)), target)

    def image(self, seconds: Mapping[str, float], decoding: float, passing: float, batch: "Batch | None") -> None:
        """Record the stages of an image. `seconds` maps decode, preprocess, queue and infer to their durations. The
        decoding began at `decoding` and the forward pass at `passing`; `batch` is the span of this pass."""
        decoded = decoding + seconds["decode"]
        self.stage("decode", decoding, decoded)
        self.stage("preprocess", decoded, decoded + seconds["preprocess"])
        self.stage("queue", passing - seconds["queue"], passing)
        self.stage("infer", passing, passing + seconds["infer"], batch)

    def end(self, name: str, attributes: Mapping[str, Any], fault: str | None) -> None:
        """End the server span. `fault` describes a fault of the service, that is, an error with status 500 or above."""
        if self._token is not None:
            _current.reset(self._token)
            self._token = None
        self._span.update_name(name)
        self._span.set_attributes(attributes)
        if fault is not None:
            self.tracing.set_fault(self._span, fault)
        self._span.end()


class Tracing:
    """Starts spans and sends them to a collector. `open_tracing` creates it."""

    def __init__(self, provider: Any, version: str) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._provider = provider
        self._tracer = provider.get_tracer("dinov2-service", version)
        self._propagator = TraceContextTextMapPropagator()

    def start(self, headers: Mapping[bytes, bytes]) -> RequestTrace | None:
        """Start the server span of a request and return its trace. Return None if the request is not sampled. If the
        request has a valid header `traceparent`, the span continues this trace, and the header's flag decides whether
        it is sampled."""
        carrier = {
            name: headers[name.encode()].decode("latin-1")
            for name in ("traceparent", "tracestate")
            if name.encode() in headers
        }
        parent = self._propagator.extract(carrier, context=self._api.Context())
        span = self._tracer.start_span("request", context=parent, kind=self._api.SpanKind.SERVER)
        if not span.is_recording():
            return None
        return RequestTrace(self, span, self._api.set_span_in_context(span, parent))

    def child(self, context: Any, name: str, times_ns: tuple[int, int], link: Any | None) -> None:
        """Record a span that has already ended as a child of the span in `context`."""
        links = () if link is None else (self._api.Link(link),)
        span = self._tracer.start_span(name, context=context, links=links, start_time=times_ns[0])
        span.end(times_ns[1])

    def batch(
        self, traces: Sequence[RequestTrace], times_ns: tuple[int, int], attributes: Mapping[str, int], failed: bool
    ) -> Batch:
        """Record the span of a forward pass, with links to the requests that it served."""
        span = self._tracer.start_span(
            "batch",
            context=self._api.Context(),
            links=[self._api.Link(one.link) for one in traces],
            attributes=attributes,
            start_time=times_ns[0],
        )
        if failed:
            self.set_fault(span, "the forward pass failed")
        span.end(times_ns[1])
        return Batch(span.get_span_context())

    def set_fault(self, span: Any, description: str) -> None:
        """Mark a span as failed."""
        span.set_status(self._api.Status(self._api.StatusCode.ERROR, description))

    def flush(self) -> None:
        """Send all ended spans, and wait until this is done."""
        self._provider.force_flush()

    async def close(self) -> None:
        """Send the last spans. Stop waiting after `CLOSE_LIMIT_S` seconds, because the collector may not answer."""
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop is closed, because this took too long
                loop.call_soon_threadsafe(closed.set)

        threading.Thread(target=shut_down, name="close-traces", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(closed.wait(), CLOSE_LIMIT_S)


def open_tracing(
    traces_url: str | None, ratio: float, version: str, on_spans: OnSpans = lambda result, count: None
) -> Tracing | None:
    """Return an object that records traces and sends them to a collector. Return None if `traces_url` is None.

    OpenTelemetry's own environment variables also apply, for instance OTEL_EXPORTER_OTLP_HEADERS with the credentials
    for the collector, OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME.

    Args:
        traces_url: the URL to which spans are posted.
        ratio: the share of requests without a `traceparent` that are traced.
        version: the version of the service.
        on_spans: a function that is called after each attempt to send spans.

    Raises:
        ModuleNotFoundError: OpenTelemetry is needed but not installed. The message says how to install it.
    """
    if traces_url is None:
        return None
    try:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, TraceIdRatioBased

        exporter = make_exporter(traces_url)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"otlp_endpoint is set, but OpenTelemetry is not installed ({error.name} is missing): {INSTALL}",
            name=error.name,
        ) from error
    ours = Resource.create({"service.name": "dinov2-service", "service.version": version})
    provider = TracerProvider(
        sampler=_Sampler(ALWAYS_ON, ParentBased(TraceIdRatioBased(ratio))),
        resource=ours.merge(OTELResourceDetector().detect()),  # the operator's attributes replace ours
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(_Counted(exporter, on_spans)))
    return Tracing(provider, version)


def make_exporter(traces_url: str) -> Any:
    """Return an object that posts spans to a collector with OTLP over HTTP. Tests replace this function."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=traces_url, timeout=EXPORT_LIMIT_S)


class _Sampler:
    """A sampler that records each span with links, because links are made only to requests that are traced. `others`
    decides about spans without links."""

    def __init__(self, always: Any, others: Any) -> None:
        self._always, self._others = always, others

    def should_sample(self, *span: Any) -> Any:
        """Decide about a span. The arguments are those of OpenTelemetry's `Sampler`; the last one contains the
        links."""
        links = span[5] if len(span) > 5 else None
        return (self._always if links else self._others).should_sample(*span)

    def get_description(self) -> str:
        return f"linked spans, and {self._others.get_description()}"


class _Counted:
    """An exporter that reports how many spans were sent."""

    def __init__(self, exporter: Any, on_spans: OnSpans) -> None:
        self._exporter, self._on_spans = exporter, on_spans

    def export(self, spans: Any) -> Any:
        result = None
        try:
            result = self._exporter.export(spans)
        finally:
            self._on_spans("exported" if result is not None and result.name == "SUCCESS" else "failed", len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))

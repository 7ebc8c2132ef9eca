"""Tests of traces: the spans of requests, stages and batches, which requests are traced, and what happens without a
collector or without OpenTelemetry."""

import asyncio
import itertools
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from service import tracing
from service.settings import Settings
from service.tracing import current_trace, open_tracing, record_batch, record_stage
from tests.dict_store import DictStore
from tests.fakes import FakeEngine, photo, running, until

WHY = "needs the extra `otel`: python -m pip install 'dinov2-service[otel]'"
memory_exporter = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason=WHY)
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason=WHY)

EMBED = "/v1/embeddings"
PNG = {"Content-Type": "image/png"}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
NOT_SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
COLLECTOR = {"otlp_endpoint": "http://127.0.0.1:9"}


@pytest.fixture
def exporter(monkeypatch):
    """An exporter that keeps spans in memory. It replaces the one that sends them to a collector."""
    kept = memory_exporter.InMemorySpanExporter()
    monkeypatch.setattr(tracing, "make_exporter", lambda url: kept)
    return kept


def spans(run, exporter):
    run.app.state.tracing.flush()
    return sorted(exporter.get_finished_spans(), key=lambda span: span.start_time)


def named(all_spans, name):
    return [span for span in all_spans if span.name == name]


def only(all_spans, name):
    [span] = named(all_spans, name)
    return span


async def test_a_request_has_a_span_with_the_names_of_the_convention(tmp_path, exporter):
    async with running(tmp_path, **COLLECTOR) as run:
        headers = PNG | SAMPLED | {"X-Request-ID": "mine", "User-Agent": "tests"}
        assert (await run.client.post(EMBED, content=photo(), headers=headers)).status_code == 200
        server = only(spans(run, exporter), f"POST {EMBED}")
    assert server.kind.name == "SERVER"
    assert f"{server.context.trace_id:032x}" == TRACE
    assert f"{server.parent.span_id:016x}" == PARENT
    assert server.status.status_code.name == "UNSET"
    assert dict(server.attributes) == {
        "http.request.method": "POST",
        "http.route": EMBED,
        "http.response.status_code": 200,
        "http.request.body.size": len(photo()),
        "url.path": EMBED,
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "user_agent.original": "tests",
        "client.address": "127.0.0.1",
        "gen_ai.operation.name": "embeddings",
        "dinov2.request_id": "mine",
    }
    assert server.resource.attributes["service.name"] == "dinov2-service"


async def test_the_stages_of_an_image_are_children_of_the_request(tmp_path, exporter):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, **COLLECTOR) as run:
        engine.delay_s = 0.02
        await run.client.post(EMBED, content=photo(), headers=PNG)
        seen = spans(run, exporter)
    server = only(seen, f"POST {EMBED}")
    stages = [span for span in seen if span.parent is not None and span.parent.span_id == server.context.span_id]
    assert [span.name for span in stages] == ["cache", "decode", "preprocess", "queue", "infer", "post"]
    for before, after in itertools.pairwise(stages):
        assert before.end_time <= after.start_time + 2_000
    assert all(server.start_time <= span.start_time and span.end_time <= server.end_time for span in stages)
    infer = only(stages, "infer")
    assert 20e6 <= infer.end_time - infer.start_time <= server.end_time - server.start_time
    assert abs(server.start_time - time.time_ns()) < 60e9


async def test_a_batch_is_linked_to_the_requests_that_it_serves(tmp_path, exporter):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, **COLLECTOR) as run:
        engine.gate = threading.Event()
        batcher = run.service.pipeline.batcher
        first = asyncio.create_task(run.client.post(EMBED, content=photo(0), headers=PNG))
        await until(engine.entered.is_set)
        others = [asyncio.create_task(run.client.post(EMBED, content=photo(n), headers=PNG)) for n in (1, 2)]
        others.append(asyncio.create_task(run.client.post(EMBED, content=photo(3), headers=PNG | NOT_SAMPLED)))
        await until(lambda: batcher.waiting == 3)
        engine.gate.set()
        await asyncio.gather(first, *others)
        seen = spans(run, exporter)
    servers = {span.context.span_id for span in named(seen, f"POST {EMBED}")}
    alone, shared = named(seen, "batch")
    assert len(servers) == 3
    assert [alone.attributes["dinov2.batch.images"], shared.attributes["dinov2.batch.images"]] == [1, 3]
    assert len(alone.links) == 1
    assert {link.context.span_id for link in (*alone.links, *shared.links)} == servers
    assert shared.parent is None
    back = [link.context for span in named(seen, "infer") for link in span.links]
    assert sorted(context.span_id for context in back) == sorted([alone.context.span_id] + 2 * [shared.context.span_id])
    assert all(context.trace_id in (alone.context.trace_id, shared.context.trace_id) for context in back)


async def test_several_images_of_one_request_are_one_link(tmp_path, exporter):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, **COLLECTOR) as run:
        files = [("file", (f"{n}.png", photo(n), "image/png")) for n in range(4)]
        assert (await run.client.post(EMBED, files=files)).status_code == 200
        seen = spans(run, exporter)
    assert len(named(seen, "decode")) == 4
    assert [len(span.links) for span in named(seen, "batch")] == [1] * len(engine.batches)


async def test_a_request_that_waits_for_another_is_linked_to_it(tmp_path, exporter):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, **COLLECTOR) as run:
        engine.gate = threading.Event()
        both = [asyncio.create_task(run.client.post(EMBED, content=photo(), headers=PNG))]
        await until(engine.entered.is_set)
        both.append(asyncio.create_task(run.client.post(EMBED, content=photo(), headers=PNG)))
        await until(lambda: next(iter(run.service.pipeline._flights.values())).waiters == 2)
        engine.gate.set()
        await asyncio.gather(*both)
        seen = spans(run, exporter)
    owner, waiter = named(seen, f"POST {EMBED}")
    shared = only(seen, "coalesced")
    assert shared.parent.span_id == waiter.context.span_id
    assert [link.context.span_id for link in shared.links] == [owner.context.span_id]


async def test_other_stages(tmp_path, exporter):
    async with running(tmp_path, store=DictStore(), **COLLECTOR) as run:
        await run.client.post("/v1/collections/shop/items", content=photo(), headers=PNG)
        await run.client.post("/v1/collections/shop/search", content=photo(1), headers=PNG)
        await run.client.post("/v1/collections/shop/search", json={"vector": [1.0] + 7 * [0.0]})
        await run.client.post("/v1/attention", content=photo(2), headers=PNG)
        seen = spans(run, exporter)
    stages = {}
    for server in [span for span in seen if span.kind.name == "SERVER"]:
        children = [span.name for span in seen if span.parent and span.parent.span_id == server.context.span_id]
        stages.setdefault(server.name.split("/")[-1], []).append(children)
    assert stages["items"][0][-1] == "store"
    assert stages["search"] == [["cache", "decode", "preprocess", "queue", "infer", "search"], ["search"]]
    assert stages["attention"][0][-2:] == ["post", "encode"]


async def test_a_failure_is_named_and_only_faults_of_the_service_are_errors(tmp_path, exporter):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, **COLLECTOR) as run:
        engine.fails = lambda pixels: True
        await run.client.post(EMBED, content=photo(), headers=PNG)
        await run.client.get("/v1/collections/none")
        await run.client.get("/v1/nothing/here")
        fault, absent, unmatched = [span for span in spans(run, exporter) if span.kind.name == "SERVER"]
        batch = only(spans(run, exporter), "batch")
    assert (fault.status.status_code.name, batch.status.status_code.name) == ("ERROR", "ERROR")
    assert fault.attributes["error.type"] == "engine_failed"
    assert "secret" not in str(fault.attributes) + str(fault.status.description)
    assert absent.status.status_code.name == "UNSET"
    assert "error.type" not in absent.attributes
    assert absent.attributes["dinov2.code"] == "collection_not_found"
    assert absent.attributes["dinov2.collection"] == "none"
    assert (unmatched.name, "http.route" in unmatched.attributes) == ("GET", False)


@pytest.mark.parametrize(("ratio", "headers", "traced"), [(1, {}, 1), (0, {}, 0), (0, SAMPLED, 1), (1, NOT_SAMPLED, 0)])
async def test_which_requests_are_traced(tmp_path, exporter, caplog, ratio, headers, traced):
    caplog.set_level("INFO", "service.access")
    async with running(tmp_path, trace_ratio=ratio, **COLLECTOR) as run:
        await run.client.post(EMBED, content=photo(), headers=PNG | headers)
        for route in ("/livez", "/readyz", "/metrics"):
            await run.client.get(route, headers=headers)
        seen = spans(run, exporter)
    servers = [span for span in seen if span.kind.name == "SERVER"]
    assert len(servers) == traced
    assert bool(named(seen, "batch")) == bool(traced)
    line = next(record.fields for record in caplog.records if record.name == "service.access")
    expected = f"{servers[0].context.trace_id:032x}" if traced else TRACE if headers else None
    assert line.get("trace_id") == expected


async def test_the_trace_of_a_request_ends_with_it(tmp_path, exporter):
    async with running(tmp_path, **COLLECTOR) as run:
        await run.client.post(EMBED, content=photo(), headers=PNG)
        assert current_trace() is None


async def test_a_histogram_points_to_a_trace(tmp_path, exporter):
    async with running(tmp_path, **COLLECTOR) as run:
        await run.client.post(EMBED, content=photo(), headers=PNG | SAMPLED)
        open_metrics = await run.client.get(
            "/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"}
        )
        plain = await run.client.get("/metrics")
        run.app.state.tracing.flush()
        counted = run.service.metrics.registry.get_sample_value("dinov2_trace_spans_total", {"result": "exported"})
    assert open_metrics.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert f'# {{trace_id="{TRACE}"}}' in open_metrics.text
    assert plain.headers["Content-Type"].startswith("text/plain; version=")
    assert TRACE not in plain.text
    assert counted == len(exporter.get_finished_spans())


class Collector(HTTPServer):
    """A collector on a free port, which keeps the paths and the bodies of its requests."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, str | None, bytes]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.posted.append((self.path, self.headers.get("Authorization"), body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


async def test_spans_reach_a_collector_when_the_service_stops(tmp_path, collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20abc")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop-features")
    async with running(tmp_path, otlp_endpoint=f"http://127.0.0.1:{collector.server_port}/") as run:
        await run.client.post(EMBED, content=photo(), headers=PNG | SAMPLED)
        assert collector.posted == []  # spans are sent in the background
    assert {(path, key) for path, key, _ in collector.posted} == {("/v1/traces", "Bearer abc")}
    sent = b"".join(body for _, _, body in collector.posted)
    assert bytes.fromhex(TRACE) in sent
    for word in (b"POST /v1/embeddings", b"decode", b"batch", b"shop-features", b"deployment.environment.name"):
        assert word in sent


def lost(run) -> float:
    return run.service.metrics.registry.get_sample_value("dinov2_trace_spans_total", {"result": "failed"}) or 0.0


async def test_a_collector_that_refuses_connections_costs_only_spans(tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "EXPORT_LIMIT_S", 0.2)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with running(tmp_path, otlp_endpoint=f"http://127.0.0.1:{closed.getsockname()[1]}") as run:
            for n in range(10):
                assert (await run.client.post(EMBED, content=photo(n), headers=PNG)).status_code == 200
            await until(lambda: lost(run) > 0, timeout_s=60)


async def test_nothing_waits_for_a_collector_that_hangs(tmp_path, monkeypatch):
    """One attempt to send spans would take ten minutes, so this test would not end if a request waited for it."""
    monkeypatch.setattr(tracing, "EXPORT_LIMIT_S", 600.0)
    monkeypatch.setattr(tracing, "CLOSE_LIMIT_S", 0.2)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(60)
        async with running(tmp_path, otlp_endpoint=f"http://127.0.0.1:{server.getsockname()[1]}") as run:
            assert (await run.client.post(EMBED, content=photo(), headers=PNG)).status_code == 200
            connection, _ = await asyncio.to_thread(server.accept)  # it never gets an answer
            for n in range(10):
                assert (await run.client.post(EMBED, content=photo(n), headers=PNG)).status_code == 200
            assert lost(run) == 0  # the first attempt has not ended
            closing = time.perf_counter()
        assert time.perf_counter() - closing < 60
        connection.close()


def test_without_opentelemetry_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ModuleNotFoundError, match=r"otlp_endpoint is set.*opentelemetry\.sdk\.trace.*\[otel\]"):
        open_tracing("http://collector:4318/v1/traces", 1.0, "1")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("collector:4318", "must start with http"),
        ("grpc://collector:4317", "must start with http"),
        ("http://", "host is missing"),
        ("http://user:s3cret@collector", "OTEL_EXPORTER_OTLP_HEADERS"),
        ("http://collector?x=1", "not supported"),
    ],
)
def test_an_endpoint_that_is_no_address_is_refused(value, message):
    with pytest.raises(ValueError, match=message) as caught:
        Settings(otlp_endpoint=value)
    assert "s3cret" not in str(caught.value)


def test_an_endpoint_is_the_base_of_the_url():
    assert Settings(otlp_endpoint="https://collector:4318").otlp_traces_url == "https://collector:4318/v1/traces"
    assert Settings(otlp_endpoint="https://collector/otlp/").otlp_traces_url == "https://collector/otlp/v1/traces"
    assert Settings().otlp_traces_url is None


async def test_without_the_setting_nothing_is_traced(tmp_path):
    async with running(tmp_path) as run:
        assert run.app.state.tracing is None
        headers = PNG | SAMPLED
        assert (await run.client.post(EMBED, content=photo(), headers=headers)).status_code == 200
        assert "trace_spans_total{" not in (await run.client.get("/metrics")).text


class Untraced:
    trace = None


def test_a_stage_that_is_not_traced_allocates_nothing():
    """The hot path must not pay for traces that are off."""
    batch, at = [Untraced()] * 8, time.perf_counter()

    def work() -> None:
        for _ in range(1000):
            current_trace()
            record_stage("cache", at, at)
            record_batch(batch, at, at, 256)

    work()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        work()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - before < 1000  # bytes, for 1000 rounds

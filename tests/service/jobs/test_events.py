"""Tests of the event streams. The client of these tests calls the application directly, because httpx's test transport
collects an answer before it returns it."""

import asyncio
import json
import random
import re
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.jobs.records import Event, Job, NewJob
from service.jobs.store import JobStore
from service.routes import job_events
from service.routes.job_events import Source, encoded
from tests.fakes import Running, running, until
from tests.service.jobs.kinds_for_tests import KINDS
from tests.service.test_server import Server

ALL = "/v1/jobs/events"
KIND = "steps"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_events, "POLL_S", 0.02)


class Stream:
    """A client that reads an event stream. It stops reading while `reads` is not set."""

    def __init__(self, app: Any, path: str, last_event_id: str | None = None, method: str = "GET") -> None:
        path, _, query = path.partition("?")
        self.named = "named=false" not in query
        headers = [(b"host", b"x"), (b"accept-encoding", b"gzip")]
        if last_event_id is not None:
            headers.append((b"last-event-id", last_event_id.encode()))
        self.reads = asyncio.Event()
        self.reads.set()
        self.status, self.headers, self.ended = 0, dict[str, str](), False
        self.messages: list[dict[str, Any]] = []
        self.comments = 0
        self.last_id = last_event_id
        self._text = ""
        self._gone = asyncio.Event()
        self._sent = False
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": query.encode(), "headers": headers, "scheme": "http",
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if self._gone.is_set():
            return  # as uvicorn does
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
            return
        self._text += message["body"].decode()
        *blocks, self._text = self._text.split("\n\n")
        for block in blocks:
            fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
            self.comments += block.startswith(":")
            self.last_id = fields.get("id", self.last_id)
            if "data" in fields:
                self.messages.append(json.loads(fields["data"]))
                assert fields.get("event") == (self.messages[-1]["kind"] if self.named else None)
                assert fields["id"] == str(self.messages[-1]["number"])
        self.ended = not message["more_body"]

    async def close(self) -> None:
        self._gone.set()
        await asyncio.wait_for(self.task, 20)


@asynccontextmanager
async def service(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[Running, JobStore]]:
    async with running(tmp_path, **settings) as run:
        run.app.state.jobs.kinds = KINDS
        yield run, run.app.state.jobs.store()


def claimed(store: JobStore) -> Job:
    job = store.claim("worker", [KIND], 3600)
    assert job is not None
    return job


async def read(stream: Stream, count: int) -> None:
    await until(lambda: len(stream.messages) >= count, 20)


async def test_a_stream_sends_each_event_and_ends_with_the_job(tmp_path):
    async with service(tmp_path) as (run, store):
        job_id = store.create(NewJob(KIND)).id
        store.create(NewJob(KIND))  # its events are not in the stream
        stream = Stream(run.app, f"/v1/jobs/{job_id}/events")
        await read(stream, 1)
        job = store.claim("worker", [KIND], 60, job_id)
        assert job is not None
        await read(stream, 2)
        store.report(job.lease, 0.5, "half", {"loss": 1.5})
        await read(stream, 3)
        store.finish_step(job.lease, "one", {"n": 1})
        store.succeed(job.lease)
        await asyncio.wait_for(stream.task, 20)
        shown = (await run.client.get(f"/v1/jobs/{job_id}")).json()
        assert run.app.state.streams.count == 0
    assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert stream.headers["x-accel-buffering"] == "no"
    assert {"content-length", "content-encoding"} & set(stream.headers) == set()
    assert [message["kind"] for message in stream.messages] == ["state", "state", "progress", "step", "state"]
    assert {message["job"] for message in stream.messages} == {job_id}
    assert stream.messages[2]["data"] == {"progress": 0.5, "text": "half", "metrics": {"loss": 1.5}}
    assert stream.messages[-1]["data"]["state"] == shown["state"] == "succeeded"
    assert stream.ended


async def test_events_without_a_name_reach_onmessage(tmp_path):
    async with service(tmp_path) as (run, store):
        job_id = store.create(NewJob(KIND)).id
        store.request_cancel(job_id)
        named, plain = [
            (await run.client.get(f"/v1/jobs/{job_id}/events{query}")).text for query in ("", "?named=false")
        ]
        streams = [Stream(run.app, f"{ALL}?last_event_id=0{query}") for query in ("", "&named=false")]
        for stream in streams:
            await read(stream, 3)
            await stream.close()
        wrong = await run.client.get(f"/v1/jobs/{job_id}/events?named=perhaps")
    assert [line for line in named.splitlines() if line.startswith("event: ")] == [
        *("event: state", "event: cancel", "event: state")
    ]
    assert plain == re.sub("^event: .*\n", "", named, flags=re.MULTILINE)
    assert (wrong.status_code, wrong.json()["param"]) == (422, "named")


async def test_a_client_that_reconnects_misses_and_repeats_nothing(tmp_path):
    """While a worker finishes 200 steps, the client is disconnected again and again, often within a page."""
    rng = random.Random(1)
    async with service(tmp_path) as (run, store):
        job_id = store.create(NewJob(KIND)).id
        job = claimed(store)

        def work() -> None:
            for n in range(200):
                store.finish_step(job.lease, f"step {n}", None)
                if n % 10 == 0:
                    time.sleep(0.01)
            store.succeed(job.lease)

        worker = threading.Thread(target=work)
        worker.start()
        messages, last_id, connections = [], None, 0
        while True:
            stream = Stream(run.app, f"/v1/jobs/{job_id}/events", last_id)
            connections += 1
            wanted = rng.randint(1, 30)
            await until(lambda stream=stream, wanted=wanted: len(stream.messages) >= wanted or stream.task.done(), 60)
            await stream.close()
            if stream.status == 204:
                break
            messages += stream.messages
            last_id = stream.last_id
        worker.join()
    numbers = [message["number"] for message in messages]
    assert numbers == sorted(set(numbers))
    assert [m["data"]["name"] for m in messages if m["kind"] == "step"] == [f"step {n}" for n in range(200)]
    assert messages[-1]["data"]["state"] == "succeeded"
    assert connections > 3


async def test_a_dropped_connection_without_an_event_misses_nothing(tmp_path):
    async with service(tmp_path) as (run, store):
        store.create(NewJob(KIND))
        stream = Stream(run.app, ALL)
        await until(lambda: stream.last_id is not None)
        await stream.close()
        assert stream.messages == []  # a stream of all jobs begins with the next event
        new = store.create(NewJob(KIND)).id
        again = Stream(run.app, ALL, stream.last_id)
        await read(again, 1)
        await again.close()
    assert again.messages[0]["job"] == new


async def test_all_jobs_before_there_is_a_store(tmp_path):
    async with running(tmp_path) as run:
        run.app.state.jobs.kinds = KINDS
        stream = Stream(run.app, ALL)
        await until(lambda: stream.last_id == "0")
        assert not (tmp_path / "jobs").exists()
        created = (await run.client.post("/v1/jobs", json={"kind": KIND})).json()
        await read(stream, 1)
        await run.client.post(f"/v1/jobs/{created['id']}/cancel")
        await read(stream, 3)
        assert not stream.task.done()  # the end of a job does not end a stream of all jobs
        await stream.close()
        await until(lambda: run.app.state.streams.count == 0)
    assert [message["kind"] for message in stream.messages] == ["state", "cancel", "state"]


async def test_a_job_that_was_retried_is_followed_beyond_its_first_end(tmp_path):
    async with service(tmp_path) as (run, store):
        job_id = store.create(NewJob(KIND)).id
        store.fail(claimed(store).lease, "no")
        store.retry(job_id)
        stream = Stream(run.app, f"/v1/jobs/{job_id}/events")
        await read(stream, 4)
        await asyncio.sleep(0.2)
        assert not stream.task.done()
        store.succeed(claimed(store).lease)
        await asyncio.wait_for(stream.task, 20)
        states = [message["data"]["state"] for message in stream.messages]
        assert states == ["queued", "running", "failed", "queued", "running", "succeeded"]
        everything = Stream(run.app, f"/v1/jobs/{job_id}/events?follow=all")
        await read(everything, 6)
        await asyncio.sleep(0.1)
        assert not everything.task.done()
        store.remove(job_id)
        await read(everything, 7)
        await everything.close()
    assert everything.messages[-1]["kind"] == "removed"


async def test_a_stream_tells_that_its_job_was_removed(tmp_path):
    async with service(tmp_path) as (run, store):
        job_id = store.create(NewJob(KIND)).id
        stream = Stream(run.app, f"/v1/jobs/{job_id}/events")
        await read(stream, 1)
        store.request_cancel(job_id)
        await asyncio.wait_for(stream.task, 20)
        store.remove(job_id)
        path = f"/v1/jobs/{job_id}/events"
        late = await run.client.get(path, headers={"Last-Event-ID": str(stream.last_id)})
        [removed] = [line for line in late.text.splitlines() if line.startswith("data: ")]
        number = json.loads(removed[6:])["number"]
        assert json.loads(removed[6:])["kind"] == "removed"
        gone = await run.client.get(path, headers={"Last-Event-ID": str(number)})
        new = await run.client.get(path)
    assert [answer.status_code for answer in (late, gone, new)] == [200, 404, 404]


async def test_where_a_stream_begins(tmp_path):
    async with service(tmp_path) as (run, store):
        job_id = store.create(NewJob(KIND)).id
        store.request_cancel(job_id)
        last = store.last_event()
        path = f"/v1/jobs/{job_id}/events"

        async def numbers(query: str, **headers: str) -> list[int]:
            answer = await run.client.get(f"{path}?{query}", headers=headers)
            assert answer.status_code == 200
            return [json.loads(line[6:])["number"] for line in answer.text.splitlines() if line.startswith("data: ")]

        assert await numbers("") == [1, 2, 3]
        assert await numbers("last_event_id=1") == [2, 3]
        assert await numbers("last_event_id=1", **{"Last-Event-ID": "2"}) == [3]
        assert await numbers("last_event_id=1", **{"Last-Event-ID": ""}) == [2, 3]
        assert await numbers("follow=none") == [1, 2, 3]
        assert await numbers(f"last_event_id={last + 5}") == [1, 2, 3]  # an older store was restored
        complete = await run.client.get(path, headers={"Last-Event-ID": str(last)})
        assert (complete.status_code, complete.content) == (204, b"")
        assert await numbers(f"follow=none&last_event_id={last}") == []
        everything = await run.client.get(f"{ALL}?follow=none")
        assert everything.text.count("data: ") == 3


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "1e3", "9" * 30, "1,2", "٣"])
async def test_an_id_that_is_no_number_is_refused(tmp_path, value):
    async with service(tmp_path) as (run, store):
        store.create(NewJob(KIND))
        header = {"Last-Event-ID": value.encode()}
        answers = [await run.client.get(ALL, headers=header), await run.client.get(f"{ALL}?last_event_id={value}")]
        unknown = await run.client.get(f"{ALL}?follow=end")
    assert [answer.status_code for answer in (*answers, unknown)] == [422, 422, 422]
    assert answers[0].json()["param"] == "Last-Event-ID"
    assert answers[1].json()["param"] == "last_event_id"


async def test_a_silent_stream_sends_comments_and_has_no_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(job_events, "HEARTBEAT_S", 0.1)
    async with service(tmp_path, request_deadline_s=0.3) as (run, store):
        stream = Stream(run.app, ALL)
        await until(lambda: stream.comments >= 8, 30)
        store.create(NewJob(KIND))
        await read(stream, 1)
        await stream.close()
    assert stream.status == 200


async def test_a_change_without_a_new_stamp_is_noticed_with_the_next_comment(tmp_path, monkeypatch):
    """A process can die after its commit and before it changes the stamp."""
    monkeypatch.setattr(job_events, "HEARTBEAT_S", 0.2)
    async with service(tmp_path) as (run, store):
        stream = Stream(run.app, ALL)
        await until(lambda: stream.last_id is not None)
        monkeypatch.setattr(store.stamp, "bump", lambda: None)
        store.create(NewJob(KIND))
        await read(stream, 1)
        await stream.close()


async def test_a_client_that_does_not_read_holds_neither_memory_nor_the_shutdown(tmp_path):
    async with service(tmp_path) as (run, store):
        stream = Stream(run.app, f"{ALL}?last_event_id=0")
        await until(lambda: stream.status == 200)
        stream.reads.clear()
        job_id = store.create(NewJob(KIND)).id
        job = claimed(store)
        for n in range(500):
            store.finish_step(job.lease, f"step {n}", "x" * 100)
        read_pages = []
        original = Source.read
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Source, "read", lambda self: read_pages.append(1) or original(self))
            await asyncio.sleep(0.3)
            assert len(read_pages) <= 1  # the stream waits for the client
            stream.reads.set()
            await read(stream, 502)
            stream.reads.clear()
            store.finish_step(job.lease, "last", None)
            await asyncio.sleep(0.1)
            run.app.state.lifecycle.draining = True
            await asyncio.wait_for(stream.task, 5)
        assert run.app.state.lifecycle.in_flight == 0
        assert run.app.state.streams.count == 0
    steps = [message["data"]["name"] for message in stream.messages if message["kind"] == "step"]
    assert steps == [f"step {n}" for n in range(500)]
    assert {message["job"] for message in stream.messages} == {job_id}


async def test_the_number_of_streams_is_limited(tmp_path):
    async with service(tmp_path) as (run, store):
        job_id = store.create(NewJob(KIND)).id
        run.app.state.streams.limit = 2
        streams = [Stream(run.app, ALL), Stream(run.app, f"/v1/jobs/{job_id}/events")]
        await until(lambda: all(stream.status for stream in streams))
        refused = await run.client.get(ALL)
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert refused.headers["Retry-After"] == "5"
        assert (await run.client.get("/v1/jobs")).status_code == 200
        await streams[0].close()
        third = Stream(run.app, ALL)
        await until(lambda: third.status == 200)
        for stream in (streams[1], third):
            await stream.close()
        assert run.app.state.streams.count == 0


async def test_a_shutdown_ends_open_streams(tmp_path):
    async with service(tmp_path) as (run, store):
        job_id = store.create(NewJob(KIND)).id
        streams = [Stream(run.app, ALL), Stream(run.app, f"/v1/jobs/{job_id}/events?follow=all")]
        await until(lambda: all(stream.last_id for stream in streams))
        assert run.app.state.lifecycle.in_flight == 2
        run.app.state.lifecycle.draining = True
        await asyncio.wait_for(asyncio.gather(*(stream.task for stream in streams)), 5)
        assert all(stream.ended for stream in streams)  # the answer is complete, so the connection is not broken
        assert run.app.state.lifecycle.in_flight == 0


async def test_head_of_a_stream_that_does_not_end(tmp_path):
    async with service(tmp_path) as (run, _):
        stream = Stream(run.app, ALL, method="HEAD")
        await asyncio.wait_for(stream.task, 20)
    assert (stream.status, stream.messages) == (200, [])


async def test_a_store_that_fails_ends_the_stream(tmp_path, caplog):
    async with service(tmp_path) as (run, store):
        stream = Stream(run.app, ALL)
        await until(lambda: stream.last_id is not None)
        store.close()
        store.stamp.bump()
        await asyncio.wait_for(stream.task, 20)
        run.app.state.jobs.close()
    assert not stream.ended  # the client notices that the answer is incomplete, and connects again
    assert "storage_failed" in caplog.text


@pytest.mark.parametrize("text", ["a\nb\r\n\n data: x", "größe 🙂", "\u2028\u2029\x85", "\ud800", 10**40, float("nan")])
def test_no_value_breaks_the_format(text):
    event = encoded(Event(7, "a-1", 0.0, "step", {"name": "x", "result": text}))
    head, kind, body, *rest = event.decode().split("\n")
    assert (head, kind, rest) == ("id: 7", "event: step", ["", ""])
    assert "\r" not in body
    result = json.loads(body.removeprefix("data: "))["data"]["result"]
    assert result == text or (result is None and text != text)


def test_a_server_with_open_streams_stops_at_once(tmp_path):
    """The grace period is longer than the time that the test waits for the server's end."""
    server = Server(tmp_path / "data", DINOV2_SHUTDOWN_GRACE_S="120", DINOV2_LOCAL_WORKER="false")
    try:
        body = {"kind": "export", "source": "dinov2_vits14"}
        job = httpx.post(f"{server.url}/v1/jobs", json=body, timeout=30).json()
        with (
            httpx.Client(timeout=30) as client,
            client.stream("GET", f"{server.url}/v1/jobs/{job['id']}/events") as one,
            client.stream("GET", f"{server.url}/v1/jobs/events?last_event_id=0") as all_jobs,
        ):
            lines = [one.iter_lines(), all_jobs.iter_lines()]
            for each in lines:
                assert next(line for line in each if line.startswith("data: "))
            assert server.stop() == 0
            assert [list(each) for each in lines] == [[""], [""]]  # both answers end as they should
    finally:
        server.process.kill()
    assert "Traceback" not in server.log.read_text()

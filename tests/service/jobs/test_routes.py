"""Tests of the routes for jobs and schedules, without a worker: the tests change the jobs in the store themselves."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.jobs.blocked import why_blocked
from service.jobs.kind import JobParams, Kind
from service.jobs.kinds import KINDS as REAL_KINDS
from service.jobs.opened import OpenedJobs, _Progress
from service.jobs.records import NewJob, WorkerRow
from service.jobs.store import JobStore
from service.routes.job_schemas import JobIn, ScheduleIn
from service.routes.jobs import MAX_PARAMS_BYTES, _from_first_character, _whole_characters
from service.security import Principal
from tests.fakes import Running, running
from tests.service.jobs.kinds_for_tests import KINDS

JOBS = "/v1/jobs"


@asynccontextmanager
async def service(tmp_path: Path, **settings: Any) -> AsyncIterator[Running]:
    """Start a service that knows the kinds of jobs for tests."""
    async with running(tmp_path, **settings) as run:
        run.app.state.jobs.kinds = KINDS
        yield run


def store_of(run: Running) -> JobStore:
    jobs = run.app.state.jobs
    assert isinstance(jobs, OpenedJobs)
    return jobs.store()


async def created(run: Running, kind: str = "steps", **params: Any) -> str:
    answer = await run.client.post(JOBS, json={"kind": kind, **params})
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


async def test_a_job_is_created_listed_and_shown(tmp_path):
    async with service(tmp_path) as run:
        answer = await run.client.post(JOBS, json={"kind": "steps", "approval": True, "fail": None})
        assert answer.status_code == 202
        job = answer.json()
        assert answer.headers["Location"] == f"{JOBS}/{job['id']}"
        shown = await run.client.get(answer.headers["Location"])
        assert shown.json() == job
        assert (job["state"], job["params"], job["progress"]) == ("queued", {"approval": True}, 0)
        assert job["created_at"].endswith("Z")
        listed = (await run.client.get(JOBS)).json()
    assert listed["data"] == [job]
    assert listed["next"] is None
    assert listed["last_event"] == 1


async def test_reading_creates_no_store(tmp_path):
    async with service(tmp_path) as run:
        assert (await run.client.get(JOBS)).json()["data"] == []
        assert (await run.client.get("/v1/schedules")).json()["data"] == []
        metrics = (await run.client.get("/metrics")).text
        for method, path in (
            ("GET", f"{JOBS}?before=train-0"),
            ("GET", f"{JOBS}/train-0"),
            ("GET", f"{JOBS}/train-0/log"),
            ("GET", f"{JOBS}/train-0/events"),
            ("POST", f"{JOBS}/train-0/cancel"),
            ("POST", f"{JOBS}/train-0/approve"),
            ("POST", f"{JOBS}/train-0/retry"),
            ("DELETE", f"{JOBS}/train-0"),
        ):
            answer = await run.client.request(method, path)
            assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found"), path
        for method in ("GET", "DELETE"):
            assert (await run.client.request(method, "/v1/schedules/nightly")).json()["code"] == "not_found"
        assert not (tmp_path / "jobs").exists()
        assert 'dinov2_jobs{state="failed"} 0.0' in metrics
        await created(run)
        assert (tmp_path / "jobs" / "jobs.sqlite3").exists()


async def test_the_list_is_filtered_and_has_pages(tmp_path):
    async with service(tmp_path) as run:
        ids = [await created(run, kind) for kind in ("steps", "sleep", "steps", "count", "steps")]
        await run.client.post(f"{JOBS}/{ids[2]}/cancel")

        async def listed(query: str) -> list[str]:
            return [job["id"] for job in (await run.client.get(f"{JOBS}?{query}")).json()["data"]]

        assert await listed("") == ids[::-1]
        assert await listed("kind=steps") == [ids[4], ids[2], ids[0]]
        assert await listed("kind=steps,count&state=queued") == [ids[4], ids[3], ids[0]]
        assert await listed("kind=steps&kind=sleep&state=cancelled") == [ids[2]]
        assert await listed("kind=no-such-kind") == []
        pages, query = [], "limit=2"
        while query:
            page = (await run.client.get(f"{JOBS}?{query}")).json()
            pages.append([job["id"] for job in page["data"]])
            query = f"limit=2&before={page['next']}" if page["next"] else ""
        assert pages == [ids[4:2:-1], ids[2:0:-1], ids[:1]]
        lost = await run.client.get(f"{JOBS}?before=steps-0")
    assert (lost.status_code, lost.json()["param"]) == (404, "before")


async def test_a_job_shows_what_its_worker_reports(tmp_path):
    async with service(tmp_path) as run:
        job_id = await created(run)
        store = store_of(run)
        job = store.claim("worker", ["steps"], 60)
        assert job is not None
        store.report(job.lease, 0.25, "one of four", {"loss": float("nan"), "step": 3})
        store.finish_step(job.lease, "one", {"folder": "größe"})
        store.log(job.lease, "first line\nsecond ÄÖÜ\n".encode())
        shown = (await run.client.get(f"{JOBS}/{job_id}?log=10")).json()
        store.fail(job.lease, "the disk is full")
        failed = (await run.client.get(f"{JOBS}/{job_id}")).json()
    assert (shown["state"], shown["progress"], shown["text"]) == ("running", 0.25, "one of four")
    assert shown["metrics"] == {"loss": None, "step": 3}
    assert [(step["name"], step["result"]) for step in shown["steps"]] == [("one", {"folder": "größe"})]
    assert shown["log"] == {"text": "nd ÄÖÜ\n", "position": 25}
    assert shown["worker"] == "worker"
    assert (failed["state"], failed["error"]) == ("failed", "the disk is full")
    assert failed["ended_at"] is not None
    assert "log" not in failed


async def test_the_log_is_read_in_parts(tmp_path):
    text = "".join(f"{n} größer\n" for n in range(200))
    async with service(tmp_path) as run:
        job_id = await created(run)
        store = store_of(run)
        job = store.claim("worker", ["steps"], 60)
        assert job is not None
        store.log(job.lease, text.encode())
        parts, position = [], 0
        while True:
            answer = await run.client.get(f"{JOBS}/{job_id}/log?after={position}&limit=101")
            if not answer.content:
                break
            assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            parts.append(answer.content.decode())  # no part ends within a character
            position = int(answer.headers["X-Log-Position"])
        tail = await run.client.get(f"{JOBS}/{job_id}/log?limit=20")
        store.log(job.lease, b"more\n")
        more = await run.client.get(f"{JOBS}/{job_id}/log?after={position}")
        beyond = await run.client.get(f"{JOBS}/{job_id}/log?after={2**53}")
    assert "".join(parts) == text
    assert position == len(text.encode()) == int(tail.headers["X-Log-Bytes"])
    assert text.encode().endswith(tail.content)
    assert more.text == "more\n"
    assert beyond.content == b""


@pytest.mark.parametrize("text", ["", "a", "ä", "€", "🙂", "aä", "a€", "a🙂", "🙂🙂", "plain text"])
def test_text_is_cut_between_characters(text):
    encoded = text.encode()
    for length in range(len(encoded) + 1):
        whole = _whole_characters(encoded[:length])
        assert encoded.startswith(whole)
        if len(encoded[:length].decode(errors="ignore")) > 0:
            assert whole.decode() == encoded[:length].decode(errors="ignore")
        else:
            assert whole == encoded[:length]  # so that a reader does not wait forever
        rest = _from_first_character(encoded[length:])
        assert rest.decode(errors="replace").count("\ufffd") == 0 or not rest.decode(errors="ignore")


async def test_cancel_approve_retry_and_remove(tmp_path):
    async with service(tmp_path) as run:
        job_id = await created(run, approval=True)
        store = store_of(run)
        job = store.claim("worker", ["steps"], 60)
        assert job is not None
        store.wait_for_approval(job.lease, "approval", "add two?")
        assert (await run.client.get(f"{JOBS}/{job_id}")).json()["waiting_for"] == "approval"
        assert (await run.client.post(f"{JOBS}/{job_id}/retry")).status_code == 409
        assert (await run.client.delete(f"{JOBS}/{job_id}")).status_code == 409
        approved = await run.client.post(f"{JOBS}/{job_id}/approve", json={})
        assert (approved.status_code, approved.json()["state"]) == (200, "queued")
        assert (await run.client.post(f"{JOBS}/{job_id}/approve")).status_code == 409
        assert store.claim("worker", ["steps"], 60) is not None
        cancelling = (await run.client.post(f"{JOBS}/{job_id}/cancel")).json()
        assert (cancelling["state"], cancelling["cancel_requested"]) == ("running", True)
        store.cancel(store.get(job_id).lease)
        assert (await run.client.post(f"{JOBS}/{job_id}/cancel")).status_code == 409
        assert (await run.client.post(f"{JOBS}/{job_id}/retry")).json()["state"] == "queued"
        assert (await run.client.post(f"{JOBS}/{job_id}/cancel")).json()["state"] == "cancelled"
        refused = await run.client.post(f"{JOBS}/{job_id}/retry", json={"force": True})
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
        assert (await run.client.delete(f"{JOBS}/{job_id}")).json() == {"id": job_id, "deleted": True}
        assert (await run.client.get(f"{JOBS}/{job_id}")).status_code == 404


async def test_an_idempotency_key_creates_one_job(tmp_path):
    async with service(tmp_path) as run:
        key = {"Idempotency-Key": "monday"}
        first = await run.client.post(JOBS, json={"kind": "steps"}, headers=key)
        second = await run.client.post(JOBS, json={"kind": "steps", "fail": None}, headers=key)
        other = await run.client.post(JOBS, json={"kind": "steps", "fail": True}, headers=key)
        bad = await run.client.post(JOBS, json={"kind": "steps"}, headers={"Idempotency-Key": "x" * 129})
        count = len((await run.client.get(JOBS)).json()["data"])
    assert first.json()["id"] == second.json()["id"]
    assert (other.status_code, bad.status_code, count) == (409, 422, 1)
    assert bad.json()["param"] == "Idempotency-Key"


async def test_the_job_has_the_id_of_the_key_that_created_it(tmp_path, monkeypatch):
    sender = Principal("k1", "operator", frozenset({"open", "metrics", "read", "write", "admin"}))
    async with service(tmp_path) as run:
        monkeypatch.setattr(
            run.app.state.security, "admit", lambda scope, headers: scope["state"].update(principal=sender)
        )
        job = (await run.client.post(JOBS, json={"kind": "steps"})).json()
        await run.client.post(f"{JOBS}/{job['id']}/cancel")
        nightly = await run.client.put("/v1/schedules/nightly", json={"kind": "steps", "every": "6 h"})
        [cancelled] = [event for event in store_of(run).events() if event.kind == "cancel"]
    assert job["requested_by"] == nightly.json()["requested_by"] == cancelled.data["by"] == "k1"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ["kind"]),
        ({"kind": "fly"}, ["fly", "steps"]),
        ({"kind": 3}, ["kind"]),
        ({"kind": "k" * 100_000}, ["bytes", "65,536"]),
        ({"kind": "steps", "speed": 3}, ["speed"]),
        ({"kind": "steps", "fail": "perhaps"}, ["fail"]),
        ({"kind": "steps", "__class__": "x"}, ["__class__"]),
        ({"kind": "steps", **{f"p{n}": n for n in range(40)}}, ["41"]),
        ({"kind": "count", "until": 10**30}, ["until"]),
        ({"kind": "steps", "not_before": "tomorrow"}, ["not_before"]),
        ({"kind": "steps", "not_before": -1}, ["not_before"]),
        ({"kind": "steps", "not_before": "2030-01-01T00:00:00"}, ["not_before", "time zone"]),
        ({"kind": "steps", "not_before": 1e300}, ["not_before"]),
        ({"kind": "steps", "every": "sometimes"}, ["sometimes", "sunday 03:00"]),
        ({"kind": "steps", "every": "6 h", "zone": "Mars/Base"}, ["Mars/Base"]),
        ({"kind": "steps", "every": "6 h", "schedule": "../x"}, ["schedule"]),
        ({"kind": "steps", "every": "6 h", "not_before": 5}, ["not_before"]),
        ({"kind": "steps", "zone": "UTC"}, ["zone", "every"]),
        ({"kind": "steps", "schedule": "a"}, ["schedule", "every"]),
    ],
)
async def test_what_is_wrong_with_a_job_is_a_422_that_names_it(tmp_path, body, words):
    content = json.dumps(body)
    async with service(tmp_path) as run:
        answer = await run.client.post(JOBS, content=content, headers={"Content-Type": "application/json"})
        assert not (tmp_path / "jobs").exists() or not store_of(run).jobs()
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert all(word in answer.json()["detail"] for word in words), answer.json()["detail"]
    assert len(answer.content) < 4000


async def test_a_training_with_an_unknown_setting_is_a_422(tmp_path):
    async with running(tmp_path) as run:
        body = {"kind": "train", "data": ["shop"], "recipe": "smoke", "overrides": ["epoch=3"]}
        job = await run.client.post(JOBS, json=body)
        schedule = await run.client.put("/v1/schedules/weekly", json={**body, "every": "6 h"})
        assert not (tmp_path / "jobs").exists()
    for answer in (job, schedule):
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert answer.json()["detail"].startswith("unknown setting 'epoch': did you mean epochs")


async def test_hostile_bodies_and_queries(tmp_path):
    async with service(tmp_path) as run:
        await created(run)
        deep = b'{"kind": "steps", "x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
        headers = {"Content-Type": "application/json"}
        for content, status in ((deep, 400), (b"[]", 422), (b"{", 400), (b'{"kind": "\\ud800"}', 400), (b"", 400)):
            assert (await run.client.post(JOBS, content=content, headers=headers)).status_code == status, content[:30]
        assert (await run.client.post(JOBS, content=b"x")).status_code == 415
        huge = b'{"kind": "child", "code": "' + b"x" * MAX_PARAMS_BYTES + b'"}'
        assert (await run.client.post(JOBS, content=huge, headers=headers)).status_code == 422
        large = {"kind": "child", "code": "x" * (MAX_PARAMS_BYTES - 100)}
        assert (await run.client.post(JOBS, json=large)).status_code == 202
        for query in (
            "state=asleep",
            "limit=0",
            "limit=1001",
            "limit=x",
            "order=asc",
            "before=a&before=b",
            f"kind={'k' * 65}",
            f"kind={','.join(['a'] * 21)}",
        ):
            answer = await run.client.get(f"{JOBS}?{query}")
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), query
        job_id = await created(run)
        for path in ("?log=-1", "?log=65537", "?log=x", "/log?after=-1", "/log?limit=0", f"/log?after={2**70}"):
            assert (await run.client.get(f"{JOBS}/{job_id}{path}")).status_code == 422, path
        for strange in ("..%00", "%00", "a" * 3000, "%F0%9F%99%82", "train-'%20OR%201=1"):
            answer = await run.client.get(f"{JOBS}/{strange}/log")
            assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found"), strange
            assert len(answer.content) < 4000


class NestedParams(JobParams):
    rules: dict[str, Any]


@pytest.mark.parametrize(("depth", "status"), [(20, 202), (40, 422), (900, 422)])
async def test_deep_parameters_are_refused_or_can_be_shown(tmp_path, depth, status):
    rules = b'{"a": ' * depth + b"1" + b"}" * depth
    body = b'{"kind": "nested", "rules": ' + rules + b"}"
    async with running(tmp_path) as run:
        run.app.state.jobs.kinds = {"nested": Kind("take any rules", NestedParams, lambda context: None)}
        answer = await run.client.post(JOBS, content=body, headers={"Content-Type": "application/json"})
        listed = await run.client.get(JOBS)
    assert (answer.status_code, listed.status_code) == (status, 200)
    assert status == 202 or "nested more than 32 levels deep" in answer.text


async def test_unicode_in_parameters_is_kept(tmp_path):
    code = "print('größe 🙂 \u2028 \x00')"
    async with service(tmp_path) as run:
        job_id = await created(run, "child", code=code)
        assert (await run.client.get(f"{JOBS}/{job_id}")).json()["params"] == {"code": code}


async def test_a_later_start(tmp_path):
    async with service(tmp_path) as run:
        body = {"kind": "steps", "not_before": "2030-01-01T01:00:00+01:00"}
        job = (await run.client.post(JOBS, json=body)).json()
        same = (await run.client.post(JOBS, json={"kind": "steps", "not_before": 1_893_456_000})).json()
        assert store_of(run).claim("worker", ["steps"], 60) is None
    assert job["not_before"] == same["not_before"] == "2030-01-01T00:00:00.000Z"


async def test_schedules(tmp_path):
    async with service(tmp_path, schedule_zone="Europe/Berlin") as run:
        body = {"kind": "steps", "every": "sunday 03:00", "fail": True}
        new = await run.client.put("/v1/schedules/weekly", json=body)
        assert (new.status_code, new.json()["zone"], new.json()["params"]) == (201, "Europe/Berlin", {"fail": True})
        changed = await run.client.put("/v1/schedules/weekly", json={"kind": "sleep", "every": "daily 02:30"})
        assert (changed.status_code, changed.json()["kind"]) == (200, "sleep")
        assert (await run.client.get("/v1/schedules/weekly")).json() == changed.json()
        listed = (await run.client.get("/v1/schedules")).json()
        assert listed["data"] == [changed.json()]
        for path, bad in (
            ("weekly", {"kind": "fly", "every": "6 h"}),
            ("weekly", {"kind": "steps"}),
            ("weekly", {"kind": "steps", "every": "0 h"}),
            ("we%20ekly", {"kind": "steps", "every": "6 h"}),
        ):
            assert (await run.client.put(f"/v1/schedules/{path}", json=bad)).status_code == 422, bad
        assert (await run.client.get("/v1/schedules")).json() == listed
        assert (await run.client.delete("/v1/schedules/weekly")).json() == {"name": "weekly", "deleted": True}
        assert (await run.client.delete("/v1/schedules/weekly")).status_code == 404


async def test_a_job_with_every_is_a_schedule(tmp_path):
    async with service(tmp_path) as run:
        body = {"kind": "steps", "every": "6 h", "fail": True}
        first = await run.client.post(JOBS, json=body)
        again = await run.client.post(JOBS, json=body)
        other = await run.client.post(JOBS, json=body | {"every": "7 h"})
        named = await run.client.post(JOBS, json=body | {"every": "7 h", "schedule": "seven"})
        assert (await run.client.get(JOBS)).json()["data"] == []
        assert (first.status_code, first.json()["object"]) == (201, "schedule")
        assert first.headers["Location"] == "/v1/schedules/steps"
        assert again.json() == first.json()
        assert (other.status_code, other.json()["code"]) == (409, "conflict")
        assert named.headers["Location"] == "/v1/schedules/seven"


@pytest.mark.parametrize("kind", REAL_KINDS.values(), ids=list(REAL_KINDS))
def test_no_parameter_has_the_name_of_another_field(kind):
    assert not {*JobIn.model_fields, *ScheduleIn.model_fields} & set(kind.params.model_fields)


async def test_metrics_of_jobs(tmp_path):
    async with service(tmp_path) as run:
        await created(run), await created(run)
        store = store_of(run)
        job = store.claim("worker", ["steps"], 60)
        assert job is not None
        store.workers.beat(WorkerRow("w1", "host", 1, ("steps",), 0.0, 0.0))
        store.now = store._file.now = lambda now=store.now: now() + 45  # type: ignore[misc]
        text = (await run.client.get("/metrics")).text
        store.workers.leave("w1")
        left = (await run.client.get("/metrics")).text
    assert 'dinov2_jobs{state="queued"} 1.0' in text
    assert 'dinov2_jobs{state="running"} 1.0' in text
    assert 'dinov2_jobs{state="failed"} 0.0' in text
    age = next(float(line.split()[1]) for line in text.splitlines() if line.startswith("dinov2_worker_heartbeat_age"))
    assert 45 <= age < 100
    assert "dinov2_worker_heartbeat_age_seconds 0.0" in left


async def test_a_job_says_that_no_worker_can_start_it(tmp_path):
    async with service(tmp_path) as run:
        store = store_of(run)

        async def blocked(job_id: str) -> tuple[str | None, float]:
            shown = (await run.client.get(f"{JOBS}/{job_id}")).json()["blocked"]
            listed = (await run.client.get(JOBS)).json()["data"]
            assert [job["blocked"] for job in listed if job["id"] == job_id] == [shown]
            metrics = (await run.client.get("/metrics")).text.splitlines()
            return shown, next(float(line.split()[1]) for line in metrics if line.startswith("dinov2_jobs_blocked "))

        job_id = await created(run, not_before="2100-01-01T00:00:00Z")
        store.workers.beat(WorkerRow("w1", "host", 1, ("sleep",), 0.0, 0.0))
        assert await blocked(job_id) == (None, 0)  # it is not due
        answer = await run.client.post(JOBS, json={"kind": "steps"})
        why = "no running worker runs jobs of the kind steps: start one with `dinov2 worker`"
        assert answer.json()["blocked"] == why
        assert await blocked(answer.json()["id"]) == (why, 1)
        store.workers.beat(WorkerRow("w2", "host", 2, ("steps", "sleep"), 0.0, 0.0))
        assert await blocked(answer.json()["id"]) == (None, 0)


def test_a_job_that_waits_for_the_first_worker_is_not_blocked_at_once(tmp_path):
    job = JobStore(tmp_path).create(NewJob("train"))
    worker = WorkerRow("w1", "host", 1, ("export",), 0.0, 0.0)
    assert why_blocked(job, [], job.created + 5) is None
    assert why_blocked(job, [], job.created + 11) == "no worker is running: start one with `dinov2 worker`"
    assert "kind train, which needs torch" in str(why_blocked(job, [worker], job.created))
    assert why_blocked(replace(job, state="running"), [worker], job.created) is None


def test_a_report_without_news_is_no_progress(tmp_path):
    clock = [100.0]
    progress = _Progress(lambda: clock[0])
    store = JobStore(tmp_path)
    first, second = store.create(NewJob("a")), store.create(NewJob("a"))
    lease = [job.lease for _ in (first, second) if (job := store.claim("w", ["a"], 3600))]

    def after(seconds: float) -> float:
        clock[0] += seconds
        return progress.longest_pause_s(store.jobs(states=("running",)))

    assert after(0) == 0
    for one in lease:
        store.report(one, 0.0, "", {})
    assert after(10) == 10  # the worker has stored the same figures again
    store.report(lease[0], 0.1)
    assert after(5) == 15  # of the second job
    store.log(lease[1], b"a line")
    assert after(1) == 1  # both jobs have news since the last look
    store.succeed(lease[0])
    assert after(1) == 1
    store.succeed(lease[1])
    assert after(1) == 0


async def test_a_damaged_store_is_a_500_and_does_not_stop_the_service(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "jobs.sqlite3").write_bytes(b"not a database" * 100)
    async with service(tmp_path) as run:
        for work in (
            lambda: run.client.get(JOBS),
            lambda: run.client.post(JOBS, json={"kind": "steps"}),
            lambda: run.client.get(f"{JOBS}/events"),
        ):
            call: Callable[[], Awaitable[httpx.Response]] = work
            answer = await call()
            assert (answer.status_code, answer.json()["code"]) == (500, "storage_damaged")
            assert str(tmp_path) not in answer.text
        assert (await run.client.get("/metrics")).status_code == 200
        assert (await run.client.get("/readyz")).status_code == 200


async def test_requests_that_create_jobs_at_the_same_time(tmp_path):
    async with service(tmp_path) as run:
        key = {"Idempotency-Key": "once"}
        same = [run.client.post(JOBS, json={"kind": "steps"}, headers=key) for _ in range(8)]
        ids = {answer.json()["id"] for answer in await asyncio.gather(*same)}
        assert len(ids) == 1

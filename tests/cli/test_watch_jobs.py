"""Tests of the options of `dinov2 jobs ...` for scripts: exit statuses, JSON, filters and times."""

import json
import re
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cli
from service.jobs.answers import job_answers
from service.jobs.records import Job, NewJob, State, WorkerRow
from service.jobs.store import JobStore

runner = CliRunner()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobStore:
    monkeypatch.setenv("DINOV2_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("cli.jobs.POLL_S", 0.01)
    return JobStore(tmp_path)


def invoke(*words: str) -> Result:
    return runner.invoke(cli.app, ["jobs", *words])


def claimed(store: JobStore) -> Job:
    job = store.claim("worker", ["export"], 60)
    assert job is not None
    return job


def end(store: JobStore, state: State) -> None:
    job = claimed(store)
    if state == "succeeded":
        store.succeed(job.lease)
    elif state == "failed":
        store.fail(job.lease, "the disk\n is full")
    else:
        store.cancel(job.lease)


@pytest.mark.parametrize(("state", "status"), [("succeeded", 0), ("failed", 1), ("cancelled", 3)])
def test_the_status_of_watch_tells_how_a_job_has_ended(store: JobStore, state: State, status: int) -> None:
    job_id = store.create(NewJob("export")).id
    later = threading.Timer(0.3, end, (store, state))
    later.start()
    said = invoke("watch", job_id)
    later.join()
    assert said.exit_code == status
    lines = [line.split("  ", 1)[1] for line in said.stdout.splitlines()]
    assert lines == ["queued", "running", state if state != "failed" else "failed: the disk is full"]
    assert invoke("watch", job_id).exit_code == status  # a job that has ended already


def test_watch_prints_what_happens(store: JobStore) -> None:
    job_id = store.create(NewJob("export")).id
    job = claimed(store)
    store.report(job.lease, 0.5, "half")
    store.finish_step(job.lease, "one", {"n": 1})
    store.log(job.lease, b"a line\n")
    store.request_cancel(job_id)
    store.cancel(job.lease)
    lines = [line.split("  ", 1)[1] for line in invoke("watch", job_id).stdout.splitlines()]
    assert lines == [
        "queued",
        "running",
        "50% half",
        "finished the step one",
        "the cancellation was requested",
        "cancelled",
    ]
    events = [json.loads(line) for line in invoke("watch", job_id, "--json").stdout.splitlines()]
    assert [event["number"] for event in events] == sorted(event["number"] for event in events)
    assert events[-1]["data"]["state"] == "cancelled"
    assert "log" in {event["kind"] for event in events}


def test_watching_a_job_that_does_not_exist_or_is_removed(store: JobStore) -> None:
    assert (invoke("watch", "none").exit_code, invoke("watch", "none").stderr) == (2, "error: there is no job 'none'\n")
    job_id = store.create(NewJob("export")).id
    later = threading.Timer(0.2, lambda: (store.request_cancel(job_id), store.remove(job_id)))
    later.start()
    assert invoke("watch", job_id).exit_code in (2, 3)  # removed before or after the next look
    later.join()


def test_commands_print_json(store: JobStore) -> None:
    job = json.loads(invoke("start", "export", "source=dinov2_vits14", "--json").stdout)
    assert (job["state"], job["params"]) == ("queued", {"source": "dinov2_vits14"})
    assert json.loads(invoke("cancel", job["id"], "--json").stdout)["state"] == "cancelled"
    assert json.loads(invoke("retry", job["id"], "--json").stdout)["state"] == "queued"
    store.wait_for_approval(claimed(store).lease, "approval")
    approved = json.loads(invoke("approve", job["id"], "--json").stdout)
    assert (approved["state"], [step["name"] for step in approved["steps"]]) == ("queued", ["approval"])


def test_times_and_names_are_those_of_the_rest_api(store: JobStore) -> None:
    store.workers.beat(WorkerRow("w1", "host", 1, ("train",), 0.0, 0.0))
    started = invoke("start", "export", "source=dinov2_vits14", "--json")
    assert started.stderr.startswith("warning: no running worker runs jobs of the kind export")
    job = json.loads(started.stdout)
    shown = json.loads(invoke("show", job["id"]).stdout)
    assert shown == job == job_answers(store, [store.get(job["id"])])[0]
    assert shown["blocked"] == started.stderr.removeprefix("warning: ").strip()
    worker = json.loads(invoke("list", "--json").stdout)["workers"][0]
    store.cancel(claimed(store).lease)
    event = json.loads(invoke("watch", job["id"], "--json").stdout.splitlines()[0])
    store.schedules.put("weekly", "export", {}, every="6 h", zone="UTC", requested_by=None)
    [schedule] = json.loads(invoke("schedules", "--json").stdout)
    times = [shown["created_at"], shown["not_before"], worker["started_at"], worker["heartbeat_at"], event["time"]]
    for time in (*times, schedule["created_at"], schedule["next_at"]):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)


def test_the_list_is_filtered(store: JobStore) -> None:
    ids = [store.create(NewJob(kind)).id for kind in ("export", "train", "export")]
    store.request_cancel(ids[0])

    def listed(*words: str) -> list[str]:
        return [job["id"] for job in json.loads(invoke("list", "--json", *words).stdout)["jobs"]]

    assert listed() == ids[::-1]
    assert listed("--kind", "export") == [ids[2], ids[0]]
    assert listed("--state", "cancelled, failed") == [ids[0]]
    assert listed("--kind", "train,export", "--state", "queued", "--limit", "1") == [ids[2]]
    wrong = invoke("list", "--state", "asleep")
    assert (wrong.exit_code, wrong.stderr.startswith("error: --state: unknown state 'asleep'; use some of queued")) == (
        2,
        True,
    )


def test_a_job_starts_later(store: JobStore) -> None:
    job_id = invoke("start", "export", "source=dinov2_vits14", "--not-before", "2100-01-01T00:00:00Z").stdout.strip()
    assert store.get(job_id).not_before == 4_102_444_800
    assert store.claim("worker", ["export"], 60) is None
    wrong = invoke("start", "export", "source=dinov2_vits14", "--not-before", "noon")
    assert (wrong.exit_code, len(store.jobs())) == (2, 1)
    assert "'noon' is not an ISO 8601 time" in wrong.stderr

"""Tests of workers and queues. Each test runs on both queues: the store alone, and RQ on a real Redis server."""

import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from service.errors import InvalidRequest
from service.jobs.kinds import checked_params, kinds_here
from service.jobs.process import holders
from service.jobs.queue import JobQueue, LocalQueue, open_queue
from service.jobs.records import Job, NewJob
from service.jobs.store import JobStore
from service.jobs.worker import Times, Worker, run_job
from service.settings import Settings
from tests.service.conftest import RedisServer
from tests.service.jobs.kinds_for_tests import KINDS, make_queue

ROOT = Path(__file__).parents[3]
NOTICED_S = 10.0
ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="uses PR_SET_PDEATHSIG")


@dataclass
class Place:
    """A data folder with its store, and the queue of the test."""

    folder: Path
    store: JobStore
    queue: JobQueue
    url: str | None

    def create(self, kind: str, **params: Any) -> Job:
        job = self.store.create(NewJob(kind, params))
        self.queue.announce(job)
        return job

    def work(self) -> None:
        """Run the jobs that are due in this process."""
        with Worker(self.store, Settings(data_dir=self.folder), kinds=KINDS) as worker:
            self.queue.work(worker, once=True)

    @contextmanager
    def worker(self) -> Iterator["subprocess.Popen[str]"]:
        """Run a worker in another process, and kill it at the end."""
        command = [sys.executable, "-m", "tests.service.jobs.kinds_for_tests", str(self.folder)]
        with subprocess.Popen(
            [*command, *([self.url] if self.url else [])], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline()
                yield process
            finally:
                process.kill()

    def log(self, job: Job) -> str:
        return self.store.read_log(job.id, 0)[0].decode()


@pytest.fixture(params=["store", "rq"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    url = None
    if request.param == "rq":
        pytest.importorskip("rq", reason="needs RQ (the extra rq)")
        url = request.getfixturevalue("redis_server").url
    return Place(tmp_path, JobStore(tmp_path), make_queue(url), url)


def eventually(condition: Callable[[], object], seconds: float = 30) -> float:
    """Wait until a condition is true, and return how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)
    return time.monotonic() - began


def test_a_job_is_run_to_its_end(place: Place) -> None:
    job = place.create("steps")
    place.work()
    job = place.store.get(job.id)
    assert (job.state, job.results, job.progress, job.text) == ("succeeded", {"one": 1, "two": 3}, 1.0, "half")
    assert (job.metrics, job.attempt, job.error) == ({"sum": 1}, 1, None)
    assert place.log(job).endswith("  adding\n")
    assert job.started is not None
    assert job.ended is not None
    assert job.created <= job.started <= job.ended
    states = [event.data["state"] for event in place.store.events() if event.kind == "state"]
    assert states == ["queued", "running", "succeeded"]
    assert place.store.workers.alive() == []


def test_several_jobs_are_run_in_order(place: Place) -> None:
    made = [place.create("steps").id for _ in range(3)]
    place.work()
    ended = sorted(place.store.jobs(), key=lambda job: job.ended or 0)
    assert [job.id for job in ended] == made


@pytest.mark.parametrize(
    ("kind", "params", "error"),
    [
        ("steps", {"fail": True}, "two cannot be added"),
        ("steps", {"bug": True}, "RuntimeError: a bug"),
        ("child", {"code": "print('some text'); exit('error: no images')"}, "no images (exit status 1)"),
        ("child", {"code": "exit(3)"}, "no output (exit status 3)"),
    ],
)
def test_a_failed_job_has_a_message_and_can_be_retried(
    tmp_path: Path, kind: str, params: dict[str, Any], error: str
) -> None:
    place = Place(tmp_path, JobStore(tmp_path), LocalQueue(), None)
    job = place.create(kind, **params)
    place.work()
    assert (place.store.get(job.id).state, place.store.get(job.id).error) == ("failed", error)
    place.store.retry(job.id)
    place.work()
    assert (place.store.get(job.id).state, place.store.get(job.id).attempt) == ("failed", 2)


def test_a_job_waits_for_approval_and_does_not_repeat_its_steps(place: Place) -> None:
    job = place.create("steps", approval=True)
    place.work()
    waiting = place.store.get(job.id)
    assert (waiting.state, waiting.waiting_for, waiting.text) == ("waiting", "approval", "add two?")
    place.work()
    assert place.store.get(job.id).state == "waiting"
    place.queue.announce(place.store.approve(job.id, "Ada"))
    place.work()
    job = place.store.get(job.id)
    assert (job.state, job.results["approval"]["approved_by"]) == ("succeeded", "Ada")
    assert [event.data["name"] for event in place.store.events() if event.kind == "step"] == ["one", "approval", "two"]


def test_a_worker_takes_only_kinds_that_can_run_here(place: Place) -> None:
    job = place.create("impossible")
    place.work()
    assert place.store.get(job.id).state == "queued"
    assert kinds_here(KINDS) == ["steps", "count", "child", "sleep"]


def test_a_job_without_a_message_is_run(place: Place) -> None:
    """The message is lost, for example because Redis was restarted."""
    job = place.store.create(NewJob("steps", {}))
    with place.worker():
        eventually(lambda: place.store.get(job.id).state == "succeeded")


def test_repeated_and_late_messages_do_no_harm(place: Place) -> None:
    job = place.create("steps")
    place.queue.announce(job)
    place.work()
    place.queue.announce(job)
    place.work()
    assert place.store.get(job.id).attempt == 1


def test_a_due_schedule_is_run(place: Place) -> None:
    clock = [1000.0]
    place.store.now = place.store._file.now = lambda: clock[0]
    place.store.schedules.put("often", "steps", {}, every="1 min")
    clock[0] += 61
    place.work()
    assert [(job.schedule, job.state) for job in place.store.jobs()] == [("often", "succeeded")]


@pytest.mark.parametrize("kind", ["sleep", "count"])
def test_a_running_job_is_cancelled(place: Place, kind: str) -> None:
    job = place.create(kind)
    with place.worker():
        eventually(lambda: place.store.get(job.id).state == "running")
        place.store.request_cancel(job.id, "Ada")
        eventually(lambda: place.store.get(job.id).state == "cancelled")
        assert not holders(place.store.folder(job.id) / "lock")


def test_sigterm_saves_the_job_and_puts_it_back_into_the_queue(place: Place) -> None:
    job = place.create("count", until=100_000)
    with place.worker() as worker:
        eventually(lambda: "counting from 0" in place.log(job))
        (row,) = place.store.workers.alive()
        eventually(lambda: place.store.workers.alive()[0].job == job.id)
        assert place.store.get(job.id).worker == row.id
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
    queued = place.store.get(job.id)
    assert (queued.state, queued.losses) == ("queued", 0)
    assert "saved" in place.log(job)
    assert place.store.workers.alive() == []
    (place.store.folder(job.id) / "n").write_text("99990")
    place.work()
    assert place.store.get(job.id).results == {"count": 100_000}
    assert "counting from 99990" in place.log(job)


@ONLY_LINUX
def test_a_killed_worker_is_noticed_within_ten_seconds(place: Place) -> None:
    with place.worker() as one, place.worker() as other:
        job = place.create("count", until=500)
        eventually(lambda: "counting from 0" in place.log(job))
        time.sleep(0.3)  # it counts a little
        before = place.store.get(job.id)
        killed = _working(place, job, one, other)
        killed.kill()
        killed.wait()
        assert eventually(lambda: place.store.get(job.id).token > before.token) < NOTICED_S
        eventually(lambda: place.store.get(job.id).state == "succeeded", 60)
    job = place.store.get(job.id)
    assert (job.results, job.attempt) == ({"count": 500}, 2)
    assert job.worker != before.worker
    assert not (place.store.folder(job.id) / "overlap").exists()
    (saved,) = [line for line in place.log(job).splitlines() if line.startswith("counting from")][1:]
    assert int(saved.split()[-1]) > 0


def _working(place: Place, job: Job, *processes: "subprocess.Popen[str]") -> "subprocess.Popen[str]":
    """Return the process of the worker that runs a job."""
    worker = place.store.get(job.id).worker
    (pid,) = [row.pid for row in place.store.workers.alive() if row.id == worker]
    return next(process for process in processes if process.pid == pid)


def test_a_suspended_worker_is_fenced_off(place: Place) -> None:
    with place.worker() as one, place.worker() as other:
        job = place.create("count", until=100_000)
        eventually(lambda: "counting from 0" in place.log(job))
        old = place.store.get(job.id)
        suspended = _working(place, job, one, other)
        suspended.send_signal(signal.SIGSTOP)
        assert eventually(lambda: place.store.get(job.id).token > old.token) < NOTICED_S
        eventually(lambda: place.log(job).count("counting from") == 2)
        taken = place.store.get(job.id)
        suspended.send_signal(signal.SIGCONT)
        time.sleep(3)  # the first worker notices that it has lost the job
        now = place.store.get(job.id)
        assert (now.state, now.token, now.worker) == ("running", taken.token, taken.worker)
        assert place.log(job).count("counting from") == 2
        folder = place.store.folder(job.id)
        assert len(holders(folder / "lock")) == 1
        assert not (folder / "overlap").exists()
        assert suspended.poll() is None


def test_a_job_whose_child_is_killed_is_started_again(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    job = store.create(NewJob("child", {"code": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"}))
    times = Times(retry_s=0)
    with Worker(store, Settings(data_dir=tmp_path), kinds=KINDS, times=times) as worker:
        worker.run_next()
        again = store.get(job.id)
        assert (again.state, again.losses) == ("queued", 1)
        while worker.run_next():
            pass
    assert store.get(job.id).error == "its process was killed 11 times in a row without progress"


def test_a_worker_that_cannot_reach_the_store_gives_the_job_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.errors import StorageFailed

    store = JobStore(tmp_path)
    job = store.create(NewJob("sleep", {}))

    def broken(*arguments: Any) -> Job:
        raise StorageFailed("the disk is gone")

    monkeypatch.setattr(store, "renew", broken)
    with Worker(store, Settings(data_dir=tmp_path), kinds=KINDS, times=Times(lease_s=0.3, renew_s=0.1)) as worker:
        assert worker.run_next()
    assert store.get(job.id).state == "running"  # another worker may claim it now
    assert store.claim("other", ["sleep"], 8) is not None


def test_an_ordinary_rq_worker_can_call_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_DATA_DIR", str(tmp_path))
    store = JobStore(tmp_path)
    job = store.create(NewJob("export", {"source": "no-such-model"}))
    run_job(job.id)
    assert "is neither a published model" in (store.get(job.id).error or "")
    run_job("train-0000000000")


def test_redis_may_be_down_when_a_job_is_created(tmp_path: Path, redis_server: RedisServer) -> None:
    pytest.importorskip("rq", reason="needs RQ (the extra rq)")
    place = Place(tmp_path, JobStore(tmp_path), make_queue(redis_server.url), redis_server.url)
    with place.worker():
        redis_server.kill()
        job = place.create("steps")
        assert place.store.get(job.id).state == "queued"
        redis_server.start()
        eventually(lambda: place.store.get(job.id).state == "succeeded", 60)


def test_messages_contain_only_ids_as_json(tmp_path: Path, redis_server: RedisServer) -> None:
    pytest.importorskip("rq", reason="needs RQ (the extra rq)")
    place = Place(tmp_path, JobStore(tmp_path), make_queue(redis_server.url), redis_server.url)
    job = place.create("child", code="secret")
    stored = redis_server.client().hgetall(f"rq:job:{job.id}-0")
    assert isinstance(stored, dict)
    assert zlib.decompress(stored[b"data"]) == f'["service.jobs.worker.run_job", null, ["{job.id}"], {{}}]'.encode()
    assert stored[b"timeout"] == b"-1"
    assert b"secret" not in b"".join(stored.values())


def test_the_setting_chooses_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_queue(Settings(data_dir=tmp_path)), LocalQueue)
    monkeypatch.setitem(sys.modules, "rq", None)
    with pytest.raises(ModuleNotFoundError, match=r"jobs_redis_url needs RQ: .*dinov2-service\[rq\]"):
        open_queue(Settings(data_dir=tmp_path, jobs_redis_url="redis://localhost/0"))


def test_parameters_are_checked(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    with pytest.raises(InvalidRequest, match="unknown kind 'dance': use one of steps, count"):
        checked_params("dance", {}, settings, KINDS)
    with pytest.raises(InvalidRequest, match="until"):
        checked_params("count", {"until": "many"}, settings, KINDS)
    with pytest.raises(InvalidRequest, match="is unknown here"):
        checked_params("count", {"untill": 3}, settings, KINDS)


@ONLY_LINUX
def test_the_local_worker_ends_with_the_service(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from service.jobs.local import start_local_worker; "
        "from service.settings import Settings; "
        "worker = start_local_worker(Settings(data_dir=Path(sys.argv[1]))); print(worker.pid, flush=True); "
        "time.sleep(60)"
    )
    store = JobStore(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as service:
        assert service.stdout is not None
        pid = int(service.stdout.readline())
        eventually(store.workers.alive)
        assert store.workers.alive()[0].pid == pid
        service.kill()
    eventually(lambda: not _runs(pid))
    eventually(lambda: not store.workers.alive())


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()


def test_the_local_worker_is_started_again_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.jobs import local

    monkeypatch.setattr(local, "RESTART_S", 0.1)
    store = JobStore(tmp_path)
    assert local.start_local_worker(Settings(data_dir=tmp_path, local_worker=False)) is None
    worker = local.start_local_worker(Settings(data_dir=tmp_path))
    assert worker is not None
    first = worker.pid
    assert first is not None
    eventually(store.workers.alive)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: worker.pid not in (None, first))
    second = worker.pid
    eventually(lambda: second in [row.pid for row in store.workers.alive()])
    stopped = threading.Thread(target=local.stop_local_worker, args=(worker,))
    stopped.start()
    stopped.join(20)
    assert worker.pid is None
    assert second not in [row.pid for row in store.workers.alive()]

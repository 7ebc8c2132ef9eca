"""Tests of the job store: a state machine against a dictionary, and what single calls promise."""

import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from model.files import lock_file
from service.errors import Conflict, JobNotFound, ServiceError
from service.jobs.job_log import JobLog
from service.jobs.leases import MAX_LOSSES
from service.jobs.process import LOCK
from service.jobs.records import FINISHED, Job, Lease, LeaseLost, NewJob
from service.jobs.store import JobStore
from service.times import iso_time

ROOT = Path(__file__).parents[3]
LEASE_S = 8.0


@dataclass
class Clock:
    time: float = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> JobStore:
    return JobStore(tmp_path, now=clock)


def claimed(store: JobStore, worker: str = "a", kind: str = "train") -> Job:
    """Create a job and claim it."""
    store.create(NewJob(kind))
    job = store.claim(worker, [kind], LEASE_S)
    assert job is not None
    return job


@dataclass
class Expected:
    """A job in the dictionary that the state machine compares with."""

    kind: str
    state: str = "queued"
    token: int = 0
    losses: int = 0
    best: float = 0.0
    not_before: float = 0.0
    lease_until: float = 0.0
    cancel: bool = False
    steps: dict[str, Any] = field(default_factory=dict)
    waiting_for: str | None = None
    log: bytes = b""


class Machine(RuleBasedStateMachine):
    """Clients and two workers that lose their leases at random, with a clock that jumps."""

    jobs = Bundle("jobs")
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.folder = tempfile.TemporaryDirectory()
        self.store = JobStore(Path(self.folder.name), now=self.clock)
        self.expected: dict[str, Expected] = {}
        self.last_event = 0

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    @rule(target=jobs, kind=st.sampled_from(["train", "export"]), delay=st.sampled_from([0, 5]))
    def create(self, kind: str, delay: int) -> str:
        job = self.store.create(NewJob(kind, {"a": 1}, not_before=self.clock.time + delay))
        self.expected[job.id] = Expected(kind, not_before=self.clock.time + delay)
        return job.id

    @rule(seconds=st.sampled_from([1, 5, 9]))
    def time_passes(self, seconds: int) -> None:
        self.clock.time += seconds

    @rule(target=leases, kinds=st.sampled_from([["train"], ["train", "export"]]), worker=st.sampled_from("ab"))
    def claim(self, kinds: list[str], worker: str) -> Lease:
        job = self.store.claim(worker, kinds, LEASE_S)
        now, found = self.clock.time, None
        for job_id, one in self.expected.items():  # in the order of creation
            lost = one.state == "running" and one.lease_until <= now
            if one.kind not in kinds or not (lost or (one.state == "queued" and one.not_before <= now)):
                continue
            one.losses += lost
            if one.losses > MAX_LOSSES:
                one.state = "failed"
                continue
            one.state, one.token, one.lease_until, found = "running", one.token + 1, now + LEASE_S, job_id
            break
        assert (job and job.id) == found
        if job is None:
            return Lease("none", 1)
        assert (job.token, job.worker) == (self.expected[job.id].token, worker)
        return job.lease

    def held(self, lease: Lease) -> Expected | None:
        """Return the job if the lease is valid."""
        one = self.expected.get(lease.job)
        return one if one and one.state == "running" and one.token == lease.token else None

    def leased(self, lease: Lease, call: Any, *arguments: Any, **values: Any) -> Expected | None:
        """Make a worker's call. Check that it is refused exactly if the lease is not valid."""
        one = self.held(lease)
        if one is None:
            with pytest.raises(LeaseLost):
                call(lease, *arguments, **values)
        else:
            call(lease, *arguments, **values)
        return one

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        if one := self.leased(lease, self.store.renew, LEASE_S):
            one.lease_until = self.clock.time + LEASE_S

    @rule(lease=leases, progress=st.sampled_from([0.0, 0.2, 0.5]))
    def report(self, lease: Lease, progress: float) -> None:
        if one := self.leased(lease, self.store.report, progress, "text"):
            one.losses = 0 if progress > one.best else one.losses
            one.best = max(one.best, progress)

    @rule(lease=leases, text=st.sampled_from([b"a\n", b"longer\n"]))
    def log(self, lease: Lease, text: bytes) -> None:
        if one := self.leased(lease, self.store.log, text):
            one.log += text

    @rule(lease=leases, name=st.sampled_from("xyz"), result=st.integers(0, 3))
    def finish_step(self, lease: Lease, name: str, result: int) -> None:
        if one := self.leased(lease, self.store.finish_step, name, result):
            one.steps[name] = result
            one.losses = 0

    @rule(lease=leases, end=st.sampled_from(["succeed", "fail", "cancel"]))
    def end(self, lease: Lease, end: str) -> None:
        states = {"succeed": "succeeded", "fail": "failed", "cancel": "cancelled"}
        if one := self.leased(lease, getattr(self.store, end), *(["broken"] if end == "fail" else [])):
            one.state = states[end]

    @rule(lease=leases, delay=st.sampled_from([0, 5]), lost=st.booleans())
    def requeue(self, lease: Lease, delay: int, lost: bool) -> None:
        if one := self.leased(lease, self.store.requeue, delay_s=delay, lost=lost):
            one.losses += lost
            one.state = "queued" if one.losses <= MAX_LOSSES else "failed"
            one.not_before = self.clock.time + delay

    @rule(lease=leases)
    def wait(self, lease: Lease) -> None:
        if one := self.leased(lease, self.store.wait_for_approval, "approval"):
            one.state, one.waiting_for = "waiting", "approval"

    def asked(self, job: str, allowed: frozenset[str] | set[str], call: Any) -> Expected | None:
        """Make a client's call. Check that it is refused exactly if the job's state does not allow it."""
        one = self.expected.get(job)
        if one is None or one.state not in allowed:
            with pytest.raises(JobNotFound if one is None else Conflict):
                call(job)
            return None
        call(job)
        return one

    @rule(job=jobs)
    def approve(self, job: str) -> None:
        if one := self.asked(job, {"waiting"}, lambda job: self.store.approve(job, "Ada")):
            one.state, one.waiting_for, one.not_before = "queued", None, self.clock.time
            one.steps["approval"] = {"approved_by": "Ada", "approved_at": iso_time(self.clock.time)}
            one.losses = 0

    @rule(job=jobs)
    def request_cancel(self, job: str) -> None:
        if one := self.asked(job, {"queued", "waiting", "running"}, self.store.request_cancel):
            one.cancel = True
            if one.state != "running":
                one.state, one.waiting_for = "cancelled", None

    @rule(job=jobs)
    def retry(self, job: str) -> None:
        if one := self.asked(job, {"failed", "cancelled"}, self.store.retry):
            one.state, one.not_before, one.losses, one.cancel = "queued", self.clock.time, 0, False

    @rule(job=jobs)
    def remove(self, job: str) -> None:
        if self.asked(job, FINISHED, self.store.remove):
            del self.expected[job]

    @invariant()
    def agrees(self) -> None:
        assert [job.id for job in self.store.jobs()] == list(self.expected)[::-1]
        for job in self.store.jobs():
            one = self.expected[job.id]
            assert (job.state, job.token, job.losses) == (one.state, one.token, one.losses)
            assert (job.results, job.cancel_requested, job.waiting_for) == (one.steps, one.cancel, one.waiting_for)
            assert self.store.read_log(job.id, 0) == (one.log, len(one.log))
            assert job.state != "running" or job.lease_until == one.lease_until

    @invariant()
    def last_states_are_events(self) -> None:
        events = self.store.events(limit=10_000)
        numbers = [event.number for event in events]
        assert numbers == sorted(set(numbers))
        assert self.store.last_event() >= self.last_event
        self.last_event = self.store.last_event()
        states = {event.job: event.data["state"] for event in events if event.kind == "state"}
        assert states == {job: one.state for job, one in self.expected.items()}


def test_the_store_agrees_with_a_dictionary() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=20,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )


def test_an_idempotency_key_returns_the_first_job(store: JobStore) -> None:
    first = store.create(NewJob("train", {"data": ["a"]}, requested_by="Ada", key="k"))
    assert store.create(NewJob("train", {"data": ["a"]}, requested_by="Ada", key="k")) == first
    assert store.create(NewJob("train", {"data": ["a"]}, requested_by="Bob", key="k")).id != first.id
    with pytest.raises(Conflict, match="idempotency key 'k' belongs to job"):
        store.create(NewJob("train", {"data": ["b"]}, requested_by="Ada", key="k"))


def test_the_oldest_finished_jobs_are_removed_but_not_their_results(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(tmp_path, kept=2, now=clock)
    ended = []
    for number in range(4):
        job = claimed(store)
        store.log(job.lease, b"text\n")
        if number == 0:
            (store.folder(job.id) / "checkpoint").write_bytes(b"weights")
        store.succeed(job.lease)
        ended.append(job.id)
    store.create(NewJob("train"))
    assert [job.id for job in store.jobs(states=["succeeded"])] == [ended[3], ended[2]]
    assert [path.name for path in store.folder(ended[0]).iterdir()] == ["checkpoint"]
    assert not store.folder(ended[1]).exists()
    assert {event.job for event in store.events() if event.kind == "removed"} == set(ended[:2])


def test_a_job_whose_process_still_runs_is_not_removed(store: JobStore) -> None:
    job = claimed(store)
    store.log(job.lease, b"text\n")
    store.fail(job.lease, "broken")
    lock = lock_file(store.folder(job.id) / LOCK)
    assert lock is not None
    with lock, pytest.raises(Conflict, match="still runs"):
        store.remove(job.id)
    store.remove(job.id)
    assert not store.folder(job.id).exists()


def test_a_job_that_kills_its_workers_fails(store: JobStore, clock: Clock) -> None:
    job = claimed(store)
    for _ in range(MAX_LOSSES):
        clock.time += LEASE_S
        assert store.claim("b", ["train"], LEASE_S)
    clock.time += LEASE_S
    assert store.claim("b", ["train"], LEASE_S) is None
    assert store.get(job.id).error == f"its worker was killed {MAX_LOSSES + 1} times in a row without progress"


def test_only_the_newest_progress_is_an_event(store: JobStore) -> None:
    job = claimed(store)
    for progress in (0.1, 0.2, 0.3):
        store.report(job.lease, progress, "some text", {"loss": progress})
    last = store.last_event()
    (event,) = [event for event in store.events(job=job.id) if event.kind == "progress"]
    assert event.number == last
    assert event.data == {"progress": 0.3, "text": "some text", "metrics": {"loss": 0.3}}
    store.report(job.lease, 0.3, "some text", {"loss": 0.3})  # no news, so no event
    assert store.last_event() == last
    store.report(job.lease, 0.4)
    assert store.get(job.id).metrics == {"loss": 0.3}


def test_jobs_are_listed_in_pages(store: JobStore) -> None:
    made = [store.create(NewJob(kind)).id for kind in ("train", "export", "train", "train")]
    first = store.jobs(kinds=["train"], limit=2)
    assert [job.id for job in first] == [made[3], made[2]]
    assert [job.id for job in store.jobs(kinds=["train"], before=first[-1].id)] == [made[0]]
    assert store.counts()["queued"] == 4
    with pytest.raises(JobNotFound, match="there is no job 'none'"):
        store.jobs(before="none")


def test_a_change_by_another_connection_changes_the_stamp(store: JobStore, tmp_path: Path) -> None:
    before = store.stamp.read()
    JobStore(tmp_path).create(NewJob("train"))
    assert store.stamp.read() != before


def test_a_refused_call_changes_nothing(store: JobStore) -> None:
    job = claimed(store)
    store.succeed(job.lease)
    before = store.last_event()
    for call in (store.request_cancel, store.approve, store.retry):
        with pytest.raises(ServiceError):
            call(job.id)
    assert store.last_event() == before


def test_a_log_keeps_its_end_and_its_positions(tmp_path: Path) -> None:
    log, total, text = JobLog(tmp_path, limit=100), 0, b""
    for number in range(40):
        line = b"line %d\n" % number
        log.append(line, total)
        total += len(line)
        text += line
    assert (tmp_path / "log.txt").stat().st_size <= 100
    end, position = log.read(total, None, 20)
    assert (end, position) == (text[-20:], total)
    assert log.read(total, total - 30, 1000) == (text[-30:], total)
    assert log.read(total, total - 30, 10) == (text[-30:-20], total - 20)
    assert log.read(total, total, 10) == (b"", total)
    start, position = log.read(total, 0, 1000)
    assert text.endswith(start)
    assert start.startswith(b"line ")
    assert position == total


def test_bytes_of_a_log_that_were_not_stored_are_removed(tmp_path: Path) -> None:
    log = JobLog(tmp_path)
    log.append(b"stored\n", 0)
    log.append(b"the process was killed before it stored this\n", 7)
    log.append(b"next\n", 7)
    assert log.read(12, 0, 100) == (b"stored\nnext\n", 12)


CLAIMS = """
import sys
import time
from pathlib import Path
from service.jobs.store import JobStore
store = JobStore(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
while (job := store.claim(sys.argv[2], ["train"], 60)) is not None:
    print(job.id, job.token)
    time.sleep(0.01)  # so that the other process gets a turn
"""


def test_two_processes_never_claim_the_same_job(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    made = {store.create(NewJob("train")).id for _ in range(40)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMS, tmp_path, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for name in "ab"
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    lines = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert all(lines), "one process claimed everything"
    claims = [line.split()[0] for each in lines for line in each]
    assert len(claims) == 40
    assert set(claims) == made
    assert {line.split()[1] for each in lines for line in each} == {"1"}

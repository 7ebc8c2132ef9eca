"""How workers learn that a job is queued: they look into the store, or RQ on a Redis server tells them.

A queue carries only the ids of jobs. The store says what is to be done and whether a worker may do it, so a message
that is lost, repeated or late does no harm. With RQ, each worker looks into the store once per second for jobs whose
message was lost and for leases that have expired, and announces them again.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Protocol

import redis

from service.addresses import masked_url
from service.errors import ServiceError
from service.jobs.records import Job
from service.jobs.store import JobStore
from service.jobs.worker import CURRENT, Worker, stopped_by_signals
from service.settings import Settings

if TYPE_CHECKING:
    from rq import Queue, SimpleWorker

log = logging.getLogger(__name__)

POLL_S: Final = 0.5
LOOK_S: Final = 1.0
"""How often a worker looks for leases that have expired and for schedules that are due, in seconds. Nothing announces
these."""
ANNOUNCED_S: Final = 3.0
"""The time in seconds that a message has to arrive before the job is announced again."""
PREFIX: Final = "dinov2-jobs-"
RESULT_S: Final = 60
WEEK_S: Final = 7 * 24 * 3600


class JobQueue(Protocol):
    """How workers learn about queued jobs."""

    def announce(self, job: Job) -> None:
        """Tell the workers that a job is queued. An error is only logged, because the job is stored and will be
        noticed."""

    def work(self, worker: Worker, *, once: bool = False) -> None:
        """Run jobs until the worker is asked to stop. If `once` is True, end as soon as no job is due.

        Call this in the main thread. It handles SIGTERM and SIGINT.
        """


class LocalQueue:
    """Workers look into the store. The stamp tells them cheaply whether something has changed."""

    def announce(self, job: Job) -> None:
        """Do nothing: the store has changed its stamp."""

    def work(self, worker: Worker, *, once: bool = False) -> None:
        """Run jobs. See `JobQueue.work`."""
        store, seen, looked_at = worker.store, None, 0.0
        with stopped_by_signals(worker.stop):
            while not worker.stop.requested:
                stamp, now = store.stamp.read(), time.monotonic()
                if stamp != seen or now - looked_at >= LOOK_S:
                    seen, looked_at = stamp, now
                    if _run_due(worker):
                        seen = None
                        continue
                    if once:
                        return
                time.sleep(POLL_S)


def _run_due(worker: Worker) -> bool:
    """Create jobs that are scheduled, run one job that is due, and return whether there was one."""
    try:
        worker.store.schedules.create_due()
        return worker.run_next()
    except (ServiceError, ValueError) as error:  # ValueError: the time zone of a schedule is no longer known
        log.error("%s", error)
        return False


class RqQueue:
    """RQ on a Redis server tells the workers. The jobs of each kind have their own queue."""

    def __init__(self, url: str, function: str = "service.jobs.worker.run_job") -> None:
        """Use the Redis server at `url`. `function` is the path of the function that workers call with a job's id.

        Raises:
            ModuleNotFoundError: RQ is not installed.
        """
        import rq  # noqa: F401 - missing in an installation without the extra `rq`

        self._url = url
        self._function = function
        self._redis = redis.Redis.from_url(url, socket_connect_timeout=5, health_check_interval=30)

    def announce(self, job: Job) -> None:
        """Send a message. See `JobQueue.announce`."""
        try:
            self._queue(job.kind).enqueue_call(
                self._function,
                args=(job.id,),
                job_id=f"{job.id}-{job.token}",
                timeout=-1,
                result_ttl=RESULT_S,
                failure_ttl=RESULT_S,
            )
        except redis.RedisError as error:
            log.warning("job %s is not announced on %s: %s", job.id, masked_url(self._url), error)

    def work(self, worker: Worker, *, once: bool = False) -> None:
        """Run jobs. See `JobQueue.work`."""
        token = CURRENT.set(worker)
        try:
            with stopped_by_signals(worker.stop), self._repaired(worker):
                while not worker.stop.requested:
                    self._repair(worker, since_s=0.0 if once else ANNOUNCED_S)
                    try:
                        self._rq_worker(worker).work(burst=once, logging_level="WARNING")
                    except redis.RedisError as error:
                        log.warning("%s does not answer: %s", masked_url(self._url), error)
                    if once:
                        return
                    if not worker.stop.requested:  # Redis was gone
                        time.sleep(LOOK_S)
        finally:
            CURRENT.reset(token)

    def _queue(self, kind: str) -> "Queue":
        from rq import Queue
        from rq.serializers import JSONSerializer

        return Queue(f"{PREFIX}{kind}", connection=self._redis, serializer=JSONSerializer)

    def _rq_worker(self, worker: Worker) -> "SimpleWorker":
        return _make_rq_worker(worker, [self._queue(kind) for kind in worker.kinds], self._redis)

    @contextmanager
    def _repaired(self, worker: Worker) -> Iterator[None]:
        """Look for jobs that nobody has announced, in a thread, while the `with` block runs."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(LOOK_S):
                self._repair(worker, ANNOUNCED_S)

        thread = threading.Thread(target=look, name="announcing", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _repair(self, worker: Worker, since_s: float) -> None:
        """Announce the jobs of schedules, and jobs that have been due for `since_s` seconds but have no message."""
        try:
            created = {job.id for job in worker.store.schedules.create_due()}
            for job in worker.store.due(worker.kinds, since_s):
                if f"{job.id}-{job.token}" not in self._queue(job.kind).get_job_ids():
                    self.announce(job)
                created.discard(job.id)
        except (ServiceError, ValueError, redis.RedisError) as error:
            log.warning("queued jobs are not announced: %s", error)
            return
        for job_id in created:
            self.announce(worker.store.get(job_id))


def _make_rq_worker(worker: Worker, queues: "list[Queue]", connection: redis.Redis) -> "SimpleWorker":
    """Return an RQ worker that runs jobs in this process, where `worker` renews the lease. (The child processes of jobs
    are our own. docs/decisions/0039-jobs.md says why RQ does not start them.)"""
    from rq import SimpleWorker
    from rq.serializers import JSONSerializer

    class RqWorker(SimpleWorker):
        def request_stop(self, signum: Any, frame: FrameType | None) -> None:
            worker.stop.requested = True  # the running job is stopped and put back into the queue
            super().request_stop(signum, frame)  # type: ignore[no-untyped-call]

        def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
            """Ignore a second signal. The job's child has a time limit to end."""

        def get_heartbeat_ttl(self, *arguments: Any, **named: Any) -> int:
            """Return a time after which RQ gives up a worker. Our leases decide this much earlier."""
            return WEEK_S

    name = f"{worker.row.id}-{os.urandom(3).hex()}"  # RQ refuses a name that a lost connection has left
    return RqWorker(queues, name=name, connection=connection, serializer=JSONSerializer)


def open_queue(settings: Settings) -> JobQueue:
    """Return the queue of the settings: RQ if `jobs_redis_url` is set, else the store alone.

    Raises:
        ModuleNotFoundError: RQ is needed but not installed.
    """
    if settings.jobs_redis_url is None:
        return LocalQueue()
    try:
        return RqQueue(settings.jobs_redis_url)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "jobs_redis_url needs RQ: python -m pip install 'dinov2-service[rq]'", name="rq"
        ) from error


def open_jobs(settings: Settings) -> JobStore:
    """Open the job store of the settings.

    Raises:
        StorageFailed: the store cannot be used.
    """
    return JobStore(settings.data_dir, kept=settings.jobs_kept)

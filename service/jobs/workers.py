"""The worker processes that use a job store, with their heartbeats."""

import json
from typing import Final

from service.jobs.job_file import JobFile, worker_of
from service.jobs.records import WorkerRow

GONE_S: Final = 10.0
"""A worker that has been silent for this time is considered dead. It beats every 2 seconds."""
FORGOTTEN_S: Final = 3600.0


class Workers:
    """The workers in a job store."""

    def __init__(self, file: JobFile) -> None:
        self._file = file

    def beat(self, worker: WorkerRow) -> None:
        """Store a worker with the current time as its heartbeat. Forget workers that died long ago."""
        now = self._file.now()
        with self._file.write(quietly=True) as db:
            db.execute(
                "INSERT OR REPLACE INTO workers (id, host, pid, kinds, started, heartbeat, job) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *(worker.id, worker.host, worker.pid, json.dumps(worker.kinds)),
                    *(worker.started, now, worker.job),
                ),
            )
            db.execute("DELETE FROM workers WHERE heartbeat < ?", (now - FORGOTTEN_S,))

    def leave(self, worker_id: str) -> None:
        """Remove a worker that ends."""
        with self._file.write(quietly=True) as db:
            db.execute("DELETE FROM workers WHERE id = ?", (worker_id,))

    def alive(self) -> list[WorkerRow]:
        """Return the workers with a recent heartbeat, oldest first."""
        with self._file.read() as db:
            rows = db.execute(
                "SELECT * FROM workers WHERE heartbeat >= ? ORDER BY started, id", (self._file.now() - GONE_S,)
            )
            return [worker_of(row) for row in rows]

    def known(self) -> list[WorkerRow]:
        """Return all workers that have not left, oldest first. Some of them may have died."""
        with self._file.read() as db:
            rows = db.execute(
                "SELECT * FROM workers WHERE heartbeat >= ? ORDER BY started, id", (self._file.now() - FORGOTTEN_S,)
            )
            return [worker_of(row) for row in rows]

"""The command `dinov2 worker`, which runs jobs."""

import os
from typing import Annotated

import typer

from cli.shared import DATA, DataDirOption, fail, settings_for


def worker(
    kinds: Annotated[
        str | None,
        typer.Option(help="Kinds of jobs to run, e.g. train,export. Default: those whose packages are installed."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Run the jobs that are due, then end.")] = False,
    data_dir: DataDirOption = DATA,
) -> None:
    """Run jobs of the service, one after the other. SIGTERM stops the running job so that it saves its state, and puts
    it back into the queue. Several workers may run at the same time."""
    from service.errors import ServiceError
    from service.jobs.kinds import KINDS
    from service.jobs.queue import open_jobs, open_queue
    from service.jobs.worker import Worker
    from service.telemetry import configure_logging

    try:
        settings = settings_for(None, data_dir)
        only = None if kinds is None else [kind.strip() for kind in kinds.split(",") if kind.strip()]
        for kind in only or ():
            if kind not in KINDS:
                raise ValueError(f"--kinds: unknown kind {kind!r}; use some of {', '.join(KINDS)}")
        os.environ["DINOV2_DATA_DIR"] = str(settings.data_dir.absolute())  # for the processes of jobs
        configure_logging(settings.log_level)
        queue = open_queue(settings)
        with Worker(open_jobs(settings), settings, only=only) as running:
            queue.work(running, once=once)
    except (ServiceError, ValueError, OSError, ImportError) as error:
        raise fail(error) from error

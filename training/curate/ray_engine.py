"""Scan on several machines, with Ray Data. The tasks of a Ray cluster do the same as local processes.

Each part of a scan is one row. Its result, a Parquet file of a few hundred kilobytes, comes back to this process, which
stores it. The sources and the model must therefore have the same paths or URLs on every machine, but the dataset's
folder is needed here only. If a machine is lost, Ray repeats its unfinished parts on the others.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from training.curate.workers import Work

ATTEMPTS: Final = 4
"""How often a part is begun whose process was killed or whose machine was lost each time. Ray Data has no limit."""

_work: tuple[bytes, Work[Any, Any]] | None = None  # of this process of a Ray cluster, and what has made it


class RayWorkers:
    """The processes of a Ray cluster, one per CPU.

    Ray connects to the cluster that `ray start` or the variable RAY_ADDRESS has set up. Without one, it starts a
    cluster on this machine. Ray sends no usage statistics, unless RAY_USAGE_STATS_ENABLED=1.

    Raises:
        ModuleNotFoundError: Ray is not installed. The message says how to install it.
    """

    def __init__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray.data
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "--engine ray needs Ray: python -m pip install -e '.[ray]' (the extra `ray` of dinov2-service)",
                name="ray",
            ) from error
        self._ray = ray

    def __call__(self, make: Callable[[], Work[Any, Any]], items: Sequence[Any]) -> Iterator[Any]:
        """See `training.curate.workers.RunAll`. An item whose process is killed is begun up to `ATTEMPTS` times."""
        if not items:
            return
        ray = self._ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        rows = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items))
        # Tasks, not actors: if a machine is lost, an actor that cannot be placed elsewhere blocks the run for ever.
        done = rows.map_batches(
            _do,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.TaskPoolStrategy(),
            num_cpus=1,
            fn_args=(pickle.dumps(make),),
            udf_modifying_row_count=False,
        )
        for row in done.iter_rows():
            result, error = pickle.loads(row["result"])  # noqa: S301 - our own tasks have made it
            if error is not None:
                raise error
            yield result


def _do(batch: dict[str, Any], make: bytes) -> dict[str, Any]:
    """Work on items in a process of a Ray cluster. `make` is the pickled function that makes the worker object."""
    return {"result": [_done(item, make) for item in batch["item"]]}


def _done(item: bytes, make: bytes) -> bytes:
    """Return the pickled result and error of an item. Errors become results, because Ray would repeat or wrap them."""
    global _work
    try:
        if _earlier_attempts() >= ATTEMPTS:
            raise OSError(
                f"a part was not finished in {ATTEMPTS} attempts on the Ray cluster: each time, its process was killed "
                "or its machine was lost, perhaps because the memory was used up"
            )
        if _work is None or _work[0] != make:  # Ray uses a process for many tasks
            _work = make, pickle.loads(make)()  # noqa: S301 - our own driver has made it
        return pickle.dumps((_work[1](pickle.loads(item)), None))  # noqa: S301 - our own driver has made it
    except (ValueError, OSError) as error:
        return pickle.dumps((None, error))


def _earlier_attempts() -> int:
    """Return how often Ray has begun the task of this process before.

    The function is not part of Ray's public interface. If a version of Ray has none, the result is 0.
    """
    import ray

    worker = ray.get_runtime_context().worker.core_worker
    return worker.get_current_task_attempt_number() if hasattr(worker, "get_current_task_attempt_number") else 0

"""Scan on several machines, with Ray Data. The workers are actors of a Ray cluster and do the same as local processes.

Each part of a scan is one row. Its result, a Parquet file of a few hundred kilobytes, comes back to this process, which
stores it. The sources and the model must therefore have the same paths or URLs on every machine, but the dataset's
folder is needed here only. If a machine is lost, Ray repeats its unfinished parts on the others.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from training.curate.workers import Work


class RayWorkers:
    """Actors of a Ray cluster, one per CPU, except for one CPU that is left to Ray.

    Ray connects to the cluster that `ray start` or the variable RAY_ADDRESS has set up. Without one, it starts a
    cluster on this machine.

    Raises:
        ModuleNotFoundError: Ray is not installed. The message says how to install it.
    """

    def __init__(self) -> None:
        try:
            import ray.data
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "--engine ray needs Ray: python -m pip install -e '.[ray]' (the extra `ray` of dinov2-service)",
                name="ray",
            ) from error
        self._ray = ray

    def __call__(self, make: Callable[[], Work[Any, Any]], items: Sequence[Any]) -> Iterator[Any]:
        """See `training.curate.workers.RunAll`."""
        if not items:
            return
        ray = self._ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        rows = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items))
        # If actors held all CPUs, other tasks of Ray Data could not start (ray#44687).
        cpus = int(ray.cluster_resources().get("CPU", 1))
        actors = max(1, min(len(items), cpus - 1))
        done = rows.map_batches(
            _Actor,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
            num_cpus=1 if cpus > 1 else 0.5,
            fn_constructor_args=(make,),
            udf_modifying_row_count=False,
        )
        for row in done.iter_rows():
            result, error = pickle.loads(row["result"])  # noqa: S301 - our own actors have made it
            if error is not None:
                raise error
            yield result


class _Actor:
    """A worker on one of the machines. Errors become results, because Ray would repeat or wrap them."""

    def __init__(self, make: Callable[[], Work[Any, Any]]) -> None:
        self._work = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"result": [self._done(item) for item in batch["item"]]}

    def _done(self, item: bytes) -> bytes:
        try:
            return pickle.dumps((self._work(pickle.loads(item)), None))  # noqa: S301 - our own driver has made it
        except (ValueError, OSError) as error:
            return pickle.dumps((None, error))

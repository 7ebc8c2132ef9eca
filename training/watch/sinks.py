"""Send the metrics of a training run to TensorBoard, Weights & Biases and MLflow.

A sink is a receiver of metrics. For each log line, it gets the step and a dictionary of metrics. If a sink fails,
`training/watch/monitor.py` reports the failure once and continues without the sink. TensorBoard is used whenever it is
installed, because it only writes into the run's folder. Weights & Biases and MLflow may send metrics to another
machine, so they are used only if a setting asks for them.
"""

import importlib
import importlib.util
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.files import write_text

WANDB_ID = "wandb_id.txt"
MLFLOW_ID = "mlflow_id.json"
MLFLOW_ENVIRONMENT = {
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Environment variables that MLflow's client reads, with the values for a training run. Values that the user has set
take precedence. By default, MLflow 3.17 refuses folders, sends usage data to its makers, and waits four minutes for a
server that does not answer."""
MLFLOW_PARAMS_AT_ONCE = 100  # MLflow's servers refuse more in one request
MLFLOW_PARAM_LENGTH = 500  # the shortest limit of MLflow's stores


@dataclass(frozen=True)
class Sink:
    """A receiver of metrics. `write(step, numbers)` receives the metrics of one log line as a dictionary, and `close()`
    closes the receiver.
    """

    name: str
    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def make_sinks(
    out: Path,
    first_step: int,
    wandb: str | None,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
    mlflow: str | None = None,
) -> list[Sink]:
    """Return the receivers of a run's metrics: TensorBoard if it is installed, Weights & Biases if a project is named,
    and MLflow if an address is given.

    Args:
        out: the run's folder.
        first_step: the number of steps already done when the run starts or resumes. TensorBoard hides data that was
            written for later steps before the run resumed.
        wandb: the name of the Weights & Biases project. If it is None, Weights & Biases is not used.
        settings: the run's configuration, which Weights & Biases and MLflow show.
        say: a function that is called with a warning if a receiver cannot be used, for instance because the network is
            down. The run continues without the unusable receiver.
        mlflow: the folder or the address of MLflow's tracking store. If it is None, MLflow is not used.

    Raises:
        ValueError: a project is named, but wandb is not installed, or `mlflow` is given, but MLflow is not installed.
    """
    makers: dict[str, Callable[[], Sink]] = {}
    # `torch.utils.tensorboard` exists without the package; `find_spec` finds the package without importing it.
    if importlib.util.find_spec("tensorboard") is not None:
        makers["tensorboard"] = lambda: tensorboard_sink(out / "tensorboard", first_step)
    if wandb is not None:
        client = _load_wandb(wandb)
        makers["wandb"] = lambda: wandb_sink(client, wandb, out, settings)
    if mlflow is not None:
        module = _load_mlflow(mlflow)
        makers["mlflow"] = lambda: mlflow_sink(module, mlflow, out, settings)
    sinks = []
    for name, make in makers.items():
        try:
            sinks.append(make())
        except Exception as error:  # noqa: BLE001 - a client library may raise anything, and the run continues
            say(f"warning: {name} cannot be used in this run ({type(error).__name__}: {error})")
    return sinks


def tensorboard_sink(folder: Path, first_step: int) -> Sink:
    """Make a sink that writes metrics to `folder`. The command `tensorboard --logdir` shows them.

    TensorBoard hides metrics for steps after `first_step` that were written before the run was resumed.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Sink("tensorboard", write, writer.close)


def _load_wandb(project: str) -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(f"wandb={project!r} needs Weights & Biases: pip install wandb") from error


def wandb_sink(client: Any, project: str, out: Path, settings: Mapping[str, Any]) -> Sink:
    """Make a sink that sends metrics to a run in a Weights & Biases project.

    The Weights & Biases run is named after the folder `out`. A resumed training run continues the same Weights & Biases
    run. `client` is the module `wandb`.
    """
    id_file = out / WANDB_ID
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    run = client.init(
        project=project, name=out.name, dir=str(out), id=id_file.read_text(), resume="allow", config=dict(settings)
    )
    return Sink("wandb", lambda step, numbers: run.log(dict(numbers), step=step), run.finish)


def _load_mlflow(address: str) -> Any:
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("mlflow")
    except ImportError as error:
        raise ValueError(f"mlflow={address!r} needs MLflow: pip install mlflow-skinny") from error


def mlflow_sink(module: Any, address: str, out: Path, settings: Mapping[str, Any]) -> Sink:
    """Make a sink that sends metrics to MLflow. A resumed training run continues the same MLflow run.

    The recipe is the name of the experiment, and the folder `out` gives the MLflow run its name. The settings become
    the parameters of a new MLflow run. At the end, the status of the MLflow run is FINISHED, or FAILED if an exception
    ended the training run.

    Args:
        module: the module `mlflow`.
        address: the tracking store: a folder, `file:FOLDER` or the address of a server.
        out: the run's folder. Its file `mlflow_id.json` contains the address and the id of the MLflow run.
        settings: the run's configuration.
    """
    client = module.MlflowClient(tracking_uri=address)
    id_file = out / MLFLOW_ID
    stored = json.loads(id_file.read_text()) if id_file.exists() else {}
    if stored.get("address") == address:
        run_id = str(stored["run_id"])
        client.update_run(run_id, status="RUNNING")
    else:
        run_id = _new_mlflow_run(module, client, out, settings)
        write_text(id_file, json.dumps({"address": address, "run_id": run_id}))

    def write(step: int, numbers: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        client.log_batch(
            run_id, metrics=[module.entities.Metric(_mlflow_name(n), v, now, step) for n, v in numbers.items()]
        )

    def close() -> None:
        client.set_terminated(run_id, status="FINISHED" if sys.exc_info()[0] is None else "FAILED")

    return Sink("mlflow", write, close)


def _new_mlflow_run(module: Any, client: Any, out: Path, settings: Mapping[str, Any]) -> str:
    """Make an MLflow run, send the settings as its parameters, and return its id."""
    name = str(settings.get("recipe", "none"))
    experiment = client.get_experiment_by_name(name)
    experiment_id = client.create_experiment(name) if experiment is None else experiment.experiment_id
    run_id = str(client.create_run(experiment_id, run_name=out.resolve().name).info.run_id)
    params = [module.entities.Param(key, str(value)[:MLFLOW_PARAM_LENGTH]) for key, value in settings.items()]
    for first in range(0, len(params), MLFLOW_PARAMS_AT_ONCE):
        client.log_batch(run_id, params=params[first : first + MLFLOW_PARAMS_AT_ONCE])
    return run_id


def _mlflow_name(name: str) -> str:
    """Return the name of a metric with an underscore for each character that MLflow does not accept, such as the plus
    sign in `knn_cls+mean_10`."""
    return re.sub(r"[^\w\-. /:]", "_", name)

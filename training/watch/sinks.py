"""Send the metrics of a training run to TensorBoard and Weights & Biases.

A sink is a receiver of metrics. For each log line, it gets the step and a dictionary of metrics. If a sink fails,
`training/watch/monitor.py` reports the failure once and continues without the sink. TensorBoard is used whenever it is
installed, because it only writes into the run's folder. Weights & Biases sends metrics to another machine, so it is
used only if a project is named.
"""

import importlib
import importlib.util
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WANDB_ID = "wandb_id.txt"


@dataclass(frozen=True)
class Sink:
    """A receiver of metrics. `write(step, numbers)` receives the metrics of one log line as a dictionary, and `close()`
    closes the receiver.
    """

    name: str
    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def make_sinks(
    out: Path, first_step: int, wandb: str | None, settings: Mapping[str, Any], say: Callable[[str], None]
) -> list[Sink]:
    """Return the receivers of a run's metrics: TensorBoard if it is installed, and Weights & Biases if a project is
    named.

    Args:
        out: the run's folder.
        first_step: the number of steps already done when the run starts or resumes. TensorBoard hides data that was
            written for later steps before the run resumed.
        wandb: the name of the Weights & Biases project. If it is None, Weights & Biases is not used.
        settings: the run's configuration, which Weights & Biases shows.
        say: a function that is called with a warning if TensorBoard or Weights & Biases cannot be used, for instance
            because the network is down. The run continues without the unusable receiver.

    Raises:
        ValueError: a project is named, but wandb is not installed.
    """
    makers: dict[str, Callable[[], Sink]] = {}
    # `torch.utils.tensorboard` exists without the package; `find_spec` finds the package without importing it.
    if importlib.util.find_spec("tensorboard") is not None:
        makers["tensorboard"] = lambda: tensorboard_sink(out / "tensorboard", first_step)
    if wandb is not None:
        client = _load_wandb(wandb)
        makers["wandb"] = lambda: wandb_sink(client, wandb, out, settings)
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

"""Where figures go besides the files of the run: TensorBoard and Weights & Biases, each when it is installed.

A sink gets a step and named numbers. It may fail; `training/watch/monitor.py` says so once and goes on without it.
TensorBoard is used whenever it is there, since it only writes beside the run; Weights & Biases sends figures to another
machine, so it is used only when a project is named.
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
    """`write(step, numbers)` takes one line's figures, `close()` ends it."""

    name: str
    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def make_sinks(
    out: Path, first_step: int, wandb: str | None, settings: Mapping[str, Any], say: Callable[[str], None]
) -> list[Sink]:
    """The sinks of a run: TensorBoard if installed, wandb if a project is named.

    Args:
        out: the run's folder.
        first_step: steps done before: later ones of an earlier attempt are hidden.
        wandb: name of the project; None: not used.
        settings: what wandb shows as the run's configuration.
        say: told why one that is installed cannot be used (no network, a broken installation); the run goes on.

    Raises:
        ValueError: a project is named, and wandb is not installed.
    """
    makers: dict[str, Callable[[], Sink]] = {}
    # `torch.utils.tensorboard` exists without it; asking for the package itself costs no import.
    if importlib.util.find_spec("tensorboard") is not None:
        makers["tensorboard"] = lambda: tensorboard_sink(out / "tensorboard", first_step)
    if wandb is not None:
        client = _load_wandb(wandb)
        makers["wandb"] = lambda: wandb_sink(client, wandb, out, settings)
    sinks = []
    for name, make in makers.items():
        try:
            sinks.append(make())
        except Exception as error:  # noqa: BLE001 - a client library may raise anything, and the run goes on
            say(f"warning: {name} cannot be used in this run ({type(error).__name__}: {error})")
    return sinks


def tensorboard_sink(folder: Path, first_step: int) -> Sink:
    """Scalars in `folder`: `tensorboard --logdir` on it or on a folder of runs."""
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
    """A run of a Weights & Biases project, named after the folder; a resumed run goes on in the same one.

    `client` is the module `wandb`.
    """
    id_file = out / WANDB_ID
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    run = client.init(
        project=project, name=out.name, dir=str(out), id=id_file.read_text(), resume="allow", config=dict(settings)
    )
    return Sink("wandb", lambda step, numbers: run.log(dict(numbers), step=step), run.finish)

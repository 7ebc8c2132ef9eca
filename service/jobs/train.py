"""Jobs of the kind `train`: run `dinov2 train` as a child process, and report what the run writes into its folder.

The run's folder is `run` in the job's folder. A run saves its state when it gets SIGTERM and every few minutes, and the
same command resumes it, so a job that is started again goes on where its run stopped. The settings of a training are
not known here. `dinov2 train --check` checks them when a job is created, and `dinov2 train` does it again.
"""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import Field, field_validator

from service.jobs.context import CODE, ChildFailed, Context, JobFailed
from service.jobs.kind import JobParams
from service.jobs.roots import data_source, model_source
from service.schema_base import ONE_OR_MORE
from service.settings import Settings

log = logging.getLogger(__name__)

RUN: Final = "run"
CHECK_S: Final = 30.0
"""The time limit for checking the settings of a training, in seconds. The check takes about 0.7 s of one core."""
REFUSED_STATUS: Final = 2
"""The exit status of `dinov2 train --check` if the training would not start."""
STOPPED_STATUS: Final = 3
"""The exit status of a run that one of its checks has stopped (docs/training.md)."""

MODELS: Final = frozenset({"init", "teacher"})
"""Settings of training that name a model."""
REFUSED: Final = {
    "data": "use the parameter data",
    "exclude": "a retraining leaves out the images of its gate by itself",
    "out": "the run is stored in the job's folder",
    "recipe": "use the parameter recipe",
    "mlflow": "a job does not send metrics to other machines",
    "wandb": "a job does not send metrics to other machines",
}
SHOWN: Final[tuple[str, ...]] = ("step", "epoch", "loss", "dino_over_ln_k", "rankme_share", "lr", "images_per_s")
"""The figures of the last line of metrics.jsonl that a job shows."""
TAIL_BYTES: Final = 65_536
STARTING: Final = "starting"
TOLD: Final = re.compile(r"^\d\d:\d\d:\d\d  (.+)\n", re.MULTILINE)
"""A line that a training prints for its user (training/data/progress.py)."""
MOST_CHARACTERS: Final = 200

Override = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*=", max_length=10_000)]


class TrainParams(JobParams):
    """What `POST /v1/jobs` accepts for a training."""

    data: Annotated[list[str], ONE_OR_MORE] = Field(
        min_length=1,
        max_length=100,
        description="folders of images, tar files or datasets, below DINOV2_JOB_ROOTS (unset: data/datasets)",
    )
    recipe: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", description="name of a recipe, such as continue or smoke"
    )
    overrides: Annotated[list[Override], ONE_OR_MORE] = Field(
        default=[], max_length=200, description="settings that override the recipe, as key=value"
    )
    hours: float | None = Field(None, gt=0, le=10_000, description="approximate time for the run in hours")

    @field_validator("overrides")
    @classmethod
    def _settings_are_allowed(cls, overrides: list[str]) -> list[str]:
        for key, _, _ in (override.partition("=") for override in overrides):
            if key in REFUSED:
                raise ValueError(f"a job cannot set {key}: {REFUSED[key]}")
        return overrides

    def resolved(self, settings: Settings) -> Self:
        """Return the parameters with absolute paths without links. See `JobParams.resolved`."""
        overrides = [with_source(override, MODELS, model_source, settings) for override in self.overrides]
        return self.model_copy(
            update={"data": [data_source(text, settings) for text in self.data], "overrides": overrides}
        )


def with_source(
    override: str, keys: Collection[str], source: Callable[[str, Settings], str], settings: Settings
) -> str:
    """Return an override of the form `key=value`. If the key is one of `keys`, replace its value with what `source`
    returns for it, as a TOML string.

    Raises:
        ValueError: the value is not allowed.
    """
    key, _, value = override.partition("=")
    if key not in keys:
        return override
    text = value.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":  # a TOML string
        text = text[1:-1]
    if re.search(r"[\"'\\\n]", text):
        raise ValueError(f"{override[:200]!r}: a path must not contain quotes or backslashes")
    return f'{key}="{source(text, settings)}"'


def check_training(params: TrainParams, settings: Settings) -> None:
    """Check the recipe and the settings of a training before its job is accepted, as the training itself does later.

    A child process does it, because the service does not import the training. It needs no torch. If the child cannot
    decide, or if the code of the training is not installed, the job is accepted, and its worker decides. `params` has
    resolved paths. `settings` is not needed here.

    Raises:
        ValueError: the recipe or a setting does not exist, or a value is not allowed. The message names it.
    """
    if find_spec("training") is None:
        return
    command = [sys.executable, "-m", "cli", *train_command(params, Path(RUN), "--check")]
    try:
        done = subprocess.run(  # noqa: S603 - the arguments are checked, and follow "--"
            command, cwd=CODE, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("the settings of a training were not checked: %s", error)
        return
    said = done.stderr.decode(errors="replace")
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if done.returncode == REFUSED_STATUS and errors:
        raise ValueError(errors[-1].removeprefix("error: "))
    if done.returncode:
        log.warning("the settings of a training were not checked: status %d: %s", done.returncode, said[-1000:])


def train_command(params: TrainParams, out: Path, *options: str) -> list[str]:
    """Return the arguments of `dinov2` that train with these parameters in the folder `out`."""
    command = ["train", *(f"--data={source}" for source in params.data), f"--recipe={params.recipe}", f"--out={out}"]
    if params.hours is not None:
        command.append(f"--hours={params.hours}")
    return [*command, *options, "--", *params.overrides]


def train(context: Context[TrainParams]) -> None:
    """Do the work of a job."""
    context.step("train", lambda: run_training(context, context.params, context.folder / RUN))


def run_training(context: Context[Any], params: TrainParams, out: Path, share: tuple[float, float] = (0.0, 1.0)) -> Any:
    """Train, or go on with a training, in the folder `out`. Return the result of the step: the path of the run relative
    to the data folder, and its figures.

    Args:
        context: the job.
        params: the parameters of the training, with resolved paths.
        out: the run's folder.
        share: the part of the job's progress that the training covers.

    Raises:
        JobFailed: the training ended with an error, or a check stopped it.
    """

    def watch() -> None:
        progress, text, figures = progress_of(out)
        if text == STARTING:
            text = phase_of(context.recent_output) or text
        context.report(share[0] + (share[1] - share[0]) * progress, text, figures)

    try:
        context.run_command(train_command(params, out), watch)
    except ChildFailed as failed:
        if failed.status == STOPPED_STATUS and (reason := _reason(out)) is not None:
            raise JobFailed(f"a check stopped the training: {reason}") from failed
        raise
    return {"run": str(out.relative_to(context.data_dir)), "figures": progress_of(out)[2]}


def progress_of(out: Path) -> tuple[float, str, dict[str, Any]]:
    """Return how far the run in a folder is: the share of its epochs that are done, a text, and its last figures."""
    line, evaluation = last_line(out / "metrics.jsonl"), last_line(out / "evaluations.jsonl")
    figures = {name: line[name] for name in SHOWN if name in line}
    figures |= {f"evaluation_{name}": value for name, value in evaluation.items() if isinstance(value, int | float)}
    epochs = read_object(out / "config.json").get("epochs")
    epoch = line.get("epoch")
    if not isinstance(epochs, int | float) or not isinstance(epoch, int | float) or epochs <= 0:
        return 0.0, STARTING, figures
    return min(epoch / epochs, 1.0), f"step {line.get('step')}, epoch {epoch:.2f} of {epochs:g}", figures


def phase_of(output: str) -> str:
    """Return what a training does before its first step, such as "decoding 2,640 images, 68 %": the last complete line
    with a time of day that it has printed. Return "" if there is none."""
    lines = TOLD.findall(output)
    return str(lines[-1])[:MOST_CHARACTERS] if lines else ""


def last_line(path: Path) -> dict[str, Any]:
    """Return the last complete line of a file of JSON objects, or an empty dictionary if there is none."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline is not complete
    return next(_objects(reversed(lines)), dict[str, Any]())


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for text in lines:
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty dictionary if there is none."""
    return next(_objects([path.read_bytes()]), dict[str, Any]()) if path.exists() else {}


def _reason(out: Path) -> str | None:
    reason = read_object(out / "stopped.json").get("reason")
    return None if reason is None else str(reason)

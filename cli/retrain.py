"""The command `dinov2 retrain`, which starts a retraining, or says what it would do."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import jobs
from cli.shared import DATA, DataDirOption, JsonOption, fail, settings_for


def retrain(
    params: jobs.ParamsArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the retraining would do and need, and change nothing.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show the log until the job has ended.")] = False,
    as_json: JsonOption = False,
    data_dir: DataDirOption = DATA,
) -> None:
    """Train the live model on your images, and make the new model live if it is better. A job does it. This command is
    short for `dinov2 jobs start retrain`."""
    if not dry_run:
        jobs.start("retrain", params, None, wait, as_json, data_dir)
        return
    from service.errors import ServiceError
    from service.jobs.context import JobFailed
    from service.jobs.kinds import accepted_params
    from service.jobs.retrain import RetrainParams, plan_retraining

    try:
        settings = settings_for(None, data_dir)
        checked = accepted_params("retrain", jobs.values_of(params or []), settings)
        assert isinstance(checked, RetrainParams)
        with tempfile.TemporaryDirectory() as folder:
            plan, command = plan_retraining(checked, settings, Path(folder) / "excluded.txt", _tell)
            plan["training"] = _estimate(command) if find_spec("torch") is not None else None
    except (ServiceError, JobFailed, ValueError, OSError) as error:
        raise fail(error) from error
    typer.echo(json.dumps(plan, indent=2) if as_json else "\n".join(_lines(plan, checked.lost)))


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _estimate(command: Sequence[str]) -> list[str]:
    """Run the command that estimates a training, and return the lines that it prints, without the time of day.

    Raises:
        ValueError: the training would not start. The message says why.
    """
    from service.jobs.context import CODE, ChildFailed
    from service.jobs.train import TOLD

    _tell("estimating the training")
    done = subprocess.run(  # noqa: S603 - the arguments are checked, and follow "--"
        [sys.executable, "-m", "cli", *command], cwd=CODE, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(str(ChildFailed(done.returncode, done.stdout + done.stderr)))
    return [str(line) for line in TOLD.findall(done.stdout)]


def _lines(plan: Mapping[str, Any], lost: str) -> list[str]:
    """Return the plan of a retraining as text. `lost` says what happens to items without an image."""
    champion, gate = plan["champion"], plan["gate"]
    seen = "which the training leaves out" if gate["held_out"] else "which are also trained on"
    collections = [f"{name} ({count:,} items)" for name, count in plan["collections"].items()]
    lines = [
        f"live model: generation {champion['generation']}, {champion['path']}",
        f"gate: {gate['images']:,} images from {gate['folder']}, {seen}",
        f"collections to embed again: {', '.join(collections) or 'none'}",
    ]
    for name, count in plan["lost"].items():
        lines.append(f"{name}: {count:,} items have no image that can be read (lost={lost})")
    if plan["lost"] and lost == "refuse":
        lines.append("the retraining would fail because of these items: add lost=drop or lost=keep")
    if plan["training"] is None:
        lines.append("training: not estimated, because torch is not installed here")
    return [*lines, *(f"training: {line}" for line in plan["training"] or ())]

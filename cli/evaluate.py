"""The command `dinov2 eval`, which evaluates a checkpoint or an artifact on one task.

The settings of a task are KEY=VALUE arguments, as for `dinov2 train`. Each task has its own settings and defaults
(`training/evaluate/settings.py`), and does not accept another task's settings. Heavy packages are imported only when
the command runs.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli.shared import DATA, ArtifactsDirOption, check_output, fail, need_torch

TaskName = Literal["knn", "logistic", "linear", "segmentation", "depth", "retrieval"]


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A run's folder (its best checkpoint), a checkpoint file, an artifact folder, the name of a "
            "published model, or auto."
        ),
    ],
    task: Annotated[TaskName, typer.Option(help="Task to evaluate the model on.")],
    data: Annotated[
        str, typer.Option(help="Data folder, or other data that `dinov2 train` accepts; see docs/evaluation.md.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of the task, e.g. k=20 resize=256 'blocks=[1, 4]'.", metavar="KEY=VALUE"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for the protocol, the results and the skipped files.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that stores features for later runs; not used by segmentation and depth."),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a checkpoint from another project, e.g. dinov2_vits14.")
    ] = None,
    data_dir: ArtifactsDirOption = DATA,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device to compute on.")] = "auto",
) -> None:
    """Evaluate a model on one task: k-NN, logistic regression, a linear probe, linear segmentation, linear depth or
    retrieval."""
    need_torch("eval")
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from training.evaluate.backbone import load_backbone
    from training.evaluate.run import evaluate as run_evaluation
    from training.evaluate.run import print_report, write_json
    from training.evaluate.settings import make_settings
    from training.recipe import parse_overrides

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    try:
        if out is not None:
            check_output(out, "--out")
        if cache is not None:
            check_output(cache, "--cache", folder=True)
        values = parse_overrides(settings or [])
        make_settings(task, values)  # reject bad settings before a download or an hour of computing features
        backbone = load_backbone(model, arch=arch, data_dir=data_dir, device=device_of(device))
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:

            def track(what: str, total: int) -> Any:
                bar = progress.add_task(what, total=total)
                return lambda count: progress.advance(bar, count)

            report = run_evaluation(task, backbone, data, values, cache=cache, track=track)
        if out is not None:
            write_json(report, out)
    except (ValueError, OSError, FloatingPointError) as error:
        raise fail(error) from error
    print_report(report, Console())
    if out is not None:
        typer.echo(f"-> {out}")


def device_of(name: str) -> str:
    """Return "cuda" or "cpu". If `name` is "auto", return "cuda" if torch finds a CUDA device, and "cpu" otherwise.

    Raises:
        ValueError: `name` is "cuda", but torch finds no CUDA device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    return name

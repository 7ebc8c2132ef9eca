"""The commands `dinov2 train`, `dinov2 compare`, `dinov2 average` and `dinov2 report`.

Heavy packages are imported only when a command runs.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cli.shared import check_output, fail, need_torch, tell_next

DataOption = Annotated[
    str, typer.Option(help="Folder of images, path or URL of tar shards, or folder of a Hugging Face dataset.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Settings that override those of the recipe.", metavar="KEY=VALUE")
]


@contextmanager
def _early_end_handled() -> Iterator[None]:
    """Catch the exceptions that end a training run early, print the message, and exit.

    Raises:
        typer.Exit: one of these exceptions was caught. The status is 3 if a check stopped the run, 143 after SIGTERM,
            130 after Ctrl-C, and 2 after any other error.
    """
    from training.ending import STOPPED_STATUS, Interrupted, RunStopped

    try:
        yield
    except RunStopped as stopped:
        fail(stopped)
        raise typer.Exit(code=STOPPED_STATUS) from stopped
    except (ValueError, OSError) as error:
        raise fail(error) from error
    except KeyboardInterrupt as interrupt:
        typer.echo("stopped at once by a second Ctrl-C; steps since the last saved state are lost", err=True)
        raise typer.Exit(code=130) from interrupt
    except Interrupted as interrupted:
        typer.echo(str(interrupted), err=True)
        raise typer.Exit(code=interrupted.status) from interrupted


def train(
    data: Annotated[
        list[str],
        typer.Option(
            help="Folder of images, path or URL of tar shards, or folder of a Hugging Face dataset. Repeat the option "
            "for several sources."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and metrics. A run in this folder is resumed.")],
    recipe: Annotated[
        str | None, typer.Option(help="Name of a recipe, e.g. smoke or continue, or a TOML file (docs/training.md).")
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(
            help="Approximate time for the run in hours. The number of epochs follows from a trial at the start."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the estimated time, memory and disk space, and train nothing.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Check the recipe and the settings, and do nothing else. Needs no torch.")
    ] = False,
    overrides: OverridesArgument = None,
) -> None:
    """Train a DINOv2 model on your own images (needs the `train` extra: pip install -e '.[train]')."""
    if check:
        _check_settings(recipe, data, out, overrides or [], hours)
        return
    need_torch("train")
    from training.recipe import check_recipe, load_config, with_hours
    from training.train import dry_run as estimate_training
    from training.train import train as run_training

    with _early_end_handled():
        config = load_config(check_recipe(recipe), data, out, with_hours(overrides or [], hours))
        if dry_run:
            estimate_training(config)
            return
        checkpoint = run_training(config)
    typer.echo(f"checkpoint: {checkpoint}")
    tell_next(f"dinov2 export {shlex.quote(str(checkpoint))}")


def _check_settings(recipe: str | None, data: list[str], out: Path, overrides: list[str], hours: float | None) -> None:
    """Check the recipe and the settings of a training. The images are not looked at.

    Raises:
        typer.Exit: the training would not start. The message says why, and the status is 2.
    """
    from training.recipe import check_recipe, load_config, with_hours

    try:
        load_config(check_recipe(recipe), data, out, with_hours(overrides, hours))
    except (ValueError, OSError) as error:
        raise fail(error) from error


def compare(
    data: DataOption,
    out: Annotated[
        Path, typer.Option(help="Folder for both runs, compare.json and compare.html. Runs in this folder are resumed.")
    ],
    base: Annotated[str, typer.Option(help="Recipe of both runs: a name or a TOML file.")] = "smoke",
    overrides: OverridesArgument = None,
) -> None:
    """Train DINO and DINOv2 with the same data, budget and seed, and compare their results (docs/compare.md)."""
    need_torch("compare")
    from training.compare import compare as run_comparison

    with _early_end_handled():
        run_comparison(data, out, base=base, overrides=overrides or [])


def average(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two or more checkpoints of the same network.")],
    out: Annotated[Path, typer.Option(help="File to write the averaged checkpoint to.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Data, as for `dinov2 train`, on which to evaluate each checkpoint and the mean by k-NN. Only images "
            "that no checkpoint was trained on are classified."
        ),
    ] = None,
) -> None:
    """Average the weights of several checkpoints of one network, for instance those that a training run saved with the
    setting keep_checkpoints_every_epochs."""
    need_torch("average")
    from rich.console import Console
    from rich.table import Table

    from training.average import average_checkpoints, knn_of, open_test

    try:
        check_output(out, "--out")
        fair = None if data is None else open_test(checkpoints, data)
        average_checkpoints(checkpoints, out)
        typer.echo(f"mean of {len(checkpoints)} checkpoints: {out}")
        if fair is None:
            return
        accuracies, notes = knn_of(checkpoints, out, fair)
    except (ValueError, OSError) as error:
        raise fail(error) from error
    ks = list(accuracies[0])
    table = Table("checkpoint", *(f"k-NN, k={k}" for k in ks))
    for name, accuracy in zip([*map(str, checkpoints), "their mean"], accuracies, strict=True):
        table.add_row(name, *(f"{accuracy[k]:.1%}" for k in ks))
    Console().print(table)
    typer.echo(f"class token, {len(fair.test)} images that no checkpoint was trained on")
    for note in notes:
        typer.echo(f"note: {note}")


def report(
    out: Annotated[Path, typer.Argument(help="Folder of a training run, which may be unfinished.")],
) -> None:
    """Write report.html into the folder of a training run."""
    need_torch("report")
    from training.pages.report import write_report

    try:
        typer.echo(write_report(out))
    except (ValueError, OSError) as error:
        raise fail(error) from error

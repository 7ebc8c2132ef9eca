"""The command `dinov2 curate`, and the commands `dinov2 curation`, which work on a curated dataset.

Heavy packages are imported only when a command runs.
"""

import shlex
import sys
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli.shared import check_output, fail, need_torch, tell_next

if TYPE_CHECKING:
    from training.curate.progress import Track
    from training.curate.run import Curation

WorkersOption = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Number of processes on this machine. Default: one per CPU.")
]
app = typer.Typer(help="Work on a dataset that `dinov2 curate` has written.", no_args_is_help=True)


def curate(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders of images, paths or URLs of tar shards, or folders of Hugging Face datasets.",
            metavar="SOURCE...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the dataset. A curation in this folder is continued.")],
    config: Annotated[Path | None, typer.Option(help="TOML file with settings (docs/curation.md).")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Setting that overrides that of the file, e.g. balance.size=50000; may be repeated."
        ),
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="Stages to run, separated by commas. Default: all whose settings are given.")
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(help="Precision with which copies are found. The threshold is calibrated on your images."),
    ] = None,
    workers: WorkersOption = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="What scans the images: processes of this machine, or of a Ray cluster."),
    ] = "local",
    check: Annotated[bool, typer.Option("--check", help="Check the settings, and do nothing else.")] = False,
) -> None:
    """Make a clean and diverse training set out of raw images (needs the extras `train` and `curate`)."""
    overrides = list(set_ or [])
    if stages is not None:
        overrides.append(f"stages={[name.strip() for name in stages.split(',')]}")
    if precision is not None:
        overrides.append(f"copies.precision={precision}")
    try:
        check_output(out, "--out", folder=True)
        if config is not None and not config.is_file():
            raise ValueError(f"--config {config} is not a file")
        from training.curate.settings import load_settings

        settings = load_settings(config, overrides)
        if check:
            return
        need_torch("curate")
        from training.curate.run import Curation

        _run(Curation(tuple(sources), out, settings), workers, engine)
    except (ValueError, OSError, ImportError) as error:
        raise fail(error) from error
    tell_next(f"dinov2 train --data {shlex.quote(str(out))} --recipe continue --out RUN")


def _run(curation: "Curation", workers: int | None, engine: Literal["local", "ray"] = "local") -> None:
    """Run a curation, or continue it. `workers` is the number of processes; None: one per CPU.

    Raises:
        ValueError, OSError, ImportError: see `training.curate.run.curate`.
        typer.Exit: the user has pressed Ctrl-C.
    """
    from model.cpus import available_cpus
    from training.curate.ray_engine import RayWorkers
    from training.curate.run import Tools
    from training.curate.run import curate as run_curation
    from training.curate.workers import RunAll, Workers

    local = Workers(workers or available_cpus())
    run_all: RunAll = RayWorkers() if engine == "ray" else local
    try:
        run_curation(curation, Tools(run_all, local, _track(), typer.echo))
    except KeyboardInterrupt as interrupt:
        typer.echo("stopped; the same command continues", err=True)
        raise typer.Exit(code=130) from interrupt


def _track() -> "Track":
    """Return a function that shows the progress: as a bar on a terminal, otherwise in lines."""
    from training.curate.progress import in_bars, in_lines

    if not sys.stderr.isatty():
        return in_lines(typer.echo)
    from rich.console import Console

    return in_bars(Console(stderr=True))


@app.command("restore")
def restore(
    dataset: Annotated[Path, typer.Argument(help="Folder of the dataset.")],
    keys: Annotated[list[str], typer.Argument(help="Keys of dropped images, as in manifest.jsonl.", metavar="KEY...")],
    workers: WorkersOption = None,
) -> None:
    """Bring dropped images back: note their keys, and write the dataset again with them.

    The command repeats the `dinov2 curate` that has written the dataset. Stages whose images and settings have not
    changed are not done again.
    """
    need_torch("curation restore")
    from model.folder import on_one_line
    from training.curate.manifest import restore as record
    from training.curate.run import Curation, last_command

    dataset = dataset.absolute()
    try:
        for entry in record(dataset, keys):
            typer.echo(on_one_line(f"{entry.key}: was dropped by {entry.stage} ({entry.reason})"))
        command = last_command(dataset)
        with chdir(command.directory):
            _run(Curation(command.sources, dataset, command.settings), workers)
    except (ValueError, OSError, ImportError) as error:
        raise fail(error) from error


@app.command("verify")
def verify(
    dataset: Annotated[Path, typer.Argument(help="Folder of the dataset.")],
    certificate: Annotated[
        Path | None, typer.Option(help="Leak certificate. Default: leak-certificate.json in the dataset.")
    ] = None,
    evaluation: Annotated[
        list[str] | None,
        typer.Option(
            help="Source of evaluation images, in the order of `leaks.evaluation`. Default: their digests in the "
            "certificate are believed."
        ),
    ] = None,
) -> None:
    """Verify a leak certificate: all images of the dataset, and the evaluation images if they are given, are read and
    compared with it."""
    need_torch("curation verify")
    from training.curate.certificate import verify_certificate
    from training.curate.digests import digests_of
    from training.curate.write_stage import CERTIFICATE

    track = _track()
    try:
        if certificate is None and not (dataset / CERTIFICATE).exists():
            raise ValueError(
                f"{dataset} has no {CERTIFICATE}: `dinov2 curate` writes one if leaks.evaluation is set, and if no "
                "image was restored that is a leak or was not compared"
            )
        images = digests_of([str(dataset)], track, "the dataset")
        compared = None if not evaluation else digests_of(evaluation, track, "the evaluation images")
        content = verify_certificate(certificate or dataset / CERTIFICATE, images, evaluation=compared)
    except (ValueError, OSError) as error:
        raise fail(error) from error
    typer.echo(
        f"no leaks: {content['dataset']['images']:,} images were compared with {content['evaluation']['images']:,} "
        f"evaluation images (model {content['model'][:8]}, threshold {content['threshold']:g})"
    )

"""The command `dinov2 train-head`, which fits a head on labelled images and adds it to an artifact."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.evaluate import device_of
from cli.shared import DATA, ArtifactsDirOption, fail, need_torch

if TYPE_CHECKING:
    from model.artifact import Artifact
    from training.heads import FitSettings, FittedHead


def train_head(
    kind: Annotated[Literal["segmentation", "depth", "classification"], typer.Argument(help="What the head predicts.")],
    folder: Annotated[
        Path,
        typer.Argument(
            help="Labelled images, at least 20. classification: one folder per class. segmentation: images/ and masks/ "
            "(PNG, pixel = class). depth: images/ and depth/ (16-bit PNG, millimetres)."
        ),
    ],
    model: Annotated[str, typer.Option(help="An artifact folder, a model's name, or auto.")] = "auto",
    name: Annotated[str | None, typer.Option(help="Name of the head. Default: its kind, such as depth.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a head of the same name.")] = False,
    data_dir: ArtifactsDirOption = DATA,
    held_out: Annotated[
        float, typer.Option(help="Share of the images to hold out, unless the folder is divided into train/ and val/.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Seed for choosing the held-out images and for the training.")] = 0,
    blocks: Annotated[
        int, typer.Option(min=1, help="Number of blocks that the head reads, counted from the last.")
    ] = 1,
    resize: Annotated[
        int | None,
        typer.Option(
            min=14,
            max=4096,
            help="Short side of the network's input in pixels, for segmentation and depth. Default: the model's own.",
        ),
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Training iterations, for segmentation and depth.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per iteration, for segmentation and depth.")] = 8,
    zero_is_ignored: Annotated[
        bool, typer.Option("--zero-is-ignored", help="Masks: 0 marks pixels to ignore, and classes begin at 1.")
    ] = False,
    min_depth: Annotated[float, typer.Option(help="Smallest depth in metres.")] = 0.001,
    max_depth: Annotated[
        float | None,
        typer.Option(help="Largest depth in metres. Default: 1.5 times the largest in the training images."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that stores features for later runs, for classification.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device to compute on.")] = "auto",
) -> None:
    """Fit a head on labelled images, and add it to a model. Some of the images are held out, and the metrics are
    measured on them. A running service uses the new head at once."""
    need_torch("train-head")
    from model.artifact import load_artifact
    from model.heads.store import add_head, check_name
    from service.artifact_choice import choose_artifact
    from training.heads import FitSettings

    try:
        settings = FitSettings(
            held_out=held_out,
            seed=seed,
            blocks=blocks,
            resize=resize,
            iterations=iterations,
            batch_size=batch_size,
            zero_is_ignored=zero_is_ignored,
            min_depth=min_depth,
            max_depth=max_depth,
        )
        artifact = load_artifact(choose_artifact(model, data_dir), derived_dir=data_dir / "derived")
        check_name(artifact, name or kind, replace=replace)  # check before the training, which takes minutes
        fitted = _fit(kind, name or kind, artifact, folder, settings, cache, device)
        path = add_head(artifact, fitted.description, fitted.tensors, replace=replace)
    except (ValueError, OSError, FloatingPointError) as error:
        raise fail(error) from error
    for skipped in fitted.skipped:
        typer.echo(f"skipped {skipped.name}: {skipped.reason}", err=True)
    for key, value in fitted.description.metrics.items():
        for line in _lines(key, value):
            typer.echo(line)
    typer.echo(f"head {fitted.description.name} of {artifact.name} -> {path}")


def _lines(name: str, value: Any) -> list[str]:
    """Return the lines that show a metric: one, or several if it has one value for each class."""
    if isinstance(value, dict):
        return [f"{name}:", *(f"  {key}: {_number(part)}" for key, part in value.items())]
    return [f"{name}: {_number(value)}"]


def _number(value: Any) -> str:
    if value is None:
        return "none held out"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _fit(
    kind: str,
    name: str,
    artifact: "Artifact",
    folder: Path,
    settings: "FitSettings",
    cache: Path | None,
    device: str,
) -> "FittedHead":
    """Load the model and fit the head, with progress bars if the output is a terminal."""
    import tempfile

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from training import heads
    from training.data.sources import open_source
    from training.evaluate.backbone import load_backbone
    from training.evaluate.features import FeatureCache

    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    backbone = load_backbone(str(artifact.path), device=device_of(device))
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:

        def track(what: str, total: int) -> Any:
            bar = progress.add_task(what, total=total)
            return lambda count: progress.advance(bar, count)

        if kind == "segmentation":
            return heads.fit_segmentation(name, backbone, folder, settings, track)
        if kind == "depth":
            return heads.fit_depth(name, backbone, folder, settings, track)
        with tempfile.TemporaryDirectory() as index:  # for the index of tar shards, which is also in memory
            source = open_source(folder, Path(index))
        stored = None if cache is None else FeatureCache(cache, backbone.fingerprint)
        return heads.fit_classification(name, backbone, source, settings, track, stored)

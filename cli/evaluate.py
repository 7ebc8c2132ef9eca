"""`dinov2 eval`: what a checkpoint or an artifact is worth, by one protocol at a time.

Options that are not given are not passed on, so each task has its own defaults, and an option that a task does not have
is refused instead of ignored. Everything heavy is imported when the command runs.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli.search import fail
from model.pooling import Pooling

TaskName = Literal["knn", "logistic", "linear", "segmentation", "depth", "retrieval"]


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A checkpoint file, an artifact folder, auto, or a published model's name.")
    ],
    task: Annotated[TaskName, typer.Option(help="Which evaluation.")],
    data: Annotated[str, typer.Option(help="Folder (or other data that can be trained on), see docs/evaluation.md.")],
    out: Annotated[Path | None, typer.Option(help="JSON file for protocol, figures and skipped files.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder where features are kept for the next call (not segmentation, depth).")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="Architecture of a foreign checkpoint, e.g. dinov2_vits14.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Where artifacts are looked for.", envvar="DINOV2_DATA_DIR")] = Path(
        "data"
    ),
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    resize: Annotated[int | None, typer.Option(help="Short side, pixels. Default: the model's.")] = None,
    crop: Annotated[int | None, typer.Option(help="Centre crop, pixels; 0: the whole photo. Default: model's.")] = None,
    precision: Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="Of the forward pass. [fp32]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of splits, batches and heads. [0]")] = None,
    pooling: Annotated[Pooling | None, typer.Option(help="knn, logistic, retrieval: the vector. [cls]")] = None,
    k: Annotated[
        list[int] | None, typer.Option("-k", "--k", help="knn: neighbours; retrieval: of recall@k. Repeatable.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Of training. [linear 12500, dense tasks 4000]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="linear 1024; segmentation, depth: photos, 16.")] = None,
    held_out: Annotated[
        float | None, typer.Option(help="logistic: share of train that C is chosen on; linear: without val/. [0.1]")
    ] = None,
    grid: Annotated[Literal["code", "paper"] | None, typer.Option(help="linear: learning rates. [code]")] = None,
    blocks: Annotated[
        list[int] | None, typer.Option(help="linear: numbers of last blocks, repeatable [1, 4]; dense: one number [1].")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="segmentation 1e-3, depth 3e-4.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="segmentation, depth. [1e-3]")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="segmentation, depth: tokens kept. [8]")] = None,
    classes: Annotated[int | None, typer.Option(help="segmentation: how many. Default: as the masks say.")] = None,
    zero_is_ignored: Annotated[
        bool | None, typer.Option("--zero-is-ignored", help="segmentation: mask 0 is no class (ADE20k).")
    ] = None,
    min_depth: Annotated[float | None, typer.Option(help="depth: metres. [0.001]")] = None,
    max_depth: Annotated[float | None, typer.Option(help="depth: metres. [10]")] = None,
    units_per_metre: Annotated[float | None, typer.Option(help="depth: of 16-bit PNG. [1000; KITTI 256]")] = None,
    ground_truth: Annotated[
        Path | None, typer.Option(help="retrieval: JSON of queries. Default: class folders.")
    ] = None,
) -> None:
    """Evaluate a model: k-NN, logistic regression, linear probe, linear segmentation and depth, retrieval."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise fail("`dinov2 eval` needs torch: python -m pip install -e '.[train]'")
    dense = task in ("segmentation", "depth")
    if dense and blocks is not None and len(blocks) != 1:
        raise fail(f"--blocks {blocks}: {task} takes one number")
    options: dict[str, Any] = {
        "resize": resize,
        "crop": crop,
        "precision": precision,
        "seed": seed,
        "pooling": pooling,
        "k": k or None,
        "iterations": iterations,
        "batch_size": batch_size,
        "held_out": held_out,
        "grid": grid,
        "blocks": blocks[0] if dense and blocks else blocks or None,
        "lr": lr,
        "weight_decay": weight_decay,
        "memory_gb": memory_gb,
        "classes": classes,
        "zero_is_ignored": zero_is_ignored,
        "min_depth": min_depth,
        "max_depth": max_depth,
        "units_per_metre": units_per_metre,
        "ground_truth": ground_truth,
    }
    given = {name: value for name, value in options.items() if value is not None}
    _run(model, task, data, given, out=out, cache=cache, arch=arch, data_dir=data_dir, device=device)


def _run(
    model: str,
    task: TaskName,
    data: str,
    given: dict[str, Any],
    *,
    out: Path | None,
    cache: Path | None,
    arch: str | None,
    data_dir: Path,
    device: str,
) -> None:
    import torch
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from model.zoo import DownloadError
    from training.evaluate.backbone import load_backbone
    from training.evaluate.run import evaluate as run_evaluation
    from training.evaluate.run import print_report, write_json
    from training.evaluate.settings import make_settings

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    try:
        if chosen == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device here")
        make_settings(task, given)  # before a download, or an hour of features
        backbone = load_backbone(model, arch=arch, data_dir=data_dir, device=chosen)
        with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:

            def track(what: str, total: int) -> Any:
                bar = progress.add_task(what, total=total)
                return lambda count: progress.advance(bar, count)

            report = run_evaluation(task, backbone, data, given, cache=cache, track=track)
        if out is not None:
            write_json(report, out)
    except (ValueError, OSError, FloatingPointError, DownloadError) as error:
        raise fail(error) from error
    print_report(report, Console())
    if out is not None:
        typer.echo(f"-> {out}")

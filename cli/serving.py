"""The commands `dinov2 serve`, `dinov2 embed` and `dinov2 models`, which serve, apply and list models."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cli.shared import (
    DATA,
    ArtifactsDirOption,
    ServedModelOption,
    decode_limits,
    fail,
    settings_for,
)
from model.pooling import DEFAULT_POOLING, Pooling

ENGINE_HELP = (
    "Engine: auto, fastest (on this CPU), or runtime[:precision], e.g. onnxruntime:int8, torch:bf16, tensorrt."
)


def serve(
    model: Annotated[
        str | None, typer.Option(help="An artifact folder, a model's name, or auto. [DINOV2_MODEL]")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [DINOV2_HOST]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [DINOV2_PORT]")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of collections, artifacts and downloads. [DINOV2_DATA_DIR]")
    ] = None,
    engine: Annotated[str | None, typer.Option(help=f"{ENGINE_HELP} [DINOV2_ENGINE]")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Number of CPU threads per forward pass. [DINOV2_THREADS]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of processes that answer requests. [DINOV2_WORKERS]")
    ] = None,
) -> None:
    """Start the REST service. It reads its settings from DINOV2_* environment variables. Command-line options
    override these variables."""
    from service.__main__ import main as run_service

    options = {"model": model, "host": host, "port": port, "data_dir": data_dir, "engine": engine}
    options |= {"threads": threads, "workers": workers}
    raise typer.Exit(run_service({name: value for name, value in options.items() if value is not None}))


def embed(
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images at any depth.")],
    out: Annotated[
        Path, typer.Option(help="The .npz file for the paths, the vectors and the fingerprint of the model.")
    ],
    model: ServedModelOption = "auto",
    data_dir: ArtifactsDirOption = DATA,
    engine: Annotated[str, typer.Option(help=ENGINE_HELP)] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of CPU threads per forward pass. Default: all CPUs.")
    ] = None,
    pooling: Annotated[Pooling, typer.Option(help="Features that form the vector.")] = DEFAULT_POOLING,
    normalize: Annotated[bool, typer.Option(help="Scale each vector to length 1.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Number of images per forward pass.")] = 16,
) -> None:
    """Embed images and write the vectors to one .npz file. Images that cannot be read are skipped and listed. The
    last line counts the files that were used, ignored (by kind) and failed. The service's settings limit the images."""
    from rich.progress import Progress

    from model.artifact import load_artifact
    from model.engines.choice import load_engine
    from model.folder import Account
    from service.artifact_choice import choose_artifact
    from service.ingest.embed import embed_files, find_files, save_vectors
    from service.ingest.index import vector_tag

    try:
        if not out.parent.is_dir():
            raise ValueError(f"{out}: the folder {out.parent} does not exist")
        limits = decode_limits(settings_for(None, data_dir))
        account = Account()
        files = find_files(paths, account)
        artifact = load_artifact(choose_artifact(model, data_dir), derived_dir=data_dir / "derived")
        loaded = load_engine(artifact, engine, threads=threads)
        with Progress(disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("embedding", total=len(files))
            done, vectors, report = embed_files(
                files,
                artifact,
                loaded,
                pooling=pooling,
                normalize=normalize,
                batch_size=batch_size,
                limits=limits,
                advance=lambda count: progress.advance(task, count),
            )
        tag = {"tag": vector_tag(artifact, loaded, pooling), "pooling": pooling, "normalize": normalize}
        save_vectors(out, done, vectors, artifact, tag)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise fail(error) from error
    account.used = report.embedded
    for name, reason in [*account.problems, *report.skipped]:
        typer.echo(f"skipped {name}: {reason}", err=True)
    for path, reason in report.skipped:
        account.fail(str(path), reason)
    typer.echo(f"{report.embedded} images -> {out} ({report.images_per_s:.1f} images/s), {account.failed} skipped")
    typer.echo(account)
    if not report.embedded:
        raise typer.Exit(code=1)

"""The command line: `dinov2 serve | embed | index | search | collections | train | compare | eval | export | ...`.

Each command imports what it needs when it runs, so `dinov2 serve` works without torch and `dinov2 --help` is quick.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli import collection as cli_collections
from cli import engines as cli_engines
from cli import evaluate as cli_eval
from cli import search as cli_search
from cli import training as cli_training
from cli.search import fail as _fail
from cli.training import need_torch
from model.pooling import DEFAULT_POOLING, Pooling

if TYPE_CHECKING:
    from model.artifact import Manifest

app = typer.Typer(
    name="dinov2",
    rich_markup_mode=None,  # it would take [train] for markup
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="DINOv2 image features: train a checkpoint, export it, serve it, embed folders with it, search.",
)

ModelOption = Annotated[
    str,
    typer.Option(
        help="auto (newest artifact in the data folder, else the bundled one), an artifact folder, or a name."
    ),
]


ENGINE_HELP = "auto, fastest (of this CPU), or runtime[:precision], e.g. onnxruntime:int8, torch:bf16, tensorrt."


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option(help="auto, an artifact folder or a published name. [DINOV2_MODEL]")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [DINOV2_HOST]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [DINOV2_PORT]")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Collections, artifacts, downloads. [DINOV2_DATA_DIR]")] = None,
    engine: Annotated[str | None, typer.Option(help=f"{ENGINE_HELP} [DINOV2_ENGINE]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a forward pass. [DINOV2_THREADS]")] = None,
) -> None:
    """Start the REST service. Settings come from DINOV2_* variables; an option given here wins."""
    from service.__main__ import main as run_service

    given = {"model": model, "host": host, "port": port, "data_dir": data_dir, "engine": engine, "threads": threads}
    raise typer.Exit(run_service({name: value for name, value in given.items() if value is not None}))


@app.command()
def embed(
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images at any depth.")],
    out: Annotated[Path, typer.Option(help="File to write: paths, vectors, fingerprint (.npz).")],
    model: ModelOption = "auto",
    data_dir: Annotated[Path, typer.Option(help="Where artifacts are looked for.", envvar="DINOV2_DATA_DIR")] = Path(
        "data"
    ),
    engine: Annotated[str, typer.Option(help=ENGINE_HELP)] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a forward pass. Default: all CPUs.")
    ] = None,
    pooling: Annotated[Pooling, typer.Option(help="What becomes the vector.")] = DEFAULT_POOLING,
    normalize: Annotated[bool, typer.Option(help="Scale each vector to length 1.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Images in one forward pass.")] = 16,
) -> None:
    """Embed images into one .npz; what cannot be read is skipped and listed."""
    from rich.progress import Progress

    from model.artifact import load_artifact
    from model.engines.choice import load_engine
    from service.artifact_choice import choose_artifact
    from service.ingest.embed import embed_files, find_files, save_vectors
    from service.ingest.index import vector_tag

    try:
        if not out.parent.is_dir():
            raise ValueError(f"{out}: the folder {out.parent} does not exist")
        files = find_files(paths)
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
                advance=lambda count: progress.advance(task, count),
            )
        tag = {"tag": vector_tag(artifact, loaded, pooling), "pooling": pooling, "normalize": normalize}
        save_vectors(out, done, vectors, artifact, tag)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise _fail(error) from error
    for path, reason in report.skipped:
        typer.echo(f"skipped {path}: {reason}", err=True)
    typer.echo(f"{report.embedded} images -> {out} ({report.images_per_s:.1f} images/s), {len(report.skipped)} skipped")
    if not report.embedded:
        raise typer.Exit(code=1)


app.command()(cli_search.index)
app.command()(cli_search.search)
app.add_typer(cli_collections.app, name="collections")
app.command("eval")(cli_eval.evaluate)
app.command()(cli_training.train)
app.command()(cli_training.compare)
app.command()(cli_training.average)
app.command()(cli_training.report)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="A checkpoint file, or a published model's name (see `dinov2 models`).")
    ],
    out: Annotated[Path, typer.Option(help="Folder of artifacts; the artifact becomes a folder in it.")],
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a foreign checkpoint, e.g. dinov2_vits14_reg.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the artifact. Default: the architecture or the recipe.")
    ] = None,
    resize: Annotated[
        int | None, typer.Option(help="Short side before the crop, pixels. Default: the checkpoint's, else 256.")
    ] = None,
    crop: Annotated[
        int | None, typer.Option(help="Side of the input, pixels. Default: the checkpoint's, else 224.")
    ] = None,
    weights_dtype: Annotated[Literal["float32", "float16"], typer.Option(help="How weights are stored.")] = "float32",
    sizes: Annotated[
        str, typer.Option(help="Further graphs' input sizes, e.g. 224,518,224x336,dynamic. Default: the crop.")
    ] = "",
    precision: Annotated[str, typer.Option(help="Further graphs' precisions: fp32,fp16,bf16,int8.")] = "",
    outputs: Annotated[
        str, typer.Option(help="Further graphs' outputs: cls,patches,registers and any of attention,layer.N.")
    ] = "",
    int8_weights: Annotated[
        Literal["s7", "u8"], typer.Option(help="int8's weights: s7, the fastest on AVX2; u8, half the error.")
    ] = "s7",
    float_layers: Annotated[
        str | None,
        typer.Option(
            help="Linear layers that int8 leaves in float, by ends or beginnings of names (mlp.fc2,blocks.0), or none. "
            "Default: attn.proj, mlp.fc2 (or mlp.w3) and the last block."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of photos for the parity check; for int8 it holds train/ and val/, a folder per class in "
            "each. Default: generated pictures."
        ),
    ] = None,
    card: Annotated[Path | None, typer.Option(help="Model card (markdown) to put into the artifact.")] = None,
    licence: Annotated[
        str, typer.Option(help="SPDX identifier of your weights; published ones bring theirs.")
    ] = "unknown",
    keep_onnx: Annotated[bool, typer.Option(help="--no-keep-onnx leaves out what loading can derive.")] = True,
) -> None:
    """Turn a checkpoint into an artifact that the service loads: weights, ONNX, parity figures, fingerprint."""
    need_torch("export")
    from model.engines.knn_gate import find_labelled
    from model.export.checkpoint import export_checkpoint
    from model.export.options import CheckpointOptions, ExportOptions, GraphOptions
    from model.zoo import DownloadError
    from service.artifact_choice import read_photo, read_photos

    tell = partial(typer.echo, err=True)
    try:
        options = ExportOptions(
            weights_dtype=weights_dtype,
            images=read_photos(images, 32, tell) if images else None,
            labelled=find_labelled(images, partial(read_photo, tell=tell)) if images else None,
            model_card=card.read_text() if card else None,
            keep_onnx=keep_onnx,
        )
        graphs = GraphOptions(
            sizes=_items(sizes),
            precisions=_items(precision),
            outputs=_items(outputs),
            int8_weights=int8_weights,
            float_layers=None if float_layers is None else _items("" if float_layers == "none" else float_layers),
        )
        asked = CheckpointOptions(arch=arch, name=name, resize=resize, crop=crop, licence=licence, graphs=graphs)
        artifact = export_checkpoint(source, out, asked, options)
    except (ValueError, OSError, DownloadError) as error:
        raise _fail(error) from error
    typer.echo(f"{artifact.path}\nfingerprint {artifact.fingerprint}")
    for line in _parity_lines(artifact.manifest):
        typer.echo(line)
    typer.echo(f"next: dinov2 serve --model {artifact.path}")


def _items(text: str) -> list[str]:
    """Parts of a list with commas; an empty one has none."""
    return [item.strip() for item in text.split(",") if item.strip()]


def _parity_lines(manifest: "Manifest") -> Iterator[str]:
    """What the export measured, a line per graph and size."""
    for record in manifest.parity:
        size = "x".join(map(str, record.size or manifest.input_size))
        yield (
            f"{record.file} at {size}: parity on {record.images} images: max error {record.max_abs_error:.2e}, "
            f"class cosine {record.min_cosine_cls:.7f}, patch cosine {record.min_cosine_patches:.7f}"
        )
        if record.gate is not None:
            serves = "may serve" if record.gate.status == "passed" else "will not serve"
            yield f"{record.file} {serves}: gate {record.gate.status}: {record.gate.reason}"
    for graph in manifest.graphs:
        if graph.not_compared is not None:
            yield f"{graph.file}: not compared: {graph.not_compared}"


app.command("build-engine")(cli_engines.build_engine)


@app.command()
def models(
    data_dir: Annotated[Path, typer.Option(help="Where artifacts are looked for.", envvar="DINOV2_DATA_DIR")] = Path(
        "data"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")] = False,
) -> None:
    """List the artifacts that can be served now and the published models that can be downloaded."""
    from model.artifact import ArtifactError, find_artifacts, read_manifest
    from model.zoo import ENTRIES

    local = []
    for path in find_artifacts(data_dir):
        try:
            manifest = read_manifest(path)
        except ArtifactError as error:
            typer.echo(f"warning: {error}", err=True)
            continue
        local.append({"path": str(path), "name": manifest.name, "fingerprint": manifest.fingerprint})
    published = [{"name": entry.name, "licence": entry.licence, "url": entry.url} for entry in ENTRIES.values()]
    if as_json:
        typer.echo(json.dumps({"artifacts": local, "published": published}, indent=2))
        return
    typer.echo("Artifacts (dinov2 serve --model PATH):")
    for row in local:
        typer.echo(f"  {row['name']:<28} {row['fingerprint'][:8]}  {row['path']}")
    typer.echo("Published (dinov2 serve --model NAME downloads and exports it once; needs the train extra):")
    for row in published:
        typer.echo(f"  {row['name']:<28} {row['licence']}  {row['url']}")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()

"""The commands `dinov2 heads ...`, which add Meta's published heads to a model, list a model's heads, and delete
them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli.shared import DATA, ArtifactsDirOption, JsonOption, fail

if TYPE_CHECKING:
    from model.artifact import Artifact

app = typer.Typer(
    help="Add one of Meta's heads to a model, list a model's heads, or delete one. `dinov2 train-head` trains a head.",
    no_args_is_help=True,
)
HeadModelOption = Annotated[str, typer.Option(help="An artifact folder, a model's name, or auto.")]


@app.command()
def add(
    file: Annotated[Path, typer.Argument(help="One of Meta's heads, as a .pth or .safetensors file.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the head. Default: the file's name without its ending.")
    ] = None,
    kind: Annotated[
        Literal["classification", "segmentation", "depth"] | None,
        typer.Option(help="The expected kind. A head of another kind is an error. Default: any kind."),
    ] = None,
    model: HeadModelOption = "auto",
    min_depth: Annotated[
        float | None, typer.Option(help="Smallest depth in metres. Default: depends on the file's name (nyu or kitti).")
    ] = None,
    max_depth: Annotated[
        float | None,
        typer.Option(help="Largest depth in metres. Default: depends on the file's name (nyu: 10, kitti: 80)."),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Text file with the names of the classes, one per line. Default: those of ADE20K or VOC, or numbers."
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a head of the same name.")] = False,
    data_dir: ArtifactsDirOption = DATA,
) -> None:
    """Add one of Meta's published heads to a model. The head must belong to the model's backbone. A running service
    uses the new head at once."""
    from model.heads.published import read_published
    from model.heads.store import add_head, check_name, read_class_names

    try:
        if (min_depth is None) != (max_depth is None):
            raise ValueError("give both --min-depth and --max-depth, or neither")
        artifact = _artifact(model, data_dir)
        name = name or file.name.split(".")[0]
        check_name(artifact, name, replace=replace)
        description, tensors = read_published(
            file,
            name,
            artifact.manifest.config,
            kind=kind,
            depth_range=None if min_depth is None or max_depth is None else (min_depth, max_depth),
            classes=None if classes is None else read_class_names(classes),
        )
        path = add_head(artifact, description, tensors, replace=replace)
    except (ValueError, OSError) as error:
        raise fail(error) from error
    typer.echo(
        f"{description.name}: {description.architecture} head for {description.kind}, reads the blocks "
        f"{', '.join(map(str, description.layers))}, sha256 of the file {description.source_sha256}"
    )
    typer.echo(f"head {description.name} of {artifact.name} -> {path}")


@app.command("add-dinotxt")
def add_dinotxt(
    vision_head: Annotated[Path, typer.Argument(help="Meta's file ..._vision_head.pth.")],
    text_encoder: Annotated[Path, typer.Argument(help="Meta's file ..._text_encoder.pth.")],
    vocabulary: Annotated[Path, typer.Argument(help="CLIP's vocabulary, bpe_simple_vocab_16e6.txt.gz.")],
    name: Annotated[str, typer.Option(help="Name of the head.")] = "dinotxt",
    model: HeadModelOption = "auto",
    replace: Annotated[bool, typer.Option("--replace", help="Replace a head of the same name.")] = False,
    data_dir: ArtifactsDirOption = DATA,
) -> None:
    """Add dino.txt to a model, for `dinov2 words`. Meta published it for dinov2_vitl14_reg only. A running service uses
    it at once."""
    from model.dinotxt.store import Sources
    from model.dinotxt.store import add_dinotxt as add_files

    try:
        artifact = _artifact(model, data_dir)
        path = add_files(artifact, Sources(vision_head, text_encoder, vocabulary), name, replace=replace)
    except (ValueError, OSError) as error:
        raise fail(error) from error
    typer.echo(f"head {name} of {artifact.name} -> {path}")


@app.command("list")
def list_(model: HeadModelOption = "auto", data_dir: ArtifactsDirOption = DATA, as_json: JsonOption = False) -> None:
    """List the heads of a model."""
    from model.dinotxt.store import list_dinotxt
    from model.heads.store import list_heads

    try:
        artifact = _artifact(model, data_dir)
        records, with_text = list_heads(artifact), list_dinotxt(artifact)
    except (ValueError, OSError) as error:
        raise fail(error) from error
    if as_json:
        typer.echo(json.dumps([record.model_dump(mode="json") for record in (*records, *with_text)], indent=2))
        return
    typer.echo(f"heads of {artifact.name}:")
    for record in records:
        what = (
            f"{len(record.classes)} classes" if record.classes else "{:g} to {:g} m".format(*record.depth_range or ())
        )
        typer.echo(f"  {record.name:<28} {record.kind:<15} {record.architecture:<7} {what:<16} {record.sha256[:8]}")
    for dinotxt in with_text:
        typer.echo(f"  {dinotxt.name:<28} {'words':<15} dino.txt")
    if not records and not with_text:
        typer.echo("  none; `dinov2 heads add` adds one of Meta's, and `dinov2 train-head` trains one")


@app.command()
def delete(
    name: Annotated[str, typer.Argument(help="Name of the head.")],
    model: HeadModelOption = "auto",
    data_dir: ArtifactsDirOption = DATA,
) -> None:
    """Delete a head of a model."""
    from model.dinotxt.store import list_dinotxt, remove_dinotxt
    from model.heads.store import remove_head

    try:
        artifact = _artifact(model, data_dir)
        if any(record.name == name for record in list_dinotxt(artifact)):
            remove_dinotxt(artifact, name)
        else:
            remove_head(artifact, name)
    except (ValueError, OSError) as error:
        raise fail(error) from error
    typer.echo(f"deleted the head {name} of {artifact.name}")


def _artifact(model: str, data_dir: Path) -> "Artifact":
    from model.artifact import load_artifact
    from service.artifact_choice import choose_artifact

    return load_artifact(choose_artifact(model, data_dir), derived_dir=data_dir / "derived")

"""The command `dinov2 export`, which converts a model to an artifact, or to the file format of another project."""

import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli.shared import DATA, ArtifactsDirOption, fail, need_torch, tell_next

if TYPE_CHECKING:
    from model.artifact import Manifest
    from model.export.options import CheckpointOptions


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint or weights file, a run's folder (its best checkpoint), an artifact folder, or the name "
            "of a published model (see `dinov2 models`)."
        ),
    ],
    file_format: Annotated[
        Literal["artifact", "meta", "timm", "transformers"],
        typer.Option(
            "--format",
            help="What to write: an artifact for this service, or files that Meta's code, timm or Hugging Face's "
            "transformers loads.",
        ),
    ] = "artifact",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which the model's folder is created. Default: `artifacts` in the data folder, or "
            "`exported` for other formats."
        ),
    ] = None,
    data_dir: ArtifactsDirOption = DATA,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a checkpoint from another project, e.g. dinov2_vits14_reg.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model's folder. Default: the name in the source, the architecture or the run."),
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            help="Short side of the image before the crop, in pixels; only for --fit crop. Default: as in the "
            "checkpoint, else 256."
        ),
    ] = None,
    crop: Annotated[
        int | None, typer.Option(help="Side of the square input, in pixels. Default: as in the checkpoint, else 224.")
    ] = None,
    fit: Annotated[
        Literal["crop", "pad", "squash"] | None,
        typer.Option(
            help="How an image that is not square becomes a square: crop cuts out the centre, pad fills the rest with "
            "the mean colour, squash changes the aspect ratio. Default: as in the checkpoint, else crop."
        ),
    ] = None,
    weights_dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="Number format in which the weights are stored.")
    ] = "float32",
    sizes: Annotated[
        str, typer.Option(help="Input sizes of additional graphs, e.g. 224,518,224x336,dynamic. Default: the crop.")
    ] = "",
    precision: Annotated[
        str, typer.Option(help="Precisions of additional graphs, e.g. fp16,int8. Allowed: fp32, fp16, bf16, int8.")
    ] = "",
    outputs: Annotated[
        str,
        typer.Option(help="Outputs of additional graphs: cls,patches,registers, and optionally attention and layer.N."),
    ] = "",
    int8_weights: Annotated[
        Literal["s7", "u8"],
        typer.Option(help="Weight format of int8 graphs. s7 is the fastest on AVX2; u8 has half the error."),
    ] = "s7",
    float_layers: Annotated[
        str | None,
        typer.Option(
            help="Linear layers that stay in float in int8 graphs, named by prefix or suffix (e.g. mlp.fc2,blocks.0), "
            "or none. Default: attn.proj, mlp.fc2 (or mlp.w3) and the last block."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images for the comparison with the reference. For int8, it needs the subfolders train/ and "
            "val/, each with one folder per class. Default: generated images."
        ),
    ] = None,
    card: Annotated[Path | None, typer.Option(help="Model card (Markdown) to include in the artifact.")] = None,
    licence: Annotated[
        str, typer.Option(help="SPDX identifier of the licence of the weights. Ignored for published models.")
    ] = "unknown",
    keep_onnx: Annotated[
        bool,
        typer.Option(help="Store the ONNX graphs. If they are not stored, they are built when the artifact is loaded."),
    ] = True,
) -> None:
    """Convert a model to an artifact, which is a folder that the service can load. The artifact contains the weights,
    ONNX graphs, a fingerprint, and the results of comparing the graphs with a reference. With --format, convert a model
    to the file format of another project."""
    from model.engines.knn_gate import find_labelled
    from model.export.checkpoint import export_checkpoint
    from model.export.options import CheckpointOptions, ExportOptions, GraphOptions
    from service.artifact_choice import read_photo, read_photos

    tell = partial(typer.echo, err=True)
    try:
        asked = CheckpointOptions(arch=arch, name=name, resize=resize, crop=crop, fit=fit, licence=licence)
        if file_format != "artifact":
            given = (sizes, precision, outputs, float_layers, images, card, not keep_onnx)
            names = ("sizes", "precision", "outputs", "float-layers", "images", "card", "no-keep-onnx")
            _refuse_options(file_format, [option for option, value in zip(names, given, strict=True) if value])
            _export_format(source, file_format, out or data_dir / "exported", asked, weights_dtype)
            return
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
        asked = replace(asked, graphs=graphs)
        artifact = export_checkpoint(source, out or data_dir / "artifacts", asked, options)
    except (ValueError, OSError) as error:
        raise fail(error) from error
    typer.echo(f"{artifact.path}\nfingerprint {artifact.fingerprint}")
    for line in _parity_lines(artifact.manifest):
        typer.echo(line)
    tell_next(f"dinov2 serve --model {shlex.quote(str(artifact.path))}")


def _refuse_options(file_format: str, given: list[str]) -> None:
    """Raise an error for options that apply only to artifacts."""
    if given:
        raise ValueError(f"--{given[0]} applies to artifacts, not to --format {file_format}")


def _export_format(
    source: str,
    file_format: Literal["meta", "timm", "transformers"],
    out: Path,
    asked: "CheckpointOptions",
    weights_dtype: Literal["float32", "float16"],
) -> None:
    """Write a model in the file format of another project, and print what to know about it."""
    from model.export.checkpoint import read_backbone
    from model.export.formats import export_format

    if file_format == "meta":
        need_torch("export --format meta")
    exported = export_format(read_backbone(source, asked), out, file_format, weights_dtype)
    typer.echo(f"{exported.folder}: {', '.join(exported.files)}")
    for note in exported.notes:
        typer.echo(f"note: {note}")
    tell_next(exported.usage)


def _items(text: str) -> list[str]:
    """Split a text at its commas, and return the items that are not empty."""
    return [item.strip() for item in text.split(",") if item.strip()]


def _parity_lines(manifest: "Manifest") -> Iterator[str]:
    """Yield lines of text that say how closely each exported graph matches the reference."""
    for record in manifest.parity:
        size = "x".join(map(str, record.size or manifest.input_size))
        yield (
            f"{record.file} at {size}: parity on {record.images} images with {record.reference}: "
            f"max error {record.max_abs_error:.2e}, class cosine {record.min_cosine_cls:.7f}, "
            f"patch cosine {record.min_cosine_patches:.7f}"
        )
        if record.gate is not None:
            serves = "may serve" if record.gate.status == "passed" else "will not serve"
            yield f"{record.file} {serves}: gate {record.gate.status}: {record.gate.reason}"
    for graph in manifest.graphs:
        if graph.not_compared is not None:
            yield f"{graph.file}: not compared: {graph.not_compared}"

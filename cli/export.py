"""The command `dinov2 export`, which converts a checkpoint to an artifact."""

import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli.shared import DATA, ArtifactsDirOption, fail

if TYPE_CHECKING:
    from model.artifact import Manifest


def export(
    source: Annotated[
        str, typer.Argument(help="A checkpoint file, or the name of a published model (see `dinov2 models`).")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder in which the artifact's folder is created. Default: `artifacts` in the data folder."),
    ] = None,
    data_dir: ArtifactsDirOption = DATA,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a checkpoint from another project, e.g. dinov2_vits14_reg.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the artifact. Default: the architecture or the recipe.")
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
    """Convert a checkpoint to an artifact, which is a folder that the service can load. The artifact contains the
    weights, ONNX graphs, a fingerprint, and the results of comparing the graphs with a reference."""
    from model.engines.knn_gate import find_labelled
    from model.export.checkpoint import export_checkpoint
    from model.export.options import CheckpointOptions, ExportOptions, GraphOptions
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
        asked = CheckpointOptions(
            arch=arch, name=name, resize=resize, crop=crop, fit=fit, licence=licence, graphs=graphs
        )
        artifact = export_checkpoint(source, out or data_dir / "artifacts", asked, options)
    except (ValueError, OSError) as error:
        raise fail(error) from error
    typer.echo(f"{artifact.path}\nfingerprint {artifact.fingerprint}")
    for line in _parity_lines(artifact.manifest):
        typer.echo(line)
    typer.echo(f"next: dinov2 serve --model {shlex.quote(str(artifact.path))}")


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

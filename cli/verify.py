"""The command `dinov2 verify`, which compares a model's features with published numbers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.shared import DATA, ArtifactsDirOption, fail

if TYPE_CHECKING:
    from model.decode import Pixels


def verify(
    model: Annotated[str, typer.Argument(help="An artifact folder, a model's name, or auto.")],
    image: Annotated[
        Path,
        typer.Option(
            help="The reference image, 000000039769.jpg of COCO val2017. It is not part of this project; download it "
            "from http://images.cocodataset.org/val2017/000000039769.jpg."
        ),
    ],
    engine: Annotated[
        str, typer.Option(help="Engine: runtime[:precision]. With a lower precision than fp32, fewer places may agree.")
    ] = "onnxruntime:fp32",
    data_dir: ArtifactsDirOption = DATA,
) -> None:
    """Compare a model's features of a well-known image with the numbers in the tests of Hugging Face's transformers.
    Print to how many decimal places each number agrees. The exit status is 1 if it is fewer than two for any number."""
    from model.artifact import load_artifact
    from model.engines.choice import load_engine
    from model.published_numbers import agreeing_rules
    from model.published_numbers import verify as compare
    from service.artifact_choice import choose_artifact

    try:
        pixels = _decoded(image)
        artifact = load_artifact(choose_artifact(model, data_dir), derived_dir=data_dir / "derived")
        result = compare(artifact, load_engine(artifact, engine), pixels)
        rules = [] if result.agrees else agreeing_rules(artifact, pixels)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise fail(error) from error
    typer.echo(f"{artifact.name} from {artifact.path}, engine {engine}\nnumbers: {result.source}")
    typer.echo(f"{'token':<12} feature  published   computed  agrees to")
    for number in result.numbers:
        values = f"{number.published:9.4f}  {number.computed:9.4f}"
        typer.echo(f"{number.token:<12} {number.feature:>7}  {values}  {number.decimals} decimal places")
    if result.agrees:
        typer.echo("the model agrees with the published numbers")
        return
    typer.echo(f"the model disagrees: each number must agree to {result.needed} decimal places", err=True)
    if rules:
        own = artifact.manifest.config.pos_embed_rule
        typer.echo(
            f"The weights are right: with the rule {' or '.join(rules)} for resizing the position embedding, they give "
            f"the published numbers. This artifact uses the rule {own} (docs/models.md, resize rules).",
            err=True,
        )
    raise typer.Exit(code=1)


def _decoded(path: Path) -> "Pixels":
    """Return the pixels of an image file.

    Raises:
        ValueError: the file is not an image. The message names the file.
        OSError: the file cannot be read.
    """
    from model.decode import DecodeError, decode

    try:
        return decode(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path}: {error}") from error

"""The command `dinov2 find-region`, which finds a marked region in the images of a collection."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.shared import (
    DATA,
    CollectionOption,
    DataDirOption,
    EngineOption,
    JsonOption,
    ModelOption,
    StoreOption,
    ThreadsOption,
    decode_limits,
    json_value,
    load_model,
    run_with,
)

if TYPE_CHECKING:
    from service.retrieval.local_regions import Answered
    from service.search.store import VectorStore
    from service.settings import Settings
    from service.state import Service

# The ranges and defaults of the endpoint. A test compares them with service/retrieval/region_schemas.py, which is not
# imported here because `dinov2 --help` must be fast.
CANDIDATES = (1, 10_000)
DEFAULT_CANDIDATES = 1000
DEFAULT_MIN_SCORE = 0.5
LIMITS = (1, 100)
DEFAULT_LIMIT = 20
_LEAST_WHITE = 128
_NAME_CHARACTERS = 80


def find_region(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Path or address of the image with the region.")],
    collection: CollectionOption,
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y,WIDTH,HEIGHT", help="The region as a box: x,y,width,height in pixels of the upright image."
        ),
    ] = None,
    point: Annotated[
        list[str] | None, typer.Option(metavar="X,Y", help="The region as a point x,y: the patch that contains it.")
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="The region as an image of the same size, in which the region is white."),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IMAGE",
            help="Another image that shows the same thing. Repeatable. Give --box, --point or --mask once for each "
            "image, in the same order.",
        ),
    ] = None,
    where: Annotated[str | None, typer.Option("--filter", help="Condition on the items to examine, as JSON.")] = None,
    candidates: Annotated[
        int,
        typer.Option(
            min=CANDIDATES[0],
            max=CANDIDATES[1],
            help="Highest number of items to examine. If there are more, the most similar ones are examined.",
        ),
    ] = DEFAULT_CANDIDATES,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Lowest score of a result.")] = DEFAULT_MIN_SCORE,
    debias: Annotated[
        bool, typer.Option(help="Remove the part of the features that depends on the position of a patch.")
    ] = True,
    limit: Annotated[
        int, typer.Option(min=LIMITS[0], max=LIMITS[1], help="Highest number of results.")
    ] = DEFAULT_LIMIT,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="Folder for the images of the results, with the region tinted."
        ),
    ] = None,
    as_json: JsonOption = False,
    model: ModelOption = "auto",
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Mark a region in an image, and find it in the images of a collection. The collection must store its images. Patch
    features that are missing are computed and kept in the data folder."""

    async def work(vectors: "VectorStore", settings: "Settings") -> "Answered":
        from service.retrieval.local_regions import local_service

        images = [image, *(reference or [])]
        regions = _regions(len(images), box or [], point or [], mask or [], settings)
        options = {"candidates": candidates, "min_score": min_score, "debias": debias, "limit": limit}
        if where is not None:
            options["filter"] = json_value(where, "--filter")
        references = [{"image": _data(path, settings), **region} for path, region in zip(images, regions, strict=True)]
        info = await vectors.info(collection)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        artifact, loaded = load_model(model, engine, threads, settings.data_dir, info)
        settings = settings.model_copy(update={"threads": threads})
        async with local_service(settings, artifact, loaded, vectors) as service:
            answered = await _find(service, collection, images, references, options)
            if out is not None:
                await _write_overlays(service, answered, out)
        return answered

    answered = run_with(store, data_dir, work)
    if as_json:
        typer.echo(json.dumps(answered.answer, indent=2, ensure_ascii=False))
    else:
        _print(answered, min_score)


def _regions(
    images: int, boxes: Sequence[str], points: Sequence[str], masks: Sequence[str], settings: "Settings"
) -> list[dict[str, Any]]:
    """Return the region of each image, as a field of a reference.

    Raises:
        ValueError: there is not exactly one region for each image, or a region cannot be read.
    """
    given = {"--box": boxes, "--point": points, "--mask": masks}
    kinds = [option for option, values in given.items() if values]
    if len(kinds) != 1:
        raise ValueError(f"exactly one of --box, --point and --mask is needed, not {' and '.join(kinds) or 'none'}")
    [kind] = kinds
    if len(given[kind]) != images:
        raise ValueError(
            f"{kind} is given {len(given[kind])} times for {images} images: give it once for each image, in the same "
            "order"
        )
    if kind == "--mask":
        return [{"mask": _mask(path, settings)} for path in masks]
    if kind == "--box":
        return [{"box": _numbers(text, kind, "x,y,width,height")} for text in boxes]
    return [{"point": _numbers(text, kind, "x,y")} for text in points]


def _numbers(text: str, option: str, names: str) -> list[float]:
    """Parse numbers that are separated by commas. `names` contains the name of each.

    Raises:
        ValueError: the text does not contain as many numbers as there are names.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(names.split(",")) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{option} {text!r} is not {names} in pixels")
    return numbers


def _mask(path: str, settings: "Settings") -> Any:
    """Return the mask in an image, bool [H, W].

    Raises:
        ValueError: the image cannot be decoded, or has no white pixel.
    """
    from service.errors import ServiceError
    from service.features.images import decode

    try:
        mask = decode(_data(path, settings), decode_limits(settings)).max(axis=2) >= _LEAST_WHITE
    except ServiceError as error:
        raise ValueError(f"{path}: {error.detail}") from error
    if not mask.any():
        raise ValueError(f"{path}: the mask is empty: no pixel has a brightness of {_LEAST_WHITE} or more (of 255)")
    return mask


def _data(path: str, settings: "Settings") -> bytes:
    from service.ingest.sources import read_photo

    return read_photo(path, max_bytes=settings.max_image_bytes)


async def _find(
    service: "Service",
    collection: str,
    images: Sequence[str],
    references: Sequence[dict[str, Any]],
    options: dict[str, Any],
) -> "Answered":
    """Find the region. If a reference is wrong, the message of the error begins with the path of its image."""
    from service.errors import InvalidItems, InvalidRequest
    from service.retrieval.local_regions import find_in_service

    try:
        return await find_in_service(service, collection, references, options)
    except InvalidItems as error:
        raise ValueError("; ".join(f"{images[item.index]}: {item.error.detail}" for item in error.items)) from error
    except InvalidRequest as error:
        for number, path in enumerate(images):
            if error.param == f"references.{number}":
                raise ValueError(f"{path}: {error.detail.removeprefix(f'{error.param}.')}") from error
        raise


async def _write_overlays(service: "Service", answered: "Answered", folder: Path) -> None:
    """Write an image for each result. Print a warning if the image of an item cannot be read."""
    from service.errors import ServiceError
    from service.retrieval.local_regions import region_overlay

    for rank, found in enumerate(answered.found.page, 1):
        stem = re.sub(r"\.\w{1,5}$", "", found.item.id)
        name = re.sub(r"[^\w.-]+", "_", stem)[:_NAME_CHARACTERS]
        try:
            (folder / f"{rank:03}-{name}.png").write_bytes(await region_overlay(service, found))
        except ServiceError as error:
            typer.echo(f"warning: {found.item.id}: {error.detail}", err=True)


def _print(answered: "Answered", min_score: float) -> None:
    """Print a line for each result. Then print the numbers of examined and unreadable images to standard error."""
    answer = answered.answer
    rows = [(found["id"], ",".join(map(str, found["box"]))) for found in answer["data"]]
    width = max([2, *(len(item_id) for item_id, _ in rows)])
    box_width = max([3, *(len(box) for _, box in rows)])
    typer.echo(f"{'score':>6}  {'id':<{width}}  {'box':<{box_width}}  {'area':>8}")
    for found, (item_id, box) in zip(answer["data"], rows, strict=True):
        typer.echo(f"{found['score']:6.4f}  {item_id:<{width}}  {box:<{box_width}}  {found['area']:>8}")
    unreadable = f", {answer['unreadable']} without a readable image" if answer["unreadable"] else ""
    typer.echo(
        f"{answer['examined']} examined{unreadable}; {answer['total']} with a score of at least {min_score:g}", err=True
    )

"""The command `dinov2 classify`, which classifies images by a collection's labels, by example images or with a head."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.shared import (
    DATA,
    DataDirOption,
    EngineOption,
    JsonOption,
    ModelOption,
    StoreOption,
    ThreadsOption,
    decode_limits,
    fail,
    json_value,
    load_model,
    run_with,
    settings_for,
)
from model.pooling import DEFAULT_POOLING, Pooling

if TYPE_CHECKING:
    from model.artifact import Artifact
    from model.engines.protocol import Engine
    from service.retrieval.calibration import Reference
    from service.retrieval.classify import Classified, Verdict
    from service.search.filters import Filter
    from service.search.store import Floats, VectorStore
    from service.settings import Settings

_BATCH = 16
# The limits of `POST /v1/classify`. A test compares them with service/retrieval/class_schemas.py, which is not imported
# here because `dinov2 --help` must be fast.
MAX_K = 100
ERROR_RATES = (0.001, 0.5)
DEFAULT_ERROR_RATE = 0.05
_ONLY_WITH = {
    **dict.fromkeys(("--label", "-k", "--filter", "--calibration-filter"), ("--collection",)),
    "--pooling": ("--example",),
    "--error-rate": ("--collection", "--example"),
}


def classify(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Paths or addresses of the images.")],
    collection: Annotated[
        str | None, typer.Option("--collection", "-c", help="Name or alias of a collection with labelled items.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Metadata key that contains the class of an item.")] = None,
    example: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Class and an example image of it, or a folder of example images. Repeatable. Use this instead of "
            "--collection.",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="Name of a classification head of the model, or auto if there is only one. Use this instead of "
            "--collection. No image is then called unknown."
        ),
    ] = None,
    error_rate: Annotated[
        float | None,
        typer.Option(
            min=ERROR_RATES[0],
            max=ERROR_RATES[1],
            help=f"Share of images of known classes that may be called unknown. Default: {DEFAULT_ERROR_RATE}.",
        ),
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", min=1, max=MAX_K, help="Number of neighbours that vote. Default: 10.")
    ] = None,
    where: Annotated[
        str | None, typer.Option("--filter", help="Condition on the items that may be neighbours, as JSON.")
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--calibration-filter",
            help="Condition on the items that are held out for the calibration, as JSON. Default: every item is "
            "compared with all others.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=MAX_K, help="Highest number of classes per image with --json.")] = 5,
    pooling: Annotated[
        Pooling | None, typer.Option(help="With --example: features that form the vectors. Default: cls.")
    ] = None,
    as_json: JsonOption = False,
    model: ModelOption = "auto",
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Classify images by the labels of similar items in a collection, by a few example images of each class, or with a
    classification head. Except with a head, an image that resembles no class is reported as unknown, at the chosen
    error rate."""
    given = {
        "--collection": collection,
        "--example": example or None,
        "--head": head,
        "--label": label,
        "-k": k,
        "--filter": where,
        "--calibration-filter": held_out,
        "--pooling": pooling,
        "--error-rate": error_rate,
    }
    way = _way({option for option, value in given.items() if value is not None})
    rate = DEFAULT_ERROR_RATE if error_rate is None else error_rate
    loader = (model, engine, threads)
    if way == "--head":
        _print(images, _by_head(images, str(head), loader, data_dir), None, rate, top, as_json)
        return
    if way == "--example":
        classified = _by_examples(images, example or (), rate, pooling, loader, data_dir)
    else:

        async def work(vectors: "VectorStore", settings: "Settings") -> "Classified":
            reference = _reference(str(label), k, where, held_out)
            return await _by_collection(vectors, settings, str(collection), images, reference, rate, loader)

        classified = run_with(store, data_dir, work)
    _print(images, classified.verdicts, classified, rate, top, as_json)


def _way(given: set[str]) -> str:
    """Return the option that selects how to classify. `given` contains the command's options that have a value.

    Raises:
        typer.Exit: there is not exactly one such option, or another option is not allowed with it.
    """
    ways = [way for way in ("--collection", "--example", "--head") if way in given]
    if len(ways) != 1:
        raise fail("exactly one of --collection, --example and --head is needed")
    [way] = ways
    for option, fitting in _ONLY_WITH.items():
        if option in given and way not in fitting:
            raise fail(f"{option} is not possible with {way}, only with {' or '.join(fitting)}")
    if way == "--collection" and "--label" not in given:
        raise fail("--label is missing: the metadata key that contains the class of an item")
    return way


def _by_head(images: Sequence[str], name: str, loader: tuple[str, str, int | None], data_dir: Path) -> "list[Verdict]":
    """Classify images with a head of the model."""
    from service.errors import ServiceError
    from service.features.pipeline import View
    from service.ingest.sources import read_photo
    from service.retrieval.classify import Verdict
    from service.vision.head_classes import head_scores, open_classification_head
    from service.vision.local import Vision

    try:
        settings = settings_for(None, data_dir)
        artifact, loaded = load_model(*loader, settings.data_dir, None)
        vision = Vision(artifact, loaded, loader[2], decode_limits(settings))
        head = open_classification_head(vision.model, name)
        verdicts = []
        for path in images:
            data = read_photo(path, max_bytes=settings.max_image_bytes)
            try:
                analysed = vision.analyse(data, View(head.outputs))
            except ServiceError as error:
                raise ValueError(f"{path}: {error.detail}") from error
            scores = head_scores(head, analysed.embedded, analysed.outputs)
            verdicts.append(Verdict(scores[0].label, False, None, scores))
        return verdicts
    except (ServiceError, ValueError, OSError, ImportError) as error:
        raise fail(error) from error


async def _by_collection(
    store: "VectorStore",
    settings: "Settings",
    collection: str,
    images: Sequence[str],
    reference: "Reference",
    error_rate: float,
    loader: tuple[str, str, int | None],
) -> "Classified":
    """Classify images by the labels of a collection's items. `loader` contains the model, the engine and the number of
    threads."""
    from service.ingest.index import pooling_of, vector_tag
    from service.retrieval.classify import classify_by_collection
    from service.search.checks import check_match
    from service.shared_results import SharedResults

    info = await store.info(collection)
    pooling = pooling_of(info)
    artifact, loaded = load_model(*loader, settings.data_dir, info)
    check_match(info, tag=vector_tag(artifact, loaded, pooling), dimension=info.dimension)
    vectors = _embedded(images, settings, artifact, loaded, pooling)
    return await classify_by_collection(store, SharedResults(), info, vectors, reference, error_rate)


def _by_examples(
    images: Sequence[str],
    examples: Sequence[str],
    error_rate: float,
    pooling: Pooling | None,
    loader: tuple[str, str, int | None],
    data_dir: Path,
) -> "Classified":
    """Classify images by examples, each of the form NAME=PATH."""
    from service.errors import ServiceError
    from service.retrieval.classify import classify_by_examples

    try:
        settings = settings_for(None, data_dir)
        names, paths = _example_paths(examples)
        artifact, loaded = load_model(*loader, settings.data_dir, None)
        vectors = _embedded([*paths, *images], settings, artifact, loaded, pooling or DEFAULT_POOLING)
        return classify_by_examples(vectors[: len(paths)], names, vectors[len(paths) :], error_rate)
    except (ServiceError, ValueError, OSError, ImportError) as error:
        raise fail(error) from error


def _example_paths(examples: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the classes and the paths of the example images, as two lists. A folder stands for all images in it.

    Raises:
        ValueError: an example is not NAME=PATH, or its path does not exist.
    """
    from service.ingest.embed import find_files

    names, paths = [], []
    for example in examples:
        name, separator, path = example.partition("=")
        if not separator or not name or not path:
            raise ValueError(f"--example {example!r} is not NAME=PATH")
        for file in find_files([Path(path)]):
            names.append(name)
            paths.append(str(file))
    return names, paths


def _embedded(
    images: Sequence[str], settings: "Settings", artifact: "Artifact", engine: "Engine", pooling: Pooling
) -> "Floats":
    """Embed images and return their vectors [n, D], each of length 1.

    Raises:
        ValueError: an image cannot be used. The message contains its path.
    """
    import numpy as np

    from model.preprocess import preprocess
    from service.errors import ServiceError
    from service.features.images import decode
    from service.ingest.embed import vectors_of
    from service.ingest.sources import read_photo
    from service.search.checks import normalised_rows

    limits = decode_limits(settings)
    vectors: list[Any] = []
    for start in range(0, len(images), _BATCH):
        pixels = []
        for path in images[start : start + _BATCH]:
            try:
                image = decode(read_photo(path, max_bytes=settings.max_image_bytes), limits)
                pixels.append(preprocess(image, artifact.manifest.preprocess))
            except ServiceError as error:
                raise ValueError(f"{path}: {error.detail}") from error
        vectors += vectors_of(engine, pixels, pooling, True)
    return normalised_rows(np.stack(vectors))


def _reference(label: str, k: int | None, where: str | None, held_out: str | None) -> "Reference":
    from service.retrieval.calibration import Reference
    from service.retrieval.class_schemas import DEFAULT_K
    from service.search.filters import parse_path

    return Reference(
        parse_path(label, "label"),
        DEFAULT_K if k is None else k,
        _condition(where, "--filter"),
        _condition(held_out, "--calibration-filter"),
    )


def _condition(text: str | None, option: str) -> "Filter | None":
    """Parse the JSON text of a filter. `option` is the name of the command-line option.

    Raises:
        ValueError: the text is not JSON, or not a filter.
    """
    from service.search.filters import parse_filter

    return None if text is None else parse_filter(json_value(text, option))


def _print(
    images: Sequence[str],
    verdicts: "Sequence[Verdict]",
    classified: "Classified | None",
    error_rate: float,
    top: int,
    as_json: bool,
) -> None:
    """Print a line for each image, or JSON in the format of the REST answer with the path of each image added.
    `classified` is None if a head made the verdicts."""
    from service.retrieval.class_answers import calibration_fields, verdict_fields

    calibration = None if classified is None else calibration_fields(classified, error_rate)
    if as_json:
        data = [
            {"image": image, **verdict_fields(index, verdict, top)}
            for index, (image, verdict) in enumerate(zip(images, verdicts, strict=True))
        ]
        answer: dict[str, Any] = {"data": data}
        if calibration is not None:
            answer["calibration"] = calibration
        typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    width = max(len(image) for image in images)
    typer.echo(f"{'image':<{width}}  {'p-value':>7}  {'score':>6}  class")
    for image, verdict in zip(images, verdicts, strict=True):
        p_value = "" if verdict.p_value is None else f"{verdict.p_value:.4f}"
        nearest = verdict.scores[0] if verdict.scores else None
        score = "" if nearest is None else f"{nearest.score:.4f}"
        name = "" if nearest is None else str(nearest.label)
        shown = f"unknown (nearest: {name})" if verdict.unknown else name
        typer.echo(f"{image:<{width}}  {p_value:>7}  {score:>6}  {shown}")
    if calibration is not None and "note" in calibration:
        typer.echo(f"note: {calibration['note']}", err=True)

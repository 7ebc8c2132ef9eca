"""The commands `dinov2 index`, which adds images to a collection, and `dinov2 search`, which finds similar images."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.prune import folders_to_prune, prune_items
from cli.shared import (
    DATA,
    CollectionOption,
    DataDirOption,
    EngineOption,
    JsonOption,
    ModelOption,
    PoolingOption,
    StoreOption,
    ThreadsOption,
    decode_limits,
    find_collection,
    json_value,
    load_model,
    run_with,
)
from model.pooling import DEFAULT_POOLING

if TYPE_CHECKING:
    from model.artifact import Artifact
    from model.engines.protocol import Engine
    from model.folder import Account
    from service.features.patches import Patches
    from service.ingest.folders import Problem
    from service.ingest.index import IndexOptions, IndexReport
    from service.ingest.listed import Allowed
    from service.search.store import VectorStore
    from service.settings import Settings

_LISTED = 20  # the maximum number of failed images that are printed


def index(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Paths or addresses (s3://..., memory://...) of folders, images, .tar and .parquet files, or lists of "
            "images (.txt, .jsonl, .csv)."
        ),
    ],
    collection: CollectionOption,
    model: ModelOption = "auto",
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Number of threads that read and decode images. Default: one per CPU."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Number of images per forward pass.")] = 16,
    pooling: PoolingOption = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            help="Metadata of every item as key=value. A value that is not JSON becomes a string. Repeatable."
        ),
    ] = None,
    originals: Annotated[
        bool | None,
        typer.Option(help="Store the images as well. Default: the collection's setting, or off for a new collection."),
    ] = None,
    id_by: Annotated[
        Literal["path", "sha256"],
        typer.Option("--id", help="Id of an image: its path within SOURCE, or the SHA-256 hash of its content."),
    ] = "path",
    folders_as: Annotated[
        str | None,
        typer.Option(
            metavar="KEY[/KEY]",
            help="Metadata keys under which to store the names of the folders within SOURCE that contain an image, "
            "outermost first, e.g. brand or brand/kind.",
        ),
    ] = None,
    image_column: Annotated[
        str | None,
        typer.Option(help="Column of Parquet and .csv files with the images. Default: detected automatically."),
    ] = None,
    allow_outside: Annotated[
        bool,
        typer.Option(
            "--allow-outside",
            help="Let lists and Parquet files name any file and URL that this command can read, not only files in "
            "their own folder and below it.",
        ),
    ] = False,
    allow_web: Annotated[
        bool,
        typer.Option("--allow-web", help="Let lists and Parquet files name images on public web servers."),
    ] = False,
    force: Annotated[
        bool, typer.Option(help="Index unchanged images again, and replace items of other files with the same id.")
    ] = False,
    errors: Annotated[
        Path | None,
        typer.Option(help="File that lists the images that could not be indexed, as one JSON object per line."),
    ] = None,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune", help="Afterwards, remove items whose file no longer exists in SOURCE, which must be a folder."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Let --prune remove items without asking.")] = False,
) -> None:
    """Embed images and add them to a collection. To resume an interrupted run, run the command again. If some
    images cannot be read, they are skipped and reported, and the exit status is 1. The last line on standard output
    counts the files that were used, ignored (by kind) and failed."""
    from model.folder import Account

    account = Account()

    async def work(vectors: "VectorStore", settings: "Settings") -> "IndexReport":
        from model.memory import return_large_blocks
        from service.ingest.index import IndexOptions, pooling_of
        from service.ingest.listed import Allowed
        from service.ingest.prune import Sources

        return_large_blocks()
        info = await find_collection(vectors, collection)
        folders = folders_to_prune(sources, id_by) if prune else []
        found = Sources()
        allowed = Allowed(allow_outside, allow_web)
        images = _find_images(sources, image_column, folders_as, account, settings, allowed)
        if info is not None and pooling not in (None, pooling_of(info)):
            raise ValueError(f"collection {info.name!r} holds {pooling_of(info)} vectors, not {pooling}")
        if originals and info is not None and not info.spec.originals:
            raise ValueError(f"collection {info.name!r} stores no images: it was created without --originals")
        artifact, loaded = load_model(model, engine, threads, data_dir, info)
        options = IndexOptions(
            pooling=pooling_of(info) if info is not None else pooling or DEFAULT_POOLING,
            batch_size=batch_size,
            workers=workers,
            id_by=id_by,
            force=force,
            originals=bool(originals) if info is None else originals is not False and info.spec.originals,
            metadata=_pairs(metadata or []),
            limits=decode_limits(settings),
        )
        images = found.recorded(images) if prune else images
        report = await _index(images, vectors, collection, artifact, loaded, options, settings, errors)
        _tell(report, collection)
        if prune:
            await prune_items(vectors, collection, folders, found, report, yes)
        return report

    report = run_with(store, data_dir, work, makes=True)
    account.used, account.failed = report.indexed + report.present, report.failed
    account.problems = [(problem.source, problem.reason) for problem in report.problems]
    typer.echo(account)
    _finish(report, sources, errors)


def _tell(report: "IndexReport", collection: str) -> None:
    """Print the result of an indexing run."""
    for problem in report.problems[:_LISTED]:
        typer.echo(f"failed {problem.source}: {problem.reason}", err=True)
    typer.echo(
        f"{report.indexed} indexed, {report.present} already there, {report.failed} failed -> {collection} "
        f"({report.images_per_s:.1f} images/s){'; interrupted: run again to resume' if report.interrupted else ''}"
    )


def _finish(report: "IndexReport", sources: list[str], errors: Path | None) -> None:
    """Say where the failed images are listed, and end the command with its exit status.

    Raises:
        typer.Exit: some images failed or no image was found (status 1), or the run was interrupted (status 130).
    """
    if not (report.indexed or report.present or report.failed):
        typer.echo(f"there are no images in {', '.join(sources)}", err=True)
    if report.failed:
        above = "see the list above" if report.failed <= _LISTED else f"the first {_LISTED} are listed above"
        where = f"see the list in {errors}" if errors is not None else f"{above}; --errors FILE saves the whole list"
        many = "1 image was" if report.failed == 1 else f"{report.failed} images were"
        typer.echo(f"{many} left out: {where}", err=True)
    if report.interrupted:
        raise typer.Exit(code=130)
    if report.failed or not (report.indexed or report.present):
        raise typer.Exit(code=1)


async def _index(
    images: "Iterator[Any]",
    vectors: "VectorStore",
    collection: str,
    artifact: "Artifact",
    engine: "Engine",
    options: "IndexOptions",
    settings: "Settings",
    errors: Path | None,
) -> "IndexReport":
    """Index the images and return a report. Meanwhile, show the progress and write problems to the file `errors`. On
    Ctrl+C, stop after the current batch."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from service.ingest.index import IndexHooks, index_photos

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        _photos_kept(settings, options.originals) as keep,
        _patches_kept(settings, options.originals, artifact, engine) as keep_patches,
        _errors_file(errors) as on_problem,
        _until_interrupted() as stop,
        Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task("starting", total=None)

        def show(state: "IndexReport") -> None:
            text = f"{state.indexed} indexed, {state.present} already there, {state.failed} failed"
            progress.update(task, description=f"{text}, {state.images_per_s:.1f} images/s")

        return await index_photos(
            images,
            vectors,
            collection,
            artifact,
            engine,
            options,
            IndexHooks(stop, keep, keep_patches, on_problem, show),
        )


def search(
    photo: Annotated[str, typer.Argument(metavar="IMAGE", help="Path or address of the image to search with.")],
    collection: CollectionOption,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="Number of results.")] = 10,
    where: Annotated[
        str | None, typer.Option("--filter", help='Condition on the metadata as JSON, e.g. {"key": "brand", "eq": "x"}')
    ] = None,
    as_json: JsonOption = False,
    model: ModelOption = "auto",
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Search a collection for the images that are most similar to a given image."""

    async def work(vectors: "VectorStore", settings: "Settings") -> list[dict[str, Any]]:
        from model.preprocess import preprocess
        from service.errors import ServiceError
        from service.features.images import decode
        from service.ingest.embed import vectors_of
        from service.ingest.index import pooling_of, vector_tag
        from service.ingest.sources import read_photo
        from service.search.filters import parse_filter

        condition = parse_filter(json_value(where, "--filter")) if where is not None else None
        info = await vectors.info(collection)
        pooling = pooling_of(info)
        data = read_photo(photo, max_bytes=settings.max_image_bytes)
        artifact, loaded = load_model(model, engine, threads, data_dir, info)
        try:
            image = decode(data, decode_limits(settings))
        except ServiceError as error:
            raise ValueError(f"{photo}: {error.detail}") from error
        pixels = preprocess(image, artifact.manifest.preprocess)
        tag = vector_tag(artifact, loaded, pooling)
        query = vectors_of(loaded, [pixels], pooling, True)
        [hits] = await vectors.search(collection, query, k, tag=tag, where=condition)
        return [
            {"id": hit.id, "score": hit.score, "source": hit.source, "metadata": dict(hit.metadata)} for hit in hits
        ]

    hits = run_with(store, data_dir, work)
    if as_json:
        typer.echo(json.dumps(hits, indent=2, ensure_ascii=False))
        return
    width = max([2, *(len(hit["id"]) for hit in hits)])
    typer.echo(f"{'score':>7}  {'id':<{width}}  source")
    for hit in hits:
        typer.echo(f"{hit['score']:7.4f}  {hit['id']:<{width}}  {hit['source'] or ''}")


def _find_images(
    sources: list[str],
    image_column: str | None,
    folders_as: str | None,
    account: "Account",
    settings: "Settings",
    allowed: "Allowed",
) -> "Iterator[Any]":
    """Return an iterator over the images in all sources. For an image that cannot be read, it yields a `Problem`.

    Raises:
        ValueError: a source cannot be read, or `folders_as` contains an empty key.
    """
    from service.ingest.sources import find_photos

    keys = folders_as.split("/") if folders_as is not None else []
    if not all(keys):
        raise ValueError(f"--folders-as {folders_as!r} must be one or more keys, separated by slashes")
    return find_photos(
        sources,
        max_bytes=settings.max_image_bytes,
        image_column=image_column,
        folders_as=keys,
        account=account,
        allowed=allowed,
    )


def _pairs(texts: list[str]) -> dict[str, Any]:
    """Parse texts of the form key=value and return a dictionary. A value that is not JSON is kept as a string.

    Raises:
        ValueError: a text has no `=` or no key.
    """
    pairs: dict[str, Any] = {}
    for pair in texts:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"--metadata {pair!r} is not key=value")
        try:
            pairs[key] = json.loads(value)
        except ValueError:
            pairs[key] = value
    return pairs


@contextmanager
def _photos_kept(
    settings: "Settings", wanted: bool
) -> "Iterator[Callable[[bytes], Coroutine[Any, Any, object]] | None]":
    """Yield an async function that stores the bytes of an image, or None if `wanted` is false."""
    if not wanted:
        yield None
        return
    from service.originals import Originals

    yield Originals(settings.originals_place, max_bytes=settings.max_originals_bytes).put


@contextmanager
def _patches_kept(
    settings: "Settings", wanted: bool, artifact: "Artifact", engine: "Engine"
) -> "Iterator[Callable[[Mapping[str, Patches]], None] | None]":
    """Yield a function that stores patch features on disk, by the digests of the images. Yield None if `wanted` is
    false or the settings forbid it."""
    if not wanted or not settings.patch_store_bytes:
        yield None
        return
    from service.features.patch_cache import patches_key
    from service.features.patch_store import patch_store_of

    store = patch_store_of(settings)

    def keep(patches: "Mapping[str, Patches]") -> None:
        model = artifact.fingerprint, engine.precision
        store.set_many({patches_key(digest, *model): each.to_bytes() for digest, each in patches.items()})

    try:
        yield keep
    finally:
        store.close()


@contextmanager
def _errors_file(path: Path | None) -> "Iterator[Callable[[Problem], None]]":
    """Yield a function that writes a problem to the file `path` as one line of JSON. If `path` is None, the function
    does nothing."""
    if path is None:
        yield lambda _: None
        return
    with path.open("w", encoding="utf-8", errors="surrogateescape") as file:

        def write(problem: "Problem") -> None:
            file.write(json.dumps({"source": problem.source, "reason": problem.reason}) + "\n")
            file.flush()

        yield write


@contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl+C sets. A second Ctrl+C has its usual effect."""
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT) or signal.SIG_DFL

    def interrupt(_number: int, _frame: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)
        os.write(
            2, b"\nstopping after the current batch; press Ctrl+C again to stop at once\n"
        )  # print is not safe in a signal handler

    if before is not signal.SIG_IGN:  # do not handle a signal that was ignored, for instance under nohup
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)

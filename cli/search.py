"""`dinov2 index` and `dinov2 search`: images into a collection, and the items most similar to an image."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

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
    load_model,
    run_with,
)
from model.pooling import DEFAULT_POOLING

if TYPE_CHECKING:
    from model.artifact import Artifact
    from model.engines.protocol import Engine
    from service.ingest.folders import Problem
    from service.ingest.index import IndexOptions, IndexReport
    from service.search.store import VectorStore
    from service.settings import Settings

_LISTED = 20


def index(
    sources: Annotated[
        list[str],
        typer.Argument(help="Folders, images, .tar, .parquet, lists (.txt, .jsonl): paths or s3://..., memory://..."),
    ],
    collection: CollectionOption,
    model: ModelOption = "auto",
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads that read and decode. Default: one per CPU.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Images in one forward pass.")] = 16,
    pooling: PoolingOption = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="key=value for every item; a value is JSON, else a string. Repeatable.")
    ] = None,
    originals: Annotated[
        bool | None, typer.Option(help="Store the images too. Default: as the collection says; a new one: no.")
    ] = None,
    id_by: Annotated[
        Literal["path", "sha256"], typer.Option("--id", help="Ids: the path within SOURCE, or the content's sha256.")
    ] = "path",
    image_column: Annotated[str | None, typer.Option(help="Column of images in Parquet files. Default: found.")] = None,
    force: Annotated[bool, typer.Option(help="Also what is there and unchanged; replaces ids of other files.")] = False,
    errors: Annotated[
        Path | None, typer.Option(help="File for what could not be indexed, a JSON object a line.")
    ] = None,
) -> None:
    """Embed images into a collection. Run again, it goes on where it ended; what cannot be read is listed, and the exit
    status is then 1."""

    async def work(vectors: "VectorStore", settings: "Settings") -> "IndexReport":
        from service.ingest.index import IndexOptions, pooling_of

        info = await find_collection(vectors, collection)
        found = _found(sources, image_column, settings)
        if info is not None and pooling not in (None, pooling_of(info)):
            raise ValueError(f"collection {info.name!r} holds {pooling_of(info)} vectors, not {pooling}")
        if originals and info is not None and not info.spec.originals:
            raise ValueError(f"collection {info.name!r} keeps no images: it was made without --originals")
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
        return await _index(found, vectors, collection, artifact, loaded, options, settings, errors)

    _tell(run_with(store, data_dir, work, makes=True), collection, errors)


def _tell(report: "IndexReport", collection: str, errors: Path | None) -> None:
    """What became of the images, as text and as the exit status: a script must see when some were left out."""
    for problem in report.problems[:_LISTED]:
        typer.echo(f"failed {problem.source}: {problem.reason}", err=True)
    typer.echo(
        f"{report.indexed} indexed, {report.present} already there, {report.failed} failed -> {collection} "
        f"({report.images_per_s:.1f} images/s){'; interrupted: run again to go on' if report.interrupted else ''}"
    )
    if report.failed:
        above = "all are listed above" if report.failed <= _LISTED else f"the first {_LISTED} are listed above"
        where = f"all are listed in {errors}" if errors is not None else f"{above}; --errors FILE keeps the whole list"
        many = "1 image was" if report.failed == 1 else f"{report.failed} images were"
        typer.echo(f"{many} left out: {where}", err=True)
    if report.interrupted:
        raise typer.Exit(code=130)
    if report.failed or not (report.indexed or report.present):
        raise typer.Exit(code=1)


async def _index(
    found: "Iterator[Any]",
    vectors: "VectorStore",
    collection: str,
    artifact: "Artifact",
    engine: "Engine",
    options: "IndexOptions",
    settings: "Settings",
    errors: Path | None,
) -> "IndexReport":
    """The run with its progress, its file of errors and Ctrl+C."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from service.ingest.index import IndexHooks, index_photos

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        _photos_kept(settings, options.originals) as keep,
        _errors_file(errors) as on_problem,
        _until_interrupted() as stop,
        Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task("starting", total=None)

        def show(state: "IndexReport") -> None:
            text = f"{state.indexed} indexed, {state.present} already there, {state.failed} failed"
            progress.update(task, description=f"{text}, {state.images_per_s:.1f} images/s")

        return await index_photos(
            found,
            vectors,
            collection,
            artifact,
            engine,
            options,
            IndexHooks(stop, keep, on_problem, show),
        )


def search(
    photo: Annotated[str, typer.Argument(help="An image: a path or an address.")],
    collection: CollectionOption,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="How many.")] = 10,
    where: Annotated[str | None, typer.Option("--filter", help='On metadata, e.g. {"key": "brand", "eq": "x"}')] = None,
    as_json: JsonOption = False,
    model: ModelOption = "auto",
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Find the images of a collection that are most similar to one."""

    async def work(vectors: "VectorStore", settings: "Settings") -> list[dict[str, Any]]:
        from model.preprocess import preprocess
        from service.features.images import decode
        from service.ingest.embed import vectors_of
        from service.ingest.index import pooling_of, vector_tag
        from service.ingest.sources import read_photo
        from service.search.filters import parse_filter

        condition = parse_filter(_json_value(where, "--filter")) if where is not None else None
        info = await vectors.info(collection)
        pooling = pooling_of(info)
        data = read_photo(photo, max_bytes=settings.max_image_bytes)
        artifact, loaded = load_model(model, engine, threads, data_dir, info)
        pixels = preprocess(decode(data, decode_limits(settings)), artifact.manifest.preprocess)
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


def _found(sources: list[str], image_column: str | None, settings: "Settings") -> "Iterator[Any]":
    from service.ingest.sources import find_photos

    return find_photos(sources, max_bytes=settings.max_image_bytes, image_column=image_column)


def _pairs(given: list[str]) -> dict[str, Any]:
    """key=value as metadata; a value is JSON if it can be read so."""
    pairs: dict[str, Any] = {}
    for pair in given:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"--metadata {pair!r} is not key=value")
        try:
            pairs[key] = json.loads(value)
        except ValueError:
            pairs[key] = value
    return pairs


def _json_value(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option}: not JSON: {error}") from error


@contextmanager
def _photos_kept(
    settings: "Settings", wanted: bool
) -> "Iterator[Callable[[bytes], Coroutine[Any, Any, object]] | None]":
    if not wanted:
        yield None
        return
    from service.originals import Originals

    yield Originals(settings.originals_place).put


@contextmanager
def _errors_file(path: Path | None) -> "Iterator[Callable[[Problem], None]]":
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
    """Set by the first Ctrl+C; a second one ends the program as usual."""
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT) or signal.SIG_DFL

    def interrupt(_number: int, _frame: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)
        os.write(2, b"\nstopping after the batch in hand; Ctrl+C again ends at once\n")  # print is not reentrant

    if before is not signal.SIG_IGN:  # as with nohup
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)

"""Options and functions that several commands use, for instance to open the vector store and to load a model.

The commands open the vector store themselves, so they need no running server. A running server may use the same
embedded store at the same time. Heavy packages are imported only when a command runs, so `dinov2 --help` is fast.
"""

import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from model.pooling import Pooling

if TYPE_CHECKING:
    from model.artifact import Artifact, Manifest
    from model.decode import DecodeLimits
    from model.engines.protocol import Engine
    from service.search.store import CollectionInfo, VectorStore
    from service.settings import Settings

T = TypeVar("T")


def _expanded(path: Path) -> Path:
    """Replace `~` at the start of a path with the home folder. Shells do not do this in every place where a path can be
    given, such as `--data-dir=~/data`.

    Raises:
        typer.BadParameter: the home folder is unknown.
    """
    from model.files import expanded

    try:
        return expanded(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


CollectionOption = Annotated[str, typer.Option("--collection", "-c", help="Name or alias of the collection.")]
DataDirOption = Annotated[
    Path,
    typer.Option(
        help="Folder of the collections and artifacts; the server's data folder.",
        envvar="DINOV2_DATA_DIR",
        callback=_expanded,
    ),
]
ArtifactsDirOption = Annotated[
    Path,
    typer.Option(
        help="Data folder; its subfolder `artifacts` contains the models.", envvar="DINOV2_DATA_DIR", callback=_expanded
    ),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        help="Vector store: embedded, embedded:FOLDER (in another data folder) or milvus://... [DINOV2_VECTOR_STORE]"
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        help="An artifact folder, a model's name, or auto (the collection's model if it is available locally, else the "
        "default of `dinov2 serve`)."
    ),
]
ServedModelOption = Annotated[
    str,
    typer.Option(
        help="An artifact folder, a model's name, or auto (the newest in the data folder, else the bundled one)."
    ),
]
EngineOption = Annotated[
    str, typer.Option(help="Engine: auto, fastest, or runtime[:precision], e.g. onnxruntime:int8.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Number of CPU threads per forward pass. Default: all CPUs.")
]
PoolingOption = Annotated[
    Pooling | None,
    typer.Option(help="Features that form the vector, for a new collection. Default: cls."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DATA = Path("data")
MODEL_NAMES = "an artifact folder, the name of a model, its fingerprint, or the number of a generation"
"""What the commands for models accept as a model (`service.model_list.named_artifact`), for help texts."""


def fail(message: object) -> typer.Exit:
    """Print an error message and return the exception that ends the command with status 2. The caller raises it."""
    if isinstance(message, OSError) and message.filename is not None and message.strerror:
        message = f"{message.filename}: {message.strerror}"  # the file first, and no error number
    from model.folder import on_one_line

    # The name of a file may contain escape sequences, which a terminal would obey.
    typer.echo("\n".join(map(on_one_line, f"error: {message}".split("\n"))), err=True)
    return typer.Exit(code=2)


def tell_next(command: str) -> None:
    """Print the command that the user may want to run next. Within a job, print nothing, because its output is the log
    of the job."""
    from service.jobs.process import IN_JOB

    if IN_JOB not in os.environ:
        typer.echo(f"next: {command}")


def check_output(path: Path, option: str, *, folder: bool = False) -> None:
    """Check that a command can write a file to `path`, before the work whose result it writes.

    Args:
        path: the file, or the folder if `folder` is True. Folders that do not exist are made later.
        option: the name of the option, for messages.
        folder: whether `path` is a folder.

    Raises:
        ValueError: `path` is an address such as s3://bucket/file, is a folder instead of a file or a file instead of a
            folder, or is in a folder that does not allow writing.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        address = str(path).replace(":/", "://", 1)  # `Path` makes one slash of two
        raise ValueError(f"{option} {address} is an address, but results are written to local files only")
    if path.is_dir() and not folder:
        raise ValueError(f"{option} {path} is a folder: give a file, for instance {path / 'result'}")
    parent = path if folder else path.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(f"{option} {path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: the folder {parent} does not allow writing")


def need_torch(command: str) -> None:
    """Check that torch is installed.

    Raises:
        typer.Exit: torch is not installed. A message says how to install it, and the status is 2.
    """
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise fail(
            f"`dinov2 {command}` needs torch: python -m pip install -e '.[train]' (the extra `train` of dinov2-service)"
        )


def run_with(
    store: str | None,
    data_dir: Path,
    work: "Callable[[VectorStore, Settings], Awaitable[T]]",
    *,
    makes: bool = False,
) -> T:
    """Open the vector store, call `work` with the store and the settings, and return the result of `work`.

    Args:
        store, data_dir: the vector store and the data folder; see `settings_for`.
        makes: whether to create the store if it does not exist. If False, a missing embedded store is an error, so that
            a mistyped folder does not become an empty store.

    Raises:
        typer.Exit: an expected error occurred, such as a missing collection. Its message has been printed, and the
            status is 2.
    """
    from service.errors import CollectionNotFound

    async def opened() -> T:
        settings = settings_for(store, data_dir)
        folder = settings.data_dir.resolve() if settings.vector_store == "embedded" else None
        if folder is not None and not makes and not (folder / "search.sqlite3").exists():
            raise ValueError(f"no vector store in {folder}: set its folder with --data-dir or DINOV2_DATA_DIR")
        async with opened_store(settings) as vectors:
            try:
                return await work(vectors, settings)
            except CollectionNotFound as error:
                raise ValueError(f"{error.detail} in {folder}" if folder is not None else error.detail) from error

    return run_async(opened())


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine and return its result.

    Raises:
        typer.Exit: an expected error occurred, such as a missing collection. Its message has been printed, and the
            status is 2.
    """
    import asyncio

    from service.errors import ServiceError

    try:
        return asyncio.run(work)
    except (ServiceError, ValueError, OSError, ImportError) as error:
        raise fail(error) from error


def settings_for(store: str | None, data_dir: Path) -> "Settings":
    """Return the service's settings: those in environment variables, overridden by the arguments.

    Args:
        store: the vector store. If None, `DINOV2_VECTOR_STORE` is used. With `embedded:FOLDER`, FOLDER is the data
            folder and `data_dir` is ignored.
        data_dir: the data folder.

    Raises:
        ValueError: a setting in the environment is unknown or not allowed.
    """
    from service.settings import load_settings

    overrides: dict[str, Any] = {"data_dir": data_dir}
    if store is not None and store.startswith("embedded:"):
        overrides = {"data_dir": Path(store.removeprefix("embedded:")), "vector_store": "embedded"}
    elif store is not None:
        overrides["vector_store"] = store
    return load_settings(overrides)


@asynccontextmanager
async def opened_store(settings: "Settings") -> "AsyncIterator[VectorStore]":
    """Open the vector store that the settings name, yield it, and close it at the end."""
    from service.search.opening import open_store

    vectors: VectorStore = await open_store(settings)
    try:
        yield vectors
    finally:
        await vectors.close()


async def find_collection(vectors: "VectorStore", name: str) -> "CollectionInfo | None":
    """Return the description of the collection with this name or alias, or None if there is none."""
    from service.errors import CollectionNotFound

    try:
        return await vectors.info(name)
    except CollectionNotFound:
        return None


def load_model(
    model: str, engine: str, threads: int | None, data_dir: Path, info: "CollectionInfo | None"
) -> "tuple[Artifact, Engine]":
    """Load a model and return its artifact and its engine.

    If `model` is "auto", choose the model that computed the vectors of the collection `info`. If this model is not
    available locally or `info` is None, choose the default model of `dinov2 serve`.
    """
    from model.artifact import load_artifact
    from model.engines.choice import load_engine
    from service.artifact_choice import choose_artifact

    path = artifact_with(info.tag.partition("/")[0], data_dir) if model == "auto" and info is not None else None
    artifact = load_artifact(path or choose_artifact(model, data_dir), derived_dir=data_dir / "derived")
    return artifact, load_engine(artifact, engine, threads=threads)


def artifact_with(fingerprint: str, data_dir: Path) -> Path | None:
    """Return the path of a local or bundled artifact whose fingerprint begins with `fingerprint`, or None if there is
    none. Print a warning for an artifact with an unreadable manifest."""
    from service import artifact_choice

    return artifact_choice.artifact_with(fingerprint, data_dir, _warn)


def readable_artifacts(data_dir: Path) -> "Iterator[tuple[Path, Manifest]]":
    """Return an iterator over the path and the manifest of each local artifact and of the bundled one. It prints a
    warning for an artifact with an unreadable manifest."""
    from service import artifact_choice

    return artifact_choice.readable_artifacts(data_dir, _warn)


def _warn(message: str) -> None:
    typer.echo(f"warning: {message}", err=True)


def decode_limits(settings: "Settings") -> "DecodeLimits":
    """Return the limits for decoding images, as given in the settings."""
    from model.decode import DecodeLimits

    return DecodeLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)


def json_value(text: str, option: str) -> Any:
    """Parse the JSON text of a command-line option and return its value.

    Raises:
        ValueError: the text is not JSON. The message names the option.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option} is not JSON: {error}") from error

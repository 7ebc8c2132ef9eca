"""The commands `dinov2 collections ...`, which list, create, copy, export and otherwise manage collections."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from cli.shared import (
    DATA,
    DataDirOption,
    EngineOption,
    JsonOption,
    ModelOption,
    PoolingOption,
    StoreOption,
    artifact_with,
    fail,
    load_model,
    opened_store,
    run_async,
    run_with,
    settings_for,
)
from model.pooling import DEFAULT_POOLING, Pooling
from service.search.kinds import Kind, kinds_with  # this module has only a table, so its import is cheap

if TYPE_CHECKING:
    from service.search.store import CollectionInfo, SnapshotInfo, SnapshotStore, StatsStore, VectorStore
    from service.search.transfer import Copied
    from service.settings import Settings

app = typer.Typer(no_args_is_help=True, help="List, create, copy, export and manage collections.")

NameArgument = Annotated[str, typer.Argument(help="Name or alias of the collection.")]
TagOption = Annotated[str | None, typer.Option(help="Tag of the vectors, as `dinov2 collections show` prints it.")]


@app.command("list")
def list_(data_dir: DataDirOption = DATA, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List collections and their aliases."""

    async def work(vectors: "VectorStore", _: "Settings") -> list[dict[str, Any]]:
        aliases = await vectors.aliases()
        return [
            described(info) | {"aliases": sorted(alias for alias, name in aliases.items() if name == info.name)}
            for info in await vectors.collections()
        ]

    rows = run_with(store, data_dir, work)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max([10, *(len(row["name"]) for row in rows)])
    typer.echo(f"{'name':<{width}}  {'items':>10}  {'dim':>5}  {'model':<8}  {'pooling':<8}  aliases")
    for row in rows:
        fingerprint, _, rest = row["tag"].partition("/")
        numbers = f"{row['count']:>10}  {row['dimension']:>5}"
        made_by = f"{fingerprint[:8]:<8}  {rest.partition('/')[0]:<8}"
        damaged = ["(damaged)"] if row.get("damaged") else []
        typer.echo(f"{row['name']:<{width}}  {numbers}  {made_by}  {', '.join([*row['aliases'], *damaged])}")


@app.command()
def show(name: NameArgument, data_dir: DataDirOption = DATA, store: StoreOption = None) -> None:
    """Print a collection's name, number of items and settings as JSON."""

    async def work(vectors: "VectorStore", _: "Settings") -> dict[str, Any]:
        return described(await vectors.info(name))

    typer.echo(json.dumps(run_with(store, data_dir, work), indent=2))


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name of the new collection.")],
    pooling: PoolingOption = None,
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="Number format in which the vectors are stored.")
    ] = "float32",
    kind: Annotated[Kind, typer.Option(help="Kind of the index. auto chooses it by the number of items.")] = "auto",
    m: Annotated[int | None, typer.Option(help=f"Only {kinds_with('m')}: number of neighbours of a node.")] = None,
    ef_construction: Annotated[
        int | None,
        typer.Option(help=f"Only {kinds_with('ef_construction')}: number of candidates per node in the build."),
    ] = None,
    n_lists: Annotated[int | None, typer.Option(help=f"Only {kinds_with('n_lists')}: number of cells.")] = None,
    target_recall: Annotated[
        float, typer.Option(help="Share of the ten nearest items that a search should find.")
    ] = 0.98,
    indexed: Annotated[list[str] | None, typer.Option(help="Metadata key to index for filters. Repeatable.")] = None,
    originals: Annotated[bool, typer.Option(help="Store the images as well as their vectors.")] = False,
    tag: TagOption = None,
    dimension: Annotated[int | None, typer.Option(help="Dimension of the vectors; requires --tag.")] = None,
    model: ModelOption = "auto",
    engine: EngineOption = "auto",
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
) -> None:
    """Create an empty collection for the vectors of a local model, or for other vectors with --tag and --dimension."""
    if (tag is None) != (dimension is None):
        raise fail("--tag and --dimension must be given together")

    async def work(vectors: "VectorStore", _: "Settings") -> "CollectionInfo":
        from service.search.specs import check_spec
        from service.search.store import CollectionSpec, IndexSpec

        choice = IndexSpec(kind, m, ef_construction, n_lists, target_recall)
        spec = CollectionSpec("?", 1, dtype, choice, tuple(sorted(set(indexed or ()))), originals)
        check_spec(spec)  # before a model may be downloaded
        if tag is not None and dimension is not None:
            made_by, width = tag, dimension
        else:
            made_by, width = _vectors_of(model, engine, pooling or DEFAULT_POOLING, data_dir)
        return await vectors.create(name, replace(spec, tag=made_by, dimension=width))

    typer.echo(json.dumps(described(run_with(store, data_dir, work, makes=True)), indent=2))


@app.command()
def drop(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
) -> None:
    """Delete a collection with all its items. Its snapshots remain."""

    async def work(vectors: "VectorStore", _: "Settings") -> "CollectionInfo":
        info = await vectors.info(name)
        if not yes:
            typer.confirm(f"Drop {info.name} with its {info.count} items?", abort=True)
        await vectors.drop(name)
        return info

    info = run_with(store, data_dir, work)
    typer.echo(f"dropped {info.name}, {info.count} items")


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="The alias.")],
    collection: Annotated[str | None, typer.Argument(help="Collection that the alias should point to.")] = None,
    remove: Annotated[bool, typer.Option("--drop", help="Remove the alias.")] = False,
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
) -> None:
    """Point an alias at a collection in one atomic step, or remove the alias."""
    if remove == (collection is not None):
        raise fail("give either the collection that the alias should point to, or --drop")

    async def work(vectors: "VectorStore", _: "Settings") -> str:
        if collection is None:
            await vectors.drop_alias(name)
            return f"dropped {name}"
        before = await vectors.set_alias(name, collection)
        return f"{name} -> {collection}{f' (was {before})' if before else ''}"

    typer.echo(run_with(store, data_dir, work))


@app.command()
def snapshot(
    name: NameArgument,
    only_list: Annotated[
        bool, typer.Option("--list", help="List the existing snapshots instead of taking a snapshot.")
    ] = False,
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
) -> None:
    """Take a snapshot of a collection, or list its snapshots."""

    async def work(vectors: "VectorStore", _: "Settings") -> "list[SnapshotInfo]":
        keeper = cast("SnapshotStore", able(vectors, "snapshots"))
        return await keeper.snapshots(name) if only_list else [await keeper.snapshot(name)]

    for kept in run_with(store, data_dir, work):
        typer.echo(f"{kept.name}  {kept.created}  {kept.count} items  {kept.bytes} bytes")


@app.command()
def restore(
    name: Annotated[str, typer.Argument(help="Name of the collection in the snapshot.")],
    kept: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Name of the snapshot; `snapshot --list` shows it.")],
    new: Annotated[str | None, typer.Option("--as", help="Name of the restored collection. Default: NAME.")] = None,
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
) -> None:
    """Create a collection from a snapshot, under a name that no collection has yet. To replace a collection, restore
    its snapshot under a new name, and then point an alias at the new collection."""

    async def work(vectors: "VectorStore", _: "Settings") -> "CollectionInfo":
        return await cast("SnapshotStore", able(vectors, "snapshots")).restore(new or name, name, kept)

    info = run_with(store, data_dir, work, makes=True)
    typer.echo(f"restored {info.name}, {info.count} items")


@app.command()
def stats(name: NameArgument, data_dir: DataDirOption = DATA, store: StoreOption = None) -> None:
    """Print statistics about a collection's index as JSON."""

    async def work(vectors: "VectorStore", _: "Settings") -> dict[str, Any]:
        return await cast("StatsStore", able(vectors, "stats")).stats(name)

    typer.echo(json.dumps(run_with(store, data_dir, work), indent=2, default=str))


@app.command()
def copy(
    name: NameArgument,
    from_store: Annotated[str | None, typer.Option(help="Store to copy from, in the form of --store.")] = None,
    to_store: Annotated[str | None, typer.Option(help="Store to copy to, in the form of --store.")] = None,
    new: Annotated[str | None, typer.Option("--as", help="Name of the copy. Default: NAME.")] = None,
    to_originals: Annotated[
        str | None,
        typer.Option(
            help="Folder or s3://... address where the target service stores images. Default: as in the local settings."
        ),
    ] = None,
    data_dir: DataDirOption = DATA,
) -> None:
    """Copy a collection and its stored images to another store, or under another name. To resume an interrupted copy,
    run the command again."""
    if from_store == to_store and new is None:
        raise fail("a copy within one store needs another name: give --as")

    async def work() -> "Copied":
        from service.originals import Originals
        from service.search.transfer import copy_collection

        source_settings, target_settings = settings_for(from_store, data_dir), settings_for(to_store, data_dir)
        kept = Originals(source_settings.originals_place), Originals(to_originals or target_settings.originals_place)
        async with opened_store(source_settings) as source:
            total = (await source.info(name)).count
            with shown("copying", total) as advance:
                if from_store == to_store:
                    return await copy_collection(source, source, name, new, originals=kept, advance=advance)
                async with opened_store(target_settings) as target:
                    return await copy_collection(source, target, name, new, originals=kept, advance=advance)

    done = run_async(work())
    typer.echo(f"{done.written} copied, {done.present} already there -> {new or name}, {done.count} items")
    if done.photos is None:
        return
    images = done.photos
    missing = f", {images.missing} not stored at the source" if images.missing else ""
    typer.echo(f"images: {images.copied} copied, {images.present} already there{missing}")
    if images.unreadable:
        many = "1 image was" if images.unreadable == 1 else f"{images.unreadable} images were"
        typer.echo(f"{many} left out because of a read error at the source: {images.reason}", err=True)
        raise typer.Exit(code=1)


@app.command("export")
def export(
    name: NameArgument,
    out: Annotated[Path, typer.Option(help="File to write: .parquet, .npz or .jsonl.")],
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
) -> None:
    """Write a collection's vectors, metadata and tag (which identifies the model) to a file."""

    async def work(vectors: "VectorStore", _: "Settings") -> int:
        from service.search.transfer import check_format, export_collection

        check_format(out)
        if not out.parent.is_dir():
            raise ValueError(f"{out}: the folder {out.parent} does not exist")
        with shown("exporting", (await vectors.info(name)).count) as advance:
            return await export_collection(vectors, name, out, advance=advance)

    typer.echo(f"{run_with(store, data_dir, work)} items -> {out}")


@app.command("import")
def import_(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help=".parquet, .npz or .jsonl file in the form that `export` writes.")
    ],
    collection: Annotated[
        str, typer.Option("--collection", "-c", help="Name of the collection; created if it does not exist.")
    ],
    tag: TagOption = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="Fingerprint of the local model that made the vectors, instead of --tag.")
    ] = None,
    pooling: PoolingOption = None,
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
) -> None:
    """Add the items of a file to a collection. Existing items with the same ids are replaced."""

    async def work(vectors: "VectorStore", _: "Settings") -> "Copied":
        from service.search.transfer import import_collection

        made_by = tag
        if fingerprint is not None:
            if tag is not None:
                raise ValueError("give --tag or --fingerprint, not both")
            made_by = _tag_of(fingerprint, pooling or DEFAULT_POOLING, data_dir)
        with shown("importing", None) as advance:
            return await import_collection(vectors, collection, path, tag=made_by, advance=advance)

    done = run_with(store, data_dir, work, makes=True)
    typer.echo(f"{done.written} imported -> {collection}, {done.count} items")


# ---- helpers


def described(info: "CollectionInfo") -> dict[str, Any]:
    """Return a collection's name, number of items and settings, for JSON output."""
    damaged = {"damaged": True} if info.is_damaged else {}
    return {"name": info.name, "count": info.count, **asdict(info.spec), **damaged}


def able(store: "VectorStore", capability: str) -> object:
    """Return `store` if it has the capability, such as "snapshots". The caller casts the result to the protocol that
    declares this capability's methods.

    Raises:
        ValueError: the store does not have the capability.
    """
    if capability not in store.capabilities:
        raise ValueError(
            f"this vector store does not support {capability}; it supports {', '.join(sorted(store.capabilities))}"
        )
    return store


def _vectors_of(model: str, engine: str, pooling: Pooling, data_dir: Path) -> tuple[str, int]:
    """Return the tag and the dimension of the vectors that a local model computes with this engine and pooling.

    The model is loaded only if the engine's precision on this host cannot be known otherwise.
    """
    from model.artifact import read_manifest
    from model.engines.choice import known_precision
    from model.pooling import width
    from service.artifact_choice import choose_artifact
    from service.tags import make_tag

    precision = known_precision(engine)
    if precision is None:
        artifact, loaded = load_model(model, engine, None, data_dir, None)
        manifest, precision = artifact.manifest, loaded.precision
    else:
        manifest = read_manifest(choose_artifact(model, data_dir))
    tag = make_tag(manifest.fingerprint, pooling, manifest.input_size, precision)
    return tag, width(pooling, manifest.config.embed_dim)


def _tag_of(fingerprint: str, pooling: str, data_dir: Path) -> str:
    """Return the tag of the vectors that a local model computes in float32 with this pooling.

    The tag contains the model's fingerprint, the pooling, the input size and the precision.

    Raises:
        ValueError: no local model has a fingerprint that begins with `fingerprint`.
    """
    from model.artifact import read_manifest
    from service.tags import make_tag

    path = artifact_with(fingerprint, data_dir)
    if path is None:
        raise ValueError(f"no local model has the fingerprint {fingerprint!r} (see `dinov2 models`): give --tag")
    manifest = read_manifest(path)
    return make_tag(manifest.fingerprint, pooling, manifest.input_size, "fp32")


@contextmanager
def shown(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar during the `with` block, and yield a function that advances it by a number of items.

    The bar is shown only if stderr is a terminal.
    """
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)

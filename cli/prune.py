"""`dinov2 index FOLDER --prune`: remove the items whose file no longer exists, after asking the user."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from cli.shared import find_collection

if TYPE_CHECKING:
    from service.ingest.folders import Place
    from service.ingest.index import IndexReport
    from service.ingest.prune import Sources
    from service.search.store import VectorStore

_BATCH = 1000  # items that are removed in one call


def folders_to_prune(sources: list[str], id_by: str) -> "list[tuple[Place, str]]":
    """Return the file system and path of each source, all of which must be folders.

    Raises:
        ValueError: a source is not a folder, or the ids are hashes, so an item may stand for several files.
        OSError: a source cannot be read.
    """
    from service.ingest.prune import find_folders

    if id_by == "sha256":
        raise ValueError("--prune needs --id path: with --id sha256, one item may stand for several files")
    return find_folders(sources)


async def prune_items(
    vectors: "VectorStore",
    collection: str,
    folders: "Sequence[tuple[Place, str]]",
    found: "Sources",
    report: "IndexReport",
    yes: bool,
) -> None:
    """Remove the items whose file no longer exists. Unless `yes` is true, ask the user first.

    Nothing is removed after an interrupted run. Nothing is removed from a folder in which no image was found, because
    the folder may not be mounted. After the user's answer, the files are looked for again.
    """
    from service.ingest.prune import gone_items, has_images

    info = await find_collection(vectors, collection)
    if info is None:
        return
    if report.interrupted:
        typer.echo("nothing was removed: the run was interrupted", err=True)
        return
    empty = [place.address(path) for place, path in folders if not has_images(place, path, found)]
    for address in empty:
        typer.echo(f"nothing was removed from {address}: no image was found, so it may not be mounted", err=True)
    if len(empty) == len(folders):
        return
    gone = [item_id async for item_id in gone_items(vectors, collection, folders, found)]
    if gone and not yes:
        first = ", ".join(gone[:3]) + (" and others" if len(gone) > 3 else "")
        if not typer.confirm(f"Remove {len(gone)} of {info.count} items, whose files no longer exist ({first})?"):
            gone = []
        else:
            still_gone = {item_id async for item_id in gone_items(vectors, collection, folders, found)}
            gone = [item_id for item_id in gone if item_id in still_gone]
    removed = 0
    for start in range(0, len(gone), _BATCH):
        removed += await vectors.delete(collection, gone[start : start + _BATCH])
    typer.echo(f"{removed} removed from {collection}, because their files no longer exist")

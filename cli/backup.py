"""The commands `dinov2 backup` and `dinov2 restore`, for all collections with their aliases and images."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cli.collection import able
from cli.shared import DATA, DataDirOption, StoreOption, artifact_with, fail, readable_artifacts, run_with

if TYPE_CHECKING:
    from service.backup import Saved, SavedArtifact
    from service.search.store import CollectionInfo, SnapshotStore, VectorStore
    from service.search.transfer import Photos
    from service.settings import Settings


def backup(
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder for the backup. If it contains an older backup, only the images that are missing there are "
            "copied, and the older backup is replaced at the end."
        ),
    ],
    images: Annotated[
        bool, typer.Option(help="Copy the stored images too. Turn this off if you back them up in another way.")
    ] = True,
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
) -> None:
    """Back up all collections with their aliases and stored images. The service may keep running. To resume an
    interrupted backup, run the command again."""

    async def work(vectors: "VectorStore", settings: "Settings") -> "Saved":
        from service.backup import back_up
        from service.originals import Originals

        keeper = cast("SnapshotStore", able(vectors, "snapshots"))
        originals = Originals(settings.originals_place) if images else None
        return await back_up(keeper, originals, _artifacts(settings.data_dir), out, _tell)

    saved = run_with(store, data_dir, work)
    count = sum(one.count for one in saved.contents.collections)
    typer.echo(f"{len(saved.contents.collections)} collections, {count} items, {len(saved.contents.aliases)} aliases")
    _tell_images(saved.images)
    typer.echo(f"-> {out}")
    _exit_if_unreadable(saved.images)


def restore(
    source: Annotated[Path, typer.Argument(metavar="BACKUP", help="Folder that `dinov2 backup` wrote.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace existing collections and aliases that have the same names.")
    ] = False,
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
) -> None:
    """Restore all collections, aliases and stored images from a backup. The service may keep running. All collections
    appear at once, or none if the restore fails."""
    from service.backup import read_contents

    try:
        read_contents(source)  # before a store is created
    except ValueError as error:
        raise fail(error) from error

    async def work(vectors: "VectorStore", settings: "Settings") -> "tuple[list[CollectionInfo], Photos]":
        from service.backup import restore as restore_backup
        from service.errors import Conflict
        from service.originals import Originals

        keeper = cast("SnapshotStore", able(vectors, "snapshots"))
        originals = Originals(settings.originals_place)
        try:
            return await restore_backup(keeper, originals, source, replace=replace, report=_tell)
        except Conflict as error:
            flag = "" if replace else "; --replace replaces collections with collections, and aliases with aliases"
            raise ValueError(f"{error.detail}{flag}") from error

    restored, copied = run_with(store, data_dir, work, makes=True)
    for info in restored:
        typer.echo(f"restored {info.name}, {info.count} items")
    _tell_images(copied)
    for fingerprint in sorted({info.tag.partition("/")[0] for info in restored}):
        if artifact_with(fingerprint, data_dir) is None:
            names = ", ".join(info.name for info in restored if info.tag.startswith(fingerprint))
            typer.echo(
                f"no local model has the fingerprint {fingerprint[:8]}, which made the vectors of {names}", err=True
            )
    _exit_if_unreadable(copied)


def _artifacts(data_dir: Path) -> "list[SavedArtifact]":
    """Return the names and fingerprints of the local and bundled artifacts. Unreadable ones are left out."""
    from service.backup import SavedArtifact

    return [
        SavedArtifact(name=path.name, fingerprint=manifest.fingerprint)
        for path, manifest in readable_artifacts(data_dir)
    ]


def _tell(line: str) -> None:
    """Print a line about the current step if standard error is a terminal."""
    if sys.stderr.isatty():
        typer.echo(line, err=True)


def _tell_images(images: "Photos") -> None:
    missing = f", {images.missing} not stored" if images.missing else ""
    typer.echo(f"images: {images.copied} copied, {images.present} already there{missing}")


def _exit_if_unreadable(images: "Photos") -> None:
    """If images could not be read, print their number and raise typer.Exit with status 1."""
    if images.unreadable:
        many = "1 image was" if images.unreadable == 1 else f"{images.unreadable} images were"
        typer.echo(f"{many} left out because of a read error: {images.reason}", err=True)
        raise typer.Exit(code=1)

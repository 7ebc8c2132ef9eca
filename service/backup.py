"""Backs up all collections, their aliases and their stored images to a folder, and restores them.

    OUT/backup.json                 what the backup contains; written last, in one step
    OUT/snapshots/NAME/TIME.sqlite3 one snapshot for each collection
    OUT/originals/                  the images to which the items of these snapshots refer
    OUT/state/                      copies of the databases of models, API keys and jobs, if they exist

The service may run during a backup. Each snapshot is consistent: it contains its collection as it was at one moment.
Two collections may be from different moments. The images are copied after the snapshot that refers to them. They still
exist then, unless an operator erases them in between (`service/erasure.py`). Such images are counted as not stored.

A backup to the folder of an older backup copies only the images that are missing there. The older backup stays complete
until `backup.json` is replaced. An interrupted backup can therefore be run again. A restore is atomic: it restores all
collections or none.

`restore` does not restore `state/`, because the running service uses these databases: see deploy/RUNBOOK.md. Artifacts
(exported models) are not copied, because they can be large and never change. `backup.json` lists them.
"""

import asyncio
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.files import lock_file, publish, write_text
from model.messages import in_words
from service.errors import CollectionNotFound, StorageFailed
from service.originals import Originals
from service.search import snapshots
from service.search.store import CollectionInfo, SnapshotStore
from service.search.transfer import Photos, copy_photos

CONTENTS: Final = "backup.json"
SNAPSHOTS: Final = "snapshots"
ORIGINALS: Final = "originals"
STATE: Final = "state"
_DATABASES: Final = ("models.sqlite3", "keys.sqlite3", "jobs/jobs.sqlite3")  # in the data folder
_LAST: Final = "last-backup.json"  # in the store's folder
_LOCK: Final = ".lock"
_WRITES: Final = 2  # of the bytes of a snapshot during a restore

Report = Callable[[str], object]
"""A function that is called with one line about the current step."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SavedCollection(_Record):
    """One collection in a backup. `file` is relative to the backup's folder."""

    name: str
    file: str = Field(pattern=r"^snapshots/[a-z0-9][a-z0-9_-]{0,63}/[0-9TZ.]+\.sqlite3$")
    count: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tag: str
    originals: bool  # whether its images are in the backup


class SavedArtifact(_Record):
    """An artifact that the data folder contained. It is not in the backup."""

    name: str
    fingerprint: str


class Contents(_Record):
    """The content of a backup's `backup.json`."""

    format_version: Literal[1] = 1
    created: str  # ISO 8601, UTC
    collections: list[SavedCollection]
    aliases: dict[str, str]
    artifacts: list[SavedArtifact]


@dataclass(frozen=True)
class Saved:
    """The result of a backup: its contents, and how many images were copied, already there, missing or unreadable."""

    contents: Contents
    images: Photos


async def back_up(
    store: SnapshotStore,
    originals: Originals | None,
    artifacts: Sequence[SavedArtifact],
    out: Path,
    report: Report = lambda _: None,
) -> Saved:
    """Write a backup of all collections to the folder `out`, which is created if missing.

    Args:
        originals: the storage of the images, or None to leave them out.
        artifacts: the artifacts to list in `backup.json`.

    Raises:
        ValueError: the folder contains something other than a backup, or a damaged one, or another backup to it is
            running.
        StorageFailed: a file cannot be written, for example because the disk is full.
    """
    _check_folder(out)
    lock = lock_file(out / _LOCK)
    if lock is None:
        raise ValueError(f"another backup to {out} is running")
    with lock:
        for path in (out / SNAPSHOTS).glob("*/.*"):  # temporary files of a process that was killed
            path.unlink()
        return await _back_up(store, originals, artifacts, out, report)


async def _back_up(
    store: SnapshotStore, originals: Originals | None, artifacts: Sequence[SavedArtifact], out: Path, report: Report
) -> Saved:
    saved, images = [], Photos()
    target = Originals(out / ORIGINALS)
    try:
        for info in await store.collections():
            report(f"collection {info.name}: {info.count} items")
            try:
                path = await store.snapshot_to(info.name, out / SNAPSHOTS)
            except CollectionNotFound:  # dropped since the list was made
                continue
            one = await asyncio.to_thread(_described, out, path, originals is not None)
            saved.append(one)
            if originals is not None and one.originals:
                report(f"images of {info.name}")
                await _copy_images(path, originals, target, images)
    finally:
        await target.close()
    await asyncio.to_thread(_copy_state, store.folder, out / STATE)
    names = {one.name for one in saved}
    aliases = {alias: name for alias, name in (await store.aliases()).items() if name in names}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    contents = Contents(created=now, collections=saved, aliases=aliases, artifacts=list(artifacts))
    write_text(out / CONTENTS, contents.model_dump_json(indent=2) + "\n")
    kept = {out / one.file for one in saved}
    for path in (out / SNAPSHOTS).glob("*/*.sqlite3"):  # of the older backup, or of an interrupted one
        if path not in kept:
            path.unlink()
    if not images.unreadable:
        _note(store.folder, contents.created, out, report)
    return Saved(contents, images)


def _copy_state(data_dir: Path, target: Path) -> None:
    """Copy the databases of models, keys and jobs to the folder `target`. Each copy is consistent, although other
    processes may write to the database.

    Raises:
        StorageFailed: a database cannot be read, or its copy cannot be written.
    """
    for name in _DATABASES:
        source, path = data_dir / name, target / name
        if not source.is_file():
            path.unlink(missing_ok=True)  # of an older backup
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.unlink(missing_ok=True)
        try:
            with closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=30)) as db:
                db.execute("VACUUM INTO ?", (str(new),))
            new.chmod(0o600)  # the keys' digests are nobody else's business
            publish(new, path)
        except (OSError, sqlite3.Error) as error:
            raise StorageFailed(f"{source} cannot be copied to {path}: {error}") from error


def _note(folder: Path, created: str, out: Path, report: Report) -> None:
    """Write to the store's folder when the last complete backup was made. The backup is usable without this note."""
    try:
        write_text(folder / _LAST, json.dumps({"created": created, "folder": str(out)}) + "\n")
    except OSError as error:
        report(f"{folder / _LAST} cannot be written, so metrics show an older backup as the last one: {error}")


def last_backup(data_dir: Path) -> float | None:
    """Return the time of the last complete backup of the collections in this data folder, in seconds since 1970. Return
    None if there was no backup, or if the note about it is damaged."""
    try:
        note = json.loads((data_dir / _LAST).read_bytes())
        return datetime.fromisoformat(note["created"]).timestamp()
    except (OSError, ValueError, TypeError, KeyError):
        return None


async def restore(
    store: SnapshotStore, originals: Originals, source: Path, *, replace: bool = False, report: Report = lambda _: None
) -> tuple[list[CollectionInfo], Photos]:
    """Restore all collections and aliases from the backup in the folder `source`, and copy its images.

    The images are copied first, so that no restored item refers to an image that is not there yet. Then all
    collections and aliases appear at once. If the restore fails, the copied images stay. They must not be deleted,
    because the service may have stored items with the same images meanwhile.

    Args:
        replace: whether to replace existing collections and aliases that have the same names.

    Raises:
        Conflict: a collection or alias with one of the names exists, and `replace` is False. This is also raised if
            a collection in the backup has the name of an existing alias, or an alias that of an existing collection.
        ValueError: the folder contains no backup, or a file of the backup is damaged or missing.
        InvalidRequest: a snapshot is damaged.
        StorageFailed: a disk has not enough free space, or a file cannot be written.
    """
    contents = read_contents(source)
    for one in contents.collections:
        report(f"checking {one.file}")
        await asyncio.to_thread(_check, source, one)
    files = {one.name: source / one.file for one in contents.collections}
    images = Photos()
    kept = Originals(source / ORIGINALS)
    try:
        await _check_space(store, originals, contents, kept)
        for one in contents.collections:
            if one.originals:
                report(f"images of {one.name}")
                await _copy_images(files[one.name], kept, originals, images)
        report(f"{len(files)} collections")
        return await store.restore_files(files, contents.aliases, replace=replace), images
    finally:
        await kept.close()


async def _check_space(store: SnapshotStore, originals: Originals, contents: Contents, kept: Originals) -> None:
    """Check that the disks have enough free space for a restore. The store writes each snapshot twice: first to its
    write-ahead log, then to its database.

    Raises:
        StorageFailed: a disk has not enough free space.
    """
    needs = {store.folder: _WRITES * sum(one.bytes for one in contents.collections)}
    if originals.folder is not None and any(one.originals for one in contents.collections):
        size = await kept.missing_bytes(originals)
        needs[originals.folder] = needs.get(originals.folder, 0) + size
    await asyncio.to_thread(_check_free, needs)


def _check_free(needs: Mapping[Path, int]) -> None:
    """Raise StorageFailed if a disk has not enough free space. `needs` maps folders to numbers of bytes. Folders on the
    same disk share its space."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needs.items():
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        device = place.stat().st_dev
        first, total = disks.get(device, (place, 0))
        disks[device] = first, total + size
    for place, needed in disks.values():
        free = shutil.disk_usage(place).free
        if needed > free:
            raise StorageFailed(
                f"the restore needs {needed} bytes on the disk of {place}, but only {free} bytes are free; nothing was "
                "restored"
            )


def read_contents(source: Path) -> Contents:
    """Read the `backup.json` in the folder `source`.

    Raises:
        ValueError: the folder contains no backup, or the file is damaged.
    """
    path = source / CONTENTS
    try:
        return Contents.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{source} contains no backup: {CONTENTS}: {error.strerror}") from error
    except ValidationError as error:
        raise ValueError(f"{path}: not the description of a backup: {in_words(error)}") from error


def _check_folder(out: Path) -> None:
    """Create the folder `out`, or check that it is empty or contains a backup, which may be incomplete.

    Raises:
        ValueError: the folder contains something else, or its `backup.json` is damaged.
    """
    if (out / CONTENTS).exists():
        read_contents(out)
        return
    out.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in out.iterdir() if path.name not in (SNAPSHOTS, ORIGINALS, STATE, _LOCK))
    if others:
        raise ValueError(
            f"{out} contains {others[0]} but no {CONTENTS}: give a new or empty folder, or that of a backup"
        )


def _described(out: Path, path: Path, with_images: bool) -> SavedCollection:
    row, pages = snapshots.read(path)
    pages.close()
    return SavedCollection(
        name=path.parent.name,
        file=path.relative_to(out).as_posix(),
        count=row.count,
        bytes=path.stat().st_size,
        sha256=_sha256(path),
        tag=row.spec.tag,
        originals=row.spec.originals and with_images,
    )


def _check(source: Path, one: SavedCollection) -> None:
    path = source / one.file
    try:
        size, found = path.stat().st_size, _sha256(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if (size, found) != (one.bytes, one.sha256):
        raise ValueError(
            f"{path} is damaged: it has {size} bytes and sha256 {found}, but the backup had {one.bytes} bytes and "
            f"{one.sha256}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def _copy_images(snapshot: Path, source: Originals, target: Originals, images: Photos) -> None:
    """Copy the images to which the items in a snapshot refer, and count them in `images`.

    Raises:
        StorageFailed: an image cannot be written to the target.
    """
    pages = await asyncio.to_thread(snapshots.references, snapshot)
    try:
        while (page := await asyncio.to_thread(next, pages, None)) is not None:
            await copy_photos(page, source, target, images)
    finally:
        pages.close()

"""Write a curated dataset: tar shards or lists, and the files that describe them, byte for byte the same each time.

All files are first completed in the folder `.writing`, which readers ignore, and then renamed to their final names. A
killed run continues with the shards that are complete, and shards that have not changed since an earlier run are used
again. docs/decisions/0060-curated-datasets.md explains the layout.
"""

import errno
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from model.files import publish, sync, write_bytes
from model.folder import walk
from training.curate.croissant import CROISSANT, describe
from training.curate.manifest import MANIFEST, write_manifest
from training.curate.outcome import Outcome, check_apart, data_digest
from training.curate.table import Images, Indices
from training.curate.tars import ReadBytes, Shard, WriteSettings, plan_shards, write_shard
from training.data.curated import (
    CURATION,
    FORMAT,
    LIST_SUFFIX,
    PARTS,
    STAGING,
    Curation,
    open_curation,
    read_curation,
)

WriteFile = Callable[[Path], object]
"""Writes a file to a path."""

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(
    outcome: Outcome,
    read_bytes: ReadBytes,
    out: Path,
    settings: WriteSettings,
    further: Mapping[str, WriteFile] = MappingProxyType({}),
    done: Callable[[int], object] = lambda n: None,
) -> str:
    """Write the dataset of an outcome to the folder `out`, and return the digest of its images.

    An older dataset in `out` is replaced. It stays complete until all files of the new one are complete. Another
    process must not write to `out` at the same time.

    Args:
        outcome: the images, and what became of them.
        read_bytes: returns the bytes of an image by its number.
        out: the folder. Files in it with other names are not touched.
        settings: how the dataset is written.
        further: further files of the dataset: for each name the function that writes the file to a path.
        done: called with the number of images that have been written since its last call.

    Raises:
        ValueError: an image has changed since the scan, or cannot be read, or `out` contains other images or tars.
        OSError: the disk is full, or reading or writing failed. Complete shards are kept for the next try.
    """
    check_apart(outcome.images, outcome.train, outcome.held_out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _finish(out)
        _check_alone(out)
        (out / STAGING).mkdir(exist_ok=True)
        digest = _stage(outcome, read_bytes, out, settings, further, done)
        _finish(out)
    except OSError as error:
        if error.errno in _FULL:
            raise _full(error, out) from error
        raise
    return digest


def _check_alone(out: Path) -> None:
    """Raise ValueError if a folder contains images or tars besides those of its dataset: training would use them."""
    old = read_curation(out)
    own = set() if old is None else {str(out / file["name"]) for file in old.files}
    for listed in walk(out):
        is_tar = listed.name.endswith(".tar") and listed.ignored == ".tar"
        if (listed.is_image or is_tar) and listed.path not in own:
            raise ValueError(f"{listed.path} is not part of a curated dataset; choose an empty folder for the dataset")


def _stage(
    outcome: Outcome,
    read_bytes: ReadBytes,
    out: Path,
    settings: WriteSettings,
    further: Mapping[str, WriteFile],
    done: Callable[[int], object],
) -> str:
    """Complete all files of a dataset in the staging folder, and return the digest of its images. See `write`."""
    images, staging = outcome.images, out / STAGING
    parts = dict(zip(PARTS, (outcome.train, outcome.held_out), strict=True))
    digests = {"all": data_digest(images, outcome.kept), **{part: data_digest(images, parts[part]) for part in PARTS}}
    counts = {part: len(indices) for part, indices in parts.items()}
    shards: list[Shard] = []
    if settings.form == "shards":
        shards = [shard for part in PARTS for shard in plan_shards(images, parts[part], part, settings)]
        files = _stage_shards(shards, images, read_bytes, out, done)
    else:
        files = [_stage_list(staging, part, images, parts[part]) for part in PARTS if counts[part]]
        done(len(outcome.kept))
    write_manifest(staging / MANIFEST, outcome, shards)
    about = {"name": settings.name, "description": settings.description, "license": settings.license}
    described = describe(files, _facts_of(staging / MANIFEST), digests["all"], counts, about)
    write_bytes(staging / CROISSANT, _json(described))
    for name, write_file in further.items():
        write_file(staging / name)
        sync(staging / name)
    content = {
        "format": FORMAT,
        "form": settings.form,
        "digests": digests,
        "counts": counts,
        "files": files,
        "extras": [MANIFEST, CROISSANT, *further],
        "sources": list(outcome.sources) if settings.form == "list" else [],
    }
    write_bytes(staging / CURATION, _json(content))
    return digests["all"]


def write_description(out: Path, content: Mapping[str, Any]) -> None:
    """Write `curation.json`, whose content is known, to the folder of a dataset."""
    write_bytes(out / CURATION, _json(content))


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _facts_of(path: Path) -> dict[str, Any]:
    """Flush a file to the disk, and return its name, its size in bytes and its sha256."""
    sync(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256}


def _full(error: OSError, out: Path) -> OSError:
    is_unexplained = error.strerror in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
    reason = f"the disk of {out} is full" if is_unexplained else f"{out}: {error.strerror}"
    return OSError(
        error.errno,
        f"{reason}. An older dataset there is not changed. Make space and run the same command again; it continues "
        "with the shards that are complete",
    )


def _stage_shards(
    shards: Sequence[Shard], images: Images, read_bytes: ReadBytes, out: Path, done: Callable[[int], object]
) -> list[dict[str, Any]]:
    """Complete shards in the staging folder under the digests of their content, and return their descriptions.

    Shards that are complete there, or in the dataset that will be replaced, are not written again.
    """
    staging = out / STAGING
    complete = _complete(out)
    wanted = {shard.digest for shard in shards}
    for path in staging.iterdir():
        if path.name.partition(".")[0] not in wanted or not path.name.endswith(".tar"):
            path.unlink()
    _check_space(out, images, [shard for shard in shards if shard.digest not in complete])
    files = []
    for shard in shards:
        sha256, existing = complete.get(shard.digest, (None, None))
        if sha256 is None:
            unfinished = staging / f"{shard.digest}.part"
            try:
                sha256 = write_shard(unfinished, images, shard.indices, read_bytes)
                publish(unfinished, _staged(staging, shard.digest, sha256))
            finally:
                unfinished.unlink(missing_ok=True)
        elif existing is not None and existing.parent == out:
            _link(existing, _staged(staging, shard.digest, sha256))
        done(len(shard.indices))
        n_bytes = _staged(staging, shard.digest, sha256).stat().st_size
        entry = {"name": shard.name, "bytes": n_bytes, "sha256": sha256, "images": len(shard.indices)}
        files.append({**entry, "content": shard.digest})
    return files


def _staged(staging: Path, digest: str, sha256: str) -> Path:
    return staging / f"{digest}.{sha256}.tar"


def _complete(out: Path) -> dict[str, tuple[str, Path]]:
    """Return the complete shards of the dataset in `out` and of an interrupted run: digest -> sha256 and path."""
    try:
        old = open_curation(out)
    except ValueError:
        old = None  # a damaged dataset is written again
    complete: dict[str, tuple[str, Path]] = {}
    if old is not None and old.form == "shards":
        complete |= {file["content"]: (file["sha256"], out / file["name"]) for file in old.files}
    for path in (out / STAGING).glob("*.*.tar"):
        digest, sha256, _ = path.name.split(".")
        complete[digest] = (sha256, path)
    return complete


def _link(existing: Path, target: Path) -> None:
    """Make `target` another name of an existing file, or a copy of it if the file system has no hard links."""
    try:
        os.link(existing, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK):
            raise
        unfinished = target.with_suffix(".part")
        shutil.copyfile(existing, unfinished)
        publish(unfinished, target)


def _check_space(out: Path, images: Images, shards: Sequence[Shard]) -> None:
    """Raise OSError if the disk has no space for the shards that are still to be written."""
    overhead = 6 * tarfile.BLOCKSIZE  # of an image, its label and its JSON, at most
    needed = sum(int(images.n_bytes[shard.indices].sum()) + overhead * len(shard.indices) for shard in shards)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the dataset needs {needed / 1e6:,.1f} MB, but the disk of {out} has {free / 1e6:,.1f} MB free",
        )


def _stage_list(staging: Path, part: str, images: Images, indices: Indices) -> dict[str, Any]:
    """Write the list of the images of a part to the staging folder, and return its description."""

    def lines() -> Iterator[bytes]:
        for index in indices.tolist():
            sha256 = images.sha256[index].tobytes().hex()
            line = {"key": images.key[index], "sha256": sha256, "label": images.label[index]}
            yield (json.dumps(line, ensure_ascii=False) + "\n").encode()

    path = staging / f"{part}{LIST_SUFFIX}"
    with path.open("wb") as file:
        file.writelines(lines())
    return {**_facts_of(path), "images": len(indices)}


def _finish(out: Path) -> None:
    """Give the files in the staging folder their final names, if all of them are complete.

    `curation.json` is written to the staging folder when they are complete, and renamed last. So if a process was
    killed while it renamed files, the next one renames the others.
    """
    staging = out / STAGING
    new = read_curation(staging)
    if new is None:
        return
    old = read_curation(out)
    for file in new.files:
        staged = staging / file["name"] if new.form == "list" else _staged(staging, file["content"], file["sha256"])
        if staged.exists():
            staged.replace(out / file["name"])
    for name in new.extras:
        if (staging / name).exists():
            (staging / name).replace(out / name)
    sync(out)
    for stale in set() if old is None else _names(old) - _names(new):
        (out / stale).unlink(missing_ok=True)
    (staging / CURATION).replace(out / CURATION)
    sync(out)
    shutil.rmtree(staging)


def _names(curation: Curation) -> set[str]:
    return {file["name"] for file in curation.files}.union(curation.extras)

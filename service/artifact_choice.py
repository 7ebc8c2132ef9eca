"""Find the artifact to serve. An artifact is a folder with an exported model. This module also reads the images on
which engines are checked."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from model.artifact import (
    MANIFEST,
    ArtifactError,
    Manifest,
    check_graphs,
    find_artifacts,
    read_manifest,
    verified_manifest,
    verify_file,
)
from model.files import expanded, publish, waiting_lock, working_folder
from model.zoo import DownloadOptions, Hosts, resolve
from service.generations import Generation, Generations

if TYPE_CHECKING:  # `dinov2 models` imports this module
    import numpy as np
    import numpy.typing as npt

log = logging.getLogger(__name__)

Report = Callable[[str], object]
"""A function that is called with one line about the current step, such as "downloading dinov2_vits14: 23 of 88 MB"."""


def choose_artifact(model: str, data_dir: Path, report: Report = lambda line: None) -> Path:
    """Return the artifact folder that `model` names. If `model` is a published model without a local artifact, the
    model is downloaded and exported first. This needs no torch.

    Args:
        model: "auto" (the model that is live in the data folder; if none is, the newest artifact there, or the bundled
            one if there is none), an artifact folder, the URL of one (s3://bucket/artifact), the name of an artifact in
            the data folder, or the name of a published model.
        data_dir: the data folder. Its subfolder `artifacts` contains the artifacts.
        report: called with the current step of a download or export.

    Raises:
        ValueError: there is no such artifact or model, or its graph differs too much from the reference.
        OSError: the model cannot be downloaded, or a file cannot be written.
    """
    if "://" in model:
        return _fetch(model, data_dir, report)
    local = find_artifacts(data_dir)
    if model == "auto":
        live = Generations(data_dir).live() if Generations.exists(data_dir) else None
        if live is not None:
            return artifact_of(live, data_dir)
        if not local:
            raise ArtifactError(
                f"no artifact in {data_dir / 'artifacts'} and none is bundled: name a folder or a published model"
            )
        return local[0]
    folder = expanded(Path(model))
    if (folder / MANIFEST).is_file():
        return folder
    for path in local:
        if model in (path.name, _name(path)):
            return path
    if folder.exists() or "/" in model.removeprefix("facebook/"):
        why = f"it contains no {MANIFEST}" if folder.exists() else "there is no such folder"
        raise ArtifactError(f"{model} is not an artifact folder: {why}")
    name = resolve(model).name
    for path in local:
        if _name(path) == name:
            return path
    return _export(name, data_dir, report)


def readable_artifacts(data_dir: Path, tell: Callable[[str], object] = log.warning) -> Iterator[tuple[Path, Manifest]]:
    """Yield the path and the manifest of each local artifact and of the bundled one. For an artifact with an unreadable
    manifest, call `tell` with a message."""
    for path in find_artifacts(data_dir):
        try:
            yield path, read_manifest(path)
        except ArtifactError as error:
            tell(str(error))


def artifact_with(fingerprint: str, data_dir: Path, tell: Callable[[str], object] = log.warning) -> Path | None:
    """Return the path of a local or bundled artifact whose fingerprint begins with `fingerprint`, or None if there is
    none. `tell` is that of `readable_artifacts`."""
    for path, manifest in readable_artifacts(data_dir, tell):
        if fingerprint and manifest.fingerprint.startswith(fingerprint):
            return path
    return None


def artifact_of(generation: Generation, data_dir: Path) -> Path:
    """Return the artifact folder of a generation, which may have moved since it was recorded.

    Raises:
        ArtifactError: there is no artifact with its fingerprint.
    """
    if (generation.path / MANIFEST).is_file() and read_manifest(generation.path).fingerprint == generation.fingerprint:
        return generation.path
    path = artifact_with(generation.fingerprint, data_dir)
    if path is None:
        raise ArtifactError(
            f"generation {generation.number} ({generation.name}) is {generation.state}, but its artifact is gone from "
            f"{generation.path}: restore it"
        )
    return path


def read_photo(path: Path, tell: Callable[[str], object] = log.warning) -> "npt.NDArray[np.uint8] | None":
    """Read an image file and return its pixels, uint8 [H, W, 3]. If the file cannot be decoded, call `tell` with a
    message and return None."""
    from model.decode import DecodeError, decode  # loads the packages of all image formats

    try:
        return decode(path.read_bytes())
    except DecodeError as error:
        tell(f"skipped {path}: {error}")
        return None


def read_photos(folder: Path, limit: int, tell: Callable[[str], object] = log.warning) -> "list[npt.NDArray[np.uint8]]":
    """Return the pixels, uint8 [H, W, 3], of up to `limit` images in a folder and its subfolders. The images are spread
    over the sorted list of files, so that they come from several subfolders. For each file that cannot be decoded,
    `tell` is called with a message, and another file is used.

    Raises:
        ValueError: fewer than two images can be decoded.
    """
    from model.folder import walk  # imports model/decode.py too

    paths = [Path(listed.path) for listed in walk(folder) if listed.is_image]
    images: list[npt.NDArray[np.uint8]] = []
    first_pass = paths[:: max(1, len(paths) // limit)]
    for path in [*first_pass, *(path for path in paths if path not in first_pass)]:
        if len(images) == limit:
            break
        if (image := read_photo(path, tell)) is not None:
            images.append(image)
    if len(images) < 2:
        raise ValueError(f"{folder}: comparing engines requires at least two readable images, found {len(images)}")
    return images


def _name(path: Path) -> str | None:
    try:
        return read_manifest(path).name
    except ArtifactError as error:
        log.warning("skipped %s", error)
        return None


def _export(name: str, data_dir: Path, report: Report) -> Path:
    """Download and export a published model, and return its artifact folder.

    A downloaded file is deleted afterwards, because the artifact contains the same weights. A file that was already in
    the folder stays. A lock ensures that several services with the same data folder do this only once.
    """
    from model.export.artifact import export_artifact  # only here, because it imports onnx
    from model.export.checkpoint import read_backbone
    from model.export.options import CheckpointOptions, ExportOptions

    def on_progress(done: int, total: int | None) -> None:
        whole = "" if total is None else f" of {total / 1e6:.0f}"
        report(f"downloading {name}: {done / 1e6:.0f}{whole} MB")

    downloads = data_dir / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    log.info("%s is not in %s: it is downloaded and exported once", name, data_dir / "artifacts")
    with waiting_lock(downloads / f"{name}.lock", lambda: report(f"waiting for another process that exports {name}")):
        for path in find_artifacts(data_dir):
            if _name(path) == name:  # exported by the other process
                return path
        files = [downloads / source.filename for source in resolve(name).sources(Hosts())]
        placed = [file for file in files if file.exists()]
        try:
            options = CheckpointOptions(download=DownloadOptions(downloads, on_progress=on_progress))
            backbone = read_backbone(name, options)
            report(f"exporting {name}: writing the graph and comparing it with a reference")
            artifact = export_artifact(backbone, data_dir / "artifacts", ExportOptions())
        except ValueError as error:
            if not placed:
                _delete(files)
                raise
            raise ValueError(f"{error}. To download the weights again, delete {placed[0]}") from error
        if not placed:
            _delete(files)
    for record in artifact.manifest.parity:
        log.info(
            "%s agrees with %s: the largest error is %.1e on %d images",
            record.file,
            record.reference,
            record.max_abs_error,
            record.images,
        )
    return artifact.path


def _delete(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _fetch(url: str, data_dir: Path, report: Report) -> Path:
    """Copy an artifact from a URL of fsspec, such as `s3://bucket/artifact`, and return its local folder.

    The local folder has the name and the fingerprint of the artifact in its name. If it exists, nothing is copied. The
    hash of every file, the fingerprint and the graphs are checked before the folder gets its name.

    Raises:
        ValueError: the URL's scheme is unknown or needs a package that is not installed, or a file is damaged or does
            not belong to the model.
        OSError: a file cannot be read or written.
    """
    import fsspec

    try:
        remote, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: cannot be opened: {error}") from error
    root, artifacts = root.rstrip("/"), data_dir / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    with working_folder(artifacts, ".copying-") as temporary:
        folder = temporary / "artifact"
        folder.mkdir()
        (folder / MANIFEST).write_bytes(remote.cat_file(f"{root}/{MANIFEST}"))
        manifest = read_manifest(folder)
        target = artifacts / f"{manifest.name}-{manifest.fingerprint[:8]}"
        if target.exists():
            if read_manifest(target).fingerprint != manifest.fingerprint:
                raise ArtifactError(f"{target} is another artifact than {url}: rename it or delete it")
            return target
        for file, record in manifest.files.items():
            if record.derived and not remote.exists(f"{root}/{file}"):
                continue
            report(f"copying {file} ({record.bytes / 1e6:.0f} MB) from {url}")
            remote.get_file(f"{root}/{file}", str(folder / file))
            verify_file(folder / file, record)
        check_graphs(folder, verified_manifest(folder))
        publish(folder, target)
    return target

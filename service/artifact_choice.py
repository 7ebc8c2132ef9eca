"""Find the artifact to serve. An artifact is a folder with an exported model. This module also reads the images on
which engines are checked."""

import logging
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.artifact import MANIFEST, ArtifactError, find_artifacts, read_manifest
from model.decode import DecodeError, decode
from model.zoo import resolve

log = logging.getLogger(__name__)


def choose_artifact(model: str, data_dir: Path) -> Path:
    """Return the artifact folder that `model` names. If `model` is a published model without a local artifact, the
    model is downloaded and exported first.

    Args:
        model: "auto" (the newest artifact in the data folder, or the bundled one if there is none), an artifact folder,
            the name of an artifact in the data folder, or the name of a published model.
        data_dir: the data folder. Its subfolder `artifacts` contains the artifacts.

    Raises:
        ValueError: there is no such artifact or model, or the model cannot be exported, for instance because torch is
            not installed.
    """
    local = find_artifacts(data_dir)
    if model == "auto":
        if not local:
            raise ArtifactError(
                f"no artifact in {data_dir / 'artifacts'} and none is bundled: name a folder or a published model"
            )
        return local[0]
    folder = Path(model)
    if (folder / MANIFEST).is_file():
        return folder
    for path in local:
        if model in (path.name, _name(path)):
            return path
    if folder.exists() or "/" in model.removeprefix("facebook/"):
        raise ArtifactError(f"{model} is not an artifact folder: it contains no {MANIFEST}")
    name = resolve(model).name
    for path in local:
        if _name(path) == name:
            return path
    return _export(name, data_dir)


def read_photo(path: Path, tell: Callable[[str], object] = log.warning) -> npt.NDArray[np.uint8] | None:
    """Read an image file and return its pixels, uint8 [H, W, 3]. If the file cannot be decoded, call `tell` with a
    message and return None."""
    try:
        return decode(path.read_bytes())
    except DecodeError as error:
        tell(f"skipped {path}: {error}")
        return None


def read_photos(folder: Path, limit: int, tell: Callable[[str], object] = log.warning) -> list[npt.NDArray[np.uint8]]:
    """Return the pixels, uint8 [H, W, 3], of up to `limit` images in a folder and its subfolders. The images are spread
    over the sorted list of files, so that they come from several subfolders. For each file that cannot be decoded,
    `tell` is called with a message, and another file is used.

    Raises:
        ValueError: fewer than two images can be decoded.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
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


def _export(name: str, data_dir: Path) -> Path:
    """Export a published model and return its artifact folder. The export runs in a separate process (`dinov2 export`),
    because it needs torch. This process also downloads the weights."""
    if find_spec("torch") is None:
        raise ValueError(
            f"{name} must be exported once, which requires torch: pip install 'dinov2-service[train]', or export it on "
            f"another machine (dinov2 export {name} --out artifacts) and copy it to {data_dir / 'artifacts'}"
        )
    target = (data_dir / "artifacts").resolve()
    command = [sys.executable, "-m", "cli", "export", name, "--out", str(target)]
    log.info("exporting %s into %s", name, target)
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, check=False)  # noqa: S603  resolve() knows the name
    if done.returncode:
        raise ValueError(f"the export of {name} failed (exit status {done.returncode}); see the error message above")
    exported = [path for path in find_artifacts(data_dir) if _name(path) == name]
    if not exported:
        raise ValueError(f"the export of {name} wrote no artifact to {target}")
    return exported[0]

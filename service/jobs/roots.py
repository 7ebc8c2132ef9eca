"""Which data and models a job may read.

A job reads the files that its parameters name, so a client could have any file of the machine read. Data must be below
one of the roots (setting `job_roots`, by default the folder `datasets` in the data folder), or be the dataset of a
curation job. Models must be published models, or in the data folder, or below a root. Links are resolved first. A link
*inside* a folder of images is followed, so whoever may write to a root decides what jobs can read.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from model.files import expanded
from model.loading import published
from service.settings import Settings

_PATTERN: Final = re.compile(r"[*?\[\]{}]")
_RANGE: Final = re.compile(r"\{\d+\.\.\d+\}")
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_RUN, _DATASET = "run", "dataset"


@dataclass(frozen=True)
class Roots:
    """The folders (absolute, without links) and the URLs (ending with a slash) below which jobs may read."""

    folders: tuple[Path, ...]
    urls: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join([*map(str, self.folders), *self.urls])

    def contain(self, path: Path) -> bool:
        """Return whether a path without links is a root or below one."""
        return any(path == root or root in path.parents for root in self.folders)


def roots_of(settings: Settings) -> Roots:
    """Return the roots of the settings."""
    texts = [text.strip() for text in (settings.job_roots or str(settings.data_dir / "datasets")).split(",")]
    folders = [expanded(Path(text)).resolve() for text in texts if text and "://" not in text]
    urls = [f"{text.rstrip('/')}/" for text in texts if "://" in text]
    return Roots(tuple(folders), tuple(urls))


def data_source(text: str, settings: Settings) -> str:
    """Return the absolute path or the URL of training data, after all links are resolved.

    Args:
        text: the id of a curation job (its dataset), a folder, a tar file, a pattern of tar files, or a URL. A relative
            path is searched below each root.
        settings: the settings with the roots.

    Raises:
        ValueError: the data is not below a root. The message does not tell whether it exists.
    """
    roots = roots_of(settings)
    if re.match(r"[a-z][a-z0-9+.-]*:", text, re.IGNORECASE):
        _check_url(text, roots)
        return text
    _check_length(text)
    if re.fullmatch(_NAME, text):
        jobs = settings.data_dir.absolute() / "jobs"
        dataset = (jobs / text / _DATASET).resolve()
        if dataset.is_dir() and Roots((jobs.resolve(),), ()).contain(dataset):
            return str(dataset)
    paths = [_resolved(start) for start in _candidates(text, roots.folders)]
    allowed = [path for path in paths if roots.contain(path)]
    if allowed:
        return str(next((path for path in allowed if path.exists()), allowed[0]))
    raise ValueError(f"data {text[:200]!r} is not below a folder from which jobs may read: {roots} (DINOV2_JOB_ROOTS)")


def _resolved(start: Path) -> Path:
    """Return an absolute path without links. If its last part is a pattern of files, only the folder is resolved.

    Raises:
        ValueError: another part is a pattern, which could lead to any folder.
    """
    if start.exists() or not _PATTERN.search(str(start)):
        return start.resolve()
    if _PATTERN.search(str(start.parent)) or ".." in _RANGE.sub("", start.name):
        raise ValueError(f"data {str(start)[:200]!r}: only the last part of a path may be a pattern")
    return start.parent.resolve() / start.name


def model_source(text: str, settings: Settings) -> str:
    """Return a model that a job may read: the name of a published model, or an absolute path without links.

    Args:
        text: the name of a published model, the name of an artifact in the data folder, the id of a training job (its
            run), or the path of a checkpoint, run or artifact in the data folder or below a root.
        settings: the settings with the data folder and the roots.

    Raises:
        ValueError: the model is none of these.
    """
    _check_length(text)
    data_dir = settings.data_dir.absolute()
    folders = [data_dir / "artifacts", data_dir / "jobs"]
    allowed = Roots((*(folder.resolve() for folder in folders), *roots_of(settings).folders), ())
    if re.fullmatch(_NAME, text):
        for path in (folders[0] / text, folders[1] / text / _RUN):
            if path.exists() and allowed.contain(path.resolve()):
                return str(path.resolve())
    if published(text) is not None:
        return text
    if "://" not in text:
        for start in _candidates(text, allowed.folders):
            path = start.resolve()
            if allowed.contain(path) and path.exists():
                return str(path)
    raise ValueError(
        f"model {text[:200]!r} is neither a published model, nor an artifact or a training job in the data folder, nor "
        f"a path below one of {allowed}"
    )


def _check_length(text: str) -> None:
    """Raise ValueError for a text that is too long for a path, because each access to such a path is an OSError."""
    if len(text.encode()) > 4000 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError(f"{text[:80]!r}... is too long for a path")


def _candidates(text: str, folders: tuple[Path, ...]) -> list[Path]:
    """Return the paths that a text can mean: itself if it is absolute, else below each folder."""
    if "\0" in text or not text:
        raise ValueError(f"{text!r} is not a path")
    path = Path(text)
    return [path] if path.is_absolute() else [folder / path for folder in folders]


def _check_url(text: str, roots: Roots) -> None:
    """Raise ValueError for a URL that is not below a root."""
    parts = _RANGE.sub("", text).replace("\\", "/").split("/")
    below = any(text.startswith(root) for root in roots.urls)
    if not below or any(part in ("..", ".") or "%" in part or "::" in part for part in parts):
        raise ValueError(f"data {text[:200]!r} is not below a URL from which jobs may read: {roots} (DINOV2_JOB_ROOTS)")

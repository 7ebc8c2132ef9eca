"""Decides which files in a folder are images, and which subfolders contain training images and held-out images.

`dinov2 train`, `dinov2 index` and `dinov2 embed` share these rules, so they use the same files:

- Files and folders whose names begin with a dot are hidden and ignored. Examples are `._a.jpg` and
  `.ipynb_checkpoints/`.
- Links to folders are followed, except a link to a folder that contains the link.
- A file whose suffix is in `IMAGE_SUFFIXES` is an image. If it cannot be decoded, it is reported as failed.
- A file whose suffix is in `OTHER_SUFFIXES` is not an image. It is ignored without being opened.
- Any other file, for example one without a suffix, is an image if its first bytes are those of an image format
  (`model.decode.sniff`).

The same rules apply to the members of an archive. An `Account` counts every file: used, ignored (by kind) or failed.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from model.decode import sniff

_IMAGES = "jpg jpeg jpe jfif pjpeg pjp png apng webp gif bmp dib tif tiff avif heic heif hif"
_TEXT = "txt md rst log csv tsv json jsonl ndjson geojson xml yaml yml toml ini cfg tex bib srt vtt cls url lnk"
_CODE = "html htm css js ts py pyc ipynb sh bat c cc cpp h java go rs sql md5 sha1 sha256"
_DOCUMENTS = "pdf doc docx xls xlsx ppt pptx odt ods rtf svg eps ps ai psd xcf ttf otf woff woff2"
_ARCHIVES = "tar tgz gz bz2 xz zst zip 7z rar iso dmg apk jar dll so exe"
_DATA = "parquet arrow feather tfrecord tfrecords h5 hdf5 mat npy npz pkl pickle db sqlite sqlite3"
_WEIGHTS = "pt pth ckpt safetensors onnx"
_SOUND_AND_VIDEO = "mp3 wav flac ogg m4a aac mp4 m4v mov avi mkv webm mpg mpeg wmv 3gp"
# Cameras' raw images and the files stored next to them. Many raw images begin like a TIFF, but it is only a thumbnail.
_RAW = "dng cr2 cr3 crw nef nrw arw sr2 srf orf rw2 raf pef srw x3f 3fr iiq xmp aae thm"


def _suffixes(*groups: str) -> frozenset[str]:
    return frozenset(f".{suffix}" for group in groups for suffix in group.split())


IMAGE_SUFFIXES: Final = _suffixes(_IMAGES)
OTHER_SUFFIXES: Final = _suffixes(_TEXT, _CODE, _DOCUMENTS, _ARCHIVES, _DATA, _WEIGHTS, _SOUND_AND_VIDEO, _RAW)

HEAD_BYTES: Final = 256
"""The number of bytes at the start of a file that `ignored_as` needs."""

NO_SUFFIX, HIDDEN, SPECIAL = "without suffix", "hidden", "pipes and devices"
HIDDEN_FOLDERS, LOOPS = "hidden folders", "links to a folder above"
_FOLDER_KINDS: Final = (HIDDEN_FOLDERS, LOOPS)

TRAIN: Final = "train"
HELD_OUT: Final = ("val", "validation", "valid", "test")
"""The possible names of the held-out part of a data set, in upper or lower case. If a data set has several parts with
these names, the one whose name is first in this list is used."""

_KINDS_SHOWN: Final = 12
_NAMES_SHOWN: Final = 3
_PROBLEMS_KEPT: Final = 1000


class Listed(NamedTuple):
    """An entry of a folder.

    If the entry is not used, `ignored` is the kind under which it is counted. If it cannot be read, `problem` is the
    reason. A file is an image if both are None.
    """

    path: str
    name: str
    is_folder: bool = False
    ignored: str | None = None
    problem: str | None = None

    @property
    def is_image(self) -> bool:
        return not self.is_folder and self.ignored is None and self.problem is None


def suffix_of(name: str) -> str:
    """Return the suffix of a file name in lower case, for example `.jpg`, or "" if there is none."""
    suffix = posixpath.splitext(name)[1].lower()
    return suffix if len(suffix) > 1 else ""


def ignored_as(name: str, head: Callable[[], bytes]) -> str | None:
    """Return the kind under which a file is ignored, such as `.txt` or `hidden`, or None if the file is an image.

    Args:
        name: the file's name, without its folder.
        head: a function that returns the first `HEAD_BYTES` bytes of the file. It is called only if the name does not
            show whether the file is an image.
    """
    if name.startswith("."):
        return HIDDEN
    suffix = suffix_of(name)
    if suffix in IMAGE_SUFFIXES:
        return None
    if suffix in OTHER_SUFFIXES or sniff(head()) is None:
        return suffix or NO_SUFFIX
    return None


def list_folder(folder: str) -> Iterator[Listed]:
    """Yield every entry of a folder, sorted by name.

    Raises:
        OSError: the folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        try:
            yield _listed(folder, entry)
        except OSError as error:
            yield Listed(entry.path, entry.name, problem=error.strerror or str(error))


def _listed(folder: str, entry: "os.DirEntry[str]") -> Listed:
    """Describe an entry of a folder.

    Raises:
        OSError: the entry cannot be read, for example because it is a link to a missing file.
    """
    path, name = entry.path, entry.name
    if name.startswith("."):
        return Listed(path, name, ignored=HIDDEN_FOLDERS if os.path.isdir(path) else HIDDEN)
    if entry.is_dir():
        is_loop = entry.is_symlink() and _is_above(path, folder)
        return Listed(path, name, ignored=LOOPS) if is_loop else Listed(path, name, is_folder=True)
    if not entry.is_file() and suffix_of(name) not in OTHER_SUFFIXES:
        os.stat(path)  # raises OSError for a link to a missing file
        return Listed(path, name, ignored=SPECIAL)
    return Listed(path, name, ignored=ignored_as(name, lambda: _head(path)))


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def _is_above(link: str, folder: str) -> bool:
    """Return whether a link leads to `folder` or to a folder that contains it."""
    target, logical = os.stat(link), Path(os.path.abspath(folder))
    real = logical.resolve()
    return any(os.path.samestat(target, os.stat(above)) for path in (logical, real) for above in (path, *path.parents))


def walk(folder: str | Path) -> Iterator[Listed]:
    """Yield every file at any depth below a folder, sorted by path component.

    Folders are not yielded, except those that are ignored and those that cannot be listed.
    """
    try:
        entries = list(list_folder(str(folder)))
    except OSError as error:
        name = os.path.basename(folder)
        yield Listed(str(folder), name, is_folder=True, problem=error.strerror or str(error))
        return
    for entry in entries:
        if entry.is_folder:
            yield from walk(entry.path)
        else:
            yield entry


def split_names(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the two names that stand for the training part and the held-out part of a data set, such as `train` and
    `val`, exactly as `names` spells them. Upper and lower case are not distinguished. Return None if either is missing.
    """
    by_name: dict[str, str] = {}
    for name in sorted(names, reverse=True):  # `val` before `Val`
        by_name.setdefault(name.lower(), name)
    held_out = next((by_name[name] for name in HELD_OUT if name in by_name), None)
    return (by_name[TRAIN], held_out) if TRAIN in by_name and held_out is not None else None


def split_folders(folder: Path) -> tuple[Path, Path] | None:
    """Return the two subfolders with the training images and the held-out images, such as `train` and `val`.

    Return None if either is missing.
    """
    names = split_names(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else None
    return None if names is None else (folder / names[0], folder / names[1])


def split_folder(folder: Path, part: str) -> Path:
    """Return the subfolder with the training images if `part` is `train`, or with the held-out images if it is `val`.

    If `split_folders` finds no such subfolders, return `folder / part`, which may not exist.
    """
    folders = split_folders(folder)
    return folder / part if folders is None else folders[part != TRAIN]


def sample_names(member: str) -> list[str]:
    """Return the paths, without suffixes, at which a tar may store the label or metadata of an image.

    `member` is the image's path in the tar. The best match is first: for `cats/2.left.png`, the result is `cats/2.left`
    and `cats/2`. The last one, up to the first dot of the file name, identifies the sample in the WebDataset library.
    """
    folder, slash, file = member.rpartition("/")
    parts = file.split(".")
    return [folder + slash + ".".join(parts[:n]) for n in range(max(1, len(parts) - 1), 0, -1)]


def printable(name: str) -> str:
    """Return a name in which undecodable bytes are escaped, so that it can be logged and stored."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def on_one_line(name: str) -> str:
    """Return a printable name in which control characters are escaped too."""
    return "".join(c if c == " " or c.isprintable() else c.encode("unicode_escape").decode() for c in printable(name))


@dataclass
class Account:
    """The number of files that were used, that were ignored (by kind), and that failed."""

    used: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)  # name and reason of the first failed files
    archives: int = 0

    def fail(self, name: str, reason: str) -> None:
        """Count an image that could not be used, and store its name and the reason."""
        self.failed += 1
        if len(self.problems) < _PROBLEMS_KEPT:
            self.problems.append((name, reason))

    def __str__(self) -> str:
        """Return the account as one line."""
        files = Counter({kind: n for kind, n in self.ignored.items() if kind not in _FOLDER_KINDS})
        ordered = sorted(files.items(), key=lambda row: (-row[1], row[0]))
        kinds = [f"{n} {on_one_line(kind)[:40]}" for kind, n in ordered[:_KINDS_SHOWN]]
        n_others = sum(n for _, n in ordered[_KINDS_SHOWN:])
        kinds += [f"{n_others} of other kinds"] if n_others else []
        names = [on_one_line(name) for name, _ in self.problems[:_NAMES_SHOWN]]
        names += ["others"] if names and self.failed > len(names) else []
        total = self.used + files.total() + self.failed
        folders = [f"; {kind}: {self.ignored[kind]}" for kind in _FOLDER_KINDS if self.ignored[kind]]
        return (
            f"{total} file{'s' * (total != 1)}: {self.used} used, "
            f"{files.total()} ignored{_bracketed(kinds)}, {self.failed} failed{_bracketed(names)}"
            + "".join(folders)
            + (f"; archives: {self.archives}" if self.archives else "")
        )


def _bracketed(texts: list[str]) -> str:
    return f" ({', '.join(texts)})" if texts else ""

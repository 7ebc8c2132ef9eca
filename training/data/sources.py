"""Sources of images: a folder of images, tar shards (local or at a URL), a Hugging Face dataset, a list of images.

`open_source` detects the kind of source from a path or URL, and returns a `training.data.dataset.Source`: numbered
images that any thread can read in any order. A run can therefore shuffle millions of images, and it can be resumed
exactly.
"""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np

from model.folder import HIDDEN, HIDDEN_FOLDERS, LOOPS, printable, split_folders
from training.data.blobs import HTTP_TIMEOUT_S, Blob, file_system, open_blob
from training.data.curated import ListSource, open_curation
from training.data.dataset import Classes, Indices, Skipped, Source, read_file, walk_folder
from training.data.hugging_face import HuggingFaceSource
from training.data.progress import Tally, Tell, progress
from training.data.shards import COMPRESSED, ShardIndex, TarSource, common_folder, is_compressed, load_index, unpacked

MAX_BRACES = 1_000_000
INDEXING_THREADS = 8
"""The number of shards that are indexed at the same time, each by a thread. The threads mostly wait for servers."""


# Folders


class FolderSource:
    """A source of the images in a folder and its subfolders at any depth, sorted by path.

    `model/folder.py` decides which files are images. The label of an image is the name of the folder that directly
    contains it. If the folder has a subfolder `train` and one for held-out images, such as `val` or `test`, `parts`
    maps `train` and `val` to the numbers of the images in these two subfolders. Other images are in neither part.

    Raises:
        ValueError: the folder does not exist, a subfolder cannot be listed, or there are no images in the folder or in
            one of these two subfolders.
    """

    def __init__(self, folder: Path, tally: Tally | None = None) -> None:
        tally = tally or Tally()
        self._folder = folder
        start = len(os.path.join(folder, ""))
        self._paths: list[str] = []
        self.skipped: list[Skipped] = []
        self.ignored: Counter[str] = Counter()
        for listed in walk_folder(folder):
            if listed.ignored is not None:
                self.ignored[listed.ignored] += 1
            elif listed.problem is not None:
                self.skipped.append(Skipped(printable(Path(listed.path[start:]).as_posix()), listed.problem))
            else:
                self._paths.append(listed.path[start:])
                tally.images += 1
        if not self._paths:
            raise ValueError(f"no images below {folder}")
        self.parts: Mapping[str, Indices] = {}
        self._undivided = {""}  # folders whose images have no class
        if (folders := split_folders(folder)) is not None:
            self._undivided |= {subfolder.name for subfolder in folders}
            tops = np.array([path.partition(os.sep)[0] for path in self._paths])
            named = zip(("train", "val"), folders, strict=True)
            self.parts = {part: np.flatnonzero(tops == subfolder.name) for part, subfolder in named}
            for items, subfolder in zip(self.parts.values(), folders, strict=True):
                if not len(items):
                    raise ValueError(f"no images below {subfolder}, although {folders[0]} and {folders[1]} exist")

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return printable(Path(self._paths[index]).as_posix())

    def label(self, index: int) -> str | None:
        path = self._folder / self._paths[index]
        return printable(path.parent.name)

    def classes(self) -> Classes:
        """Return the classes of all images. The class of an image is the folder that directly contains it.

        Images directly in the source's folder, or directly in its folders of training images and held-out images, have
        no class: the name of such a folder says nothing about the content of an image.
        """
        numbers, by_name = np.empty(len(self), np.int32), dict[str, int]()
        previous, number = None, -1
        for index, path in enumerate(self._paths):
            folder = path.rpartition(os.sep)[0]
            if folder != previous:
                previous, name = folder, printable(folder.rpartition(os.sep)[2])
                number = -1 if folder in self._undivided else by_name.setdefault(name, len(by_name))
            numbers[index] = number
        return Classes(numbers, list(by_name))

    def encoded(self, index: int) -> bytes:
        """Return the bytes of an image's file. The errors are the same as in `dataset.read_file`."""
        return read_file(self._folder / self._paths[index])

    def fingerprint(self, index: int) -> str:
        try:
            return str((self._folder / self._paths[index]).stat().st_size)
        except OSError as error:
            return type(error).__name__

    def version(self, index: int) -> str:
        try:
            path = self._folder / self._paths[index]
            status = path.stat()
        except OSError as error:
            return type(error).__name__
        denied = "" if os.access(path, os.R_OK) else " denied"  # so that a file is read again after a chmod
        return f"{status.st_size} {status.st_mtime_ns}{denied}"


# Choosing the source


def expand_braces(pattern: str) -> list[str]:
    """Expand the braces in a pattern, and return all resulting names.

    For example, `a-{00..02}.tar` gives a-00.tar, a-01.tar and a-02.tar, and `{x,y}.tar` gives x.tar and y.tar. If the
    pattern has several pairs of braces, the result has all combinations, and the last pair varies fastest.

    Raises:
        ValueError: a range counts down, or there are more than a million names.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if not first <= last < first + MAX_BRACES:
            raise ValueError(f"{pattern}: {{{match[1]}}} must count up, over at most {MAX_BRACES} numbers")
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(first, last + 1)]
    else:
        choices = match[1].split(",")
    rests = expand_braces(pattern[match.end() :])
    if len(choices) * len(rests) > MAX_BRACES:
        raise ValueError(f"{pattern} expands to more than {MAX_BRACES} files")
    return [pattern[: match.start()] + choice + rest for choice in choices for rest in rests]


def _path_of(url: str) -> str:
    """Return a URL without its query, which may contain a signature. A local path is returned unchanged."""
    return url.partition("?")[0] if "://" in url else url


def _is_tar(name: str) -> bool:
    stem = name.lower()
    return stem.endswith((".tar", ".tgz")) or any(stem.endswith(".tar" + suffix) for suffix in COMPRESSED)


def _open_shards(
    urls: Sequence[str],
    index_dir: Path,
    spec: str,
    tally: Tally,
    others: Mapping[str, int] | None = None,
) -> TarSource:
    """Open tar shards as a source. `others` counts the other files in the folder of the shards, by kind."""
    client = httpx.Client(follow_redirects=True, timeout=HTTP_TIMEOUT_S)
    tally.all_shards += len(urls)

    def index(url: str, name: str) -> tuple[str, Blob, ShardIndex]:
        blob = open_blob(url, client)
        if is_compressed(_path_of(url)):
            blob = unpacked(blob)
        return name, blob, load_index(blob, name, index_dir)

    shards = []
    with ThreadPoolExecutor(INDEXING_THREADS) as pool:
        for shard in pool.map(index, urls, _relative_names(urls)):
            shards.append(shard)
            tally.shards += 1
            tally.images += len(shard[2].names)
    source = TarSource(shards, others)
    if not len(source):
        problems = "".join(f"; {item.name}: {item.reason}" for item in source.skipped[:1])
        raise ValueError(f"no images in {spec}{problems or _listed_kinds(source.ignored)}")
    return source


def _relative_names(urls: Sequence[str]) -> list[str]:
    """Return short names of shards for logs and digests: their URLs without the leading folders that all share."""
    plain = [_path_of(url) for url in urls]
    start = common_folder(plain)
    return [printable(url[start:]) for url in plain]


def _remote_shards(url: str) -> list[str]:
    """Return the URLs of the tar files that `url` stands for.

    If `url` is a pattern, they are the files that match it. If it is a folder, they are all tar files in it. Otherwise
    `url` is the only one.
    """
    if _is_tar(_path_of(url)) and "*" not in url:
        return [url]
    if url.startswith(("http://", "https://")):
        raise ValueError(f"{url}: over HTTP, name the shards: .../name.tar or .../name-{{000..123}}.tar")
    system, path = file_system(url)
    try:
        matches = system.glob(path) if "*" in path else system.find(path)
    except Exception as error:  # botocore, gcsfs and others have no common class of errors
        raise OSError(f"{url}: {str(error) or type(error).__name__}") from error
    return [str(system.unstrip_protocol(name)) for name in sorted(matches) if _is_tar(name)]


def _listed_kinds(ignored: Mapping[str, int]) -> str:
    """Return the end of an error message about missing images: which other files there are."""
    kinds = ", ".join(f"{n} {printable(kind)}" for kind, n in Counter(ignored).most_common(5))
    return f"; it contains other files ({kinds})" if kinds else "; it is empty"


def _other_files(folder: Path) -> Counter[str]:
    """Count the files in a folder that are neither images nor tar shards, by kind."""
    ignored = (listed for listed in walk_folder(folder) if listed.ignored is not None)
    return Counter(
        str(listed.ignored)
        for listed in ignored
        if listed.ignored in (HIDDEN, HIDDEN_FOLDERS, LOOPS) or not _is_tar(listed.name)
    )


def _local_shards(path: Path) -> list[str]:
    if path.is_dir():
        visible = (listed for listed in walk_folder(path) if listed.ignored not in (HIDDEN, HIDDEN_FOLDERS, LOOPS))
        return [listed.path for listed in visible if _is_tar(listed.name)]
    return sorted(glob.glob(str(path))) if "*" in path.name and not path.exists() else [str(path)]


def address_of(spec: str | Path) -> str:
    """Return the URL or the local path of a source, without `file://`."""
    text = re.sub(r"^([a-z][a-z0-9+]+):/(?!/)", r"\1://", str(spec))  # pathlib removes one of the two slashes of a URL
    return re.sub(r"^file://", "", text)


def shard_urls(address: str) -> list[str]:
    """Return the URLs or local paths of the tar shards that a URL, or a path or pattern of tar files, stands for.

    They need not exist. See `address_of` for the form of the address.

    Raises:
        ValueError: it stands for no tar shards.
        OSError: a server failed.
    """
    is_url = "://" in address
    parts = expand_braces(address) if is_url or not Path(address).exists() else [address]
    urls = [url for part in parts for url in (_remote_shards(part) if is_url else _local_shards(Path(part)))]
    if not urls:
        raise ValueError(f"no tar shards at {address}: their names must end in .tar")
    return urls


def open_source(spec: str | Path, index_dir: Path, tally: Tally | None = None) -> Source:
    """Open the source of images at a path or URL, and return it.

    Args:
        spec: a folder of images; a tar, a folder of tars or a pattern of tars (`name-{000..123}.tar`, `name-*.tar`),
            local or as a URL (s3://, gs://, http://, ...); a folder written by `save_to_disk` of the library
            `datasets`; or a folder written by `dinov2 curate`. If a folder has both images and tars, only the images
            are used.
        index_dir: folder in which the indices of tars are stored, so that a resumed run does not have to read all tar
            headers again.
        tally: counter of the images that have been found so far.

    Raises:
        ValueError: `spec` does not name anything that can be used; the message gives the reason.
        OSError: a server or a disk failed.
    """
    tally = tally or Tally()
    text = address_of(spec)
    if "://" in text:
        return _open_shards(shard_urls(text), index_dir, text, tally)
    path = Path(text)
    curation = open_curation(path)
    if curation is not None and curation.form == "list":
        return ListSource(path, curation, lambda address: open_source(address, index_dir, tally))
    if (path / "dataset_dict.json").is_file() or all((path / f).is_file() for f in ("dataset_info.json", "state.json")):
        return HuggingFaceSource(path)
    if path.is_dir() and any(listed.is_image for listed in walk_folder(path)):
        return FolderSource(path, tally)
    shards = [
        shard for part in ([text] if path.exists() else expand_braces(text)) for shard in _local_shards(Path(part))
    ]
    others = _other_files(path) if path.is_dir() else Counter()
    if path.is_dir() and not shards:
        raise ValueError(
            f"nothing to train on in {path}: it has no images at any depth, no tar shards (.tar), and no Hugging Face "
            f"dataset of save_to_disk (dataset_info.json or dataset_dict.json){_listed_kinds(others)}"
        )
    missing = [shard for shard in shards if not Path(shard).is_file()]
    if missing or not shards:
        raise ValueError(f"{missing[0] if missing else text} does not exist; data must be a folder, a .tar or a URL")
    wrong = [shard for shard in shards if not _is_tar(shard)]
    if wrong:
        advice = "unpack it first; " if wrong[0].lower().endswith((".zip", ".7z", ".rar")) else ""
        raise ValueError(
            f"{wrong[0]} is not a tar; {advice}data must be a folder of images, .tar shards, or a Hugging Face dataset"
        )
    return _open_shards([Path(shard).as_posix() for shard in shards], index_dir, text, tally, others)


def source_digest(source: Source, *, contents: bool, tell: Tell | None = None) -> str:
    """Compute a sha256 of a source's images, in order. A resumed run uses it to check that its images are the same.

    If `contents` is true, all images are read, and the digest covers their names and contents; an unreadable image
    counts as empty. Otherwise the digest covers the names and the sizes in bytes, so it does not change if an image is
    edited without changing its size. Labels are never covered. `tell` shows the progress.
    """
    digest, n_done = hashlib.sha256(), 0
    with progress(
        tell,
        lambda: f"computing the checksum of {len(source):,} images, {100 * n_done / len(source):.0f} %",
        lambda: n_done / len(source),
    ):
        for index in range(len(source)):
            digest.update(source.name(index).encode() + b"\0")
            if contents:
                try:
                    data = source.encoded(index)
                except ValueError:
                    data = b""
                digest.update(hashlib.sha256(data).digest())
            else:
                digest.update(source.fingerprint(index).encode() + b"\0")
            n_done = index + 1
    return digest.hexdigest()

"""The published backbones: their names, their addresses, and a verified download.

Names and addresses are those of facebookresearch/dinov2 (`dinov2/hub/backbones.py`, README, MODEL_CARD), which
publishes no checksums. A hash is listed here only if it was computed from the real file. timm's and Hugging Face's
names refer to the same weights and are accepted as aliases, but the downloaded file is always Meta's.

An interrupted download is resumed with an HTTP range request. If the server's file has changed, the download starts
again. The size and the hash of a file are checked before it gets its final name. A lock ensures that two processes
download the same file only once. During a download, the cache folder contains `<file>.part` and
`<file>.part.validator`. An empty file `<file>.lock` remains afterwards.

This module does not import torch.
"""

import difflib
import errno
import hashlib
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from model.files import lock_file, publish

logger = logging.getLogger(__name__)

BASE_URL = "https://dl.fbaipublicfiles.com/dinov2"
DEFAULT_CACHE_DIR = Path.home() / ".cache" / "dinov2-service" / "weights"
MAX_ATTEMPTS = 4
"""The number of failed attempts in a row after which a download stops.

If an attempt receives data before it fails, the count starts again with this attempt.
"""


class DownloadError(RuntimeError):
    """The error raised when weights cannot be downloaded. The message gives the reason and says what to do."""


@dataclass(frozen=True)
class ZooEntry:
    """The entry of one published backbone. `size_bytes` and `sha256` are None if they have not been measured."""

    name: str  # torch hub's name
    timm_name: str
    hf_name: str
    path: str  # relative to BASE_URL
    licence: str = "Apache-2.0"
    size_bytes: int | None = None
    sha256: str | None = None

    @property
    def url(self) -> str:
        return f"{BASE_URL}/{self.path}"

    @property
    def filename(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def aliases(self) -> tuple[str, ...]:
        """The other names of these weights.

        They are the file name without `_pretrain.pth`, and several forms of timm's and Hugging Face's names.
        """
        stem = self.filename.removesuffix("_pretrain.pth")
        timm, hugging_face = self.timm_name.removesuffix(".lvd142m"), self.hf_name.removeprefix("facebook/")
        names = (stem, self.timm_name, f"timm/{self.timm_name}", timm, self.hf_name, hugging_face)
        return tuple(name for name in names if name != self.name)


_SIZES = (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant"))
_MEASURED = {
    "dinov2_vits14": (88_283_115, "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
}


def _entry(letter: str, size: str, registers: bool) -> ZooEntry:
    base, name = f"dinov2_vit{letter}14", f"dinov2_vit{letter}14{'_reg' if registers else ''}"
    size_bytes, sha256 = _MEASURED.get(name, (None, None))
    return ZooEntry(
        name=name,
        timm_name=f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m",
        hf_name=f"facebook/dinov2-{'with-registers-' if registers else ''}{size}",
        path=f"{base}/{base}{'_reg4' if registers else ''}_pretrain.pth",
        size_bytes=size_bytes,
        sha256=sha256,
    )


ENTRIES: dict[str, ZooEntry] = {
    entry.name: entry for registers in (False, True) for entry in (_entry(*size, registers) for size in _SIZES)
}
"""The entries of the eight released backbones by torch hub name."""

_BY_ANY_NAME = {name: entry for entry in ENTRIES.values() for name in (entry.name, *entry.aliases)}


def resolve(name: str) -> ZooEntry:
    """Return the entry of a published backbone by its name in torch hub, timm or Hugging Face. Case does not matter.

    Raises:
        ValueError: the name is unknown. The message suggests similar names and lists the torch hub names.
    """
    entry = _BY_ANY_NAME.get(name.strip().lower())
    if entry is not None:
        return entry
    near = difflib.get_close_matches(name.lower(), _BY_ANY_NAME, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"unknown model {name!r}: {hint}the known names are {', '.join(ENTRIES)}, and their timm and Hugging Face names"
    )


def download(
    entry: ZooEntry,
    cache_dir: Path | str,
    *,
    base_url: str | None = None,
    progress: bool = True,
    retry_wait_s: float = 0.5,
    timeout_s: float = 30.0,
) -> Path:
    """Download the weights file of a published backbone unless it is in the cache, and return its path.

    Args:
        entry: the backbone's entry, as returned by `resolve`.
        cache_dir: the folder that stores the file. It is created if missing.
        base_url: the address of a mirror with the same paths as `BASE_URL`. If None, `BASE_URL` is used.
        progress: whether to show a progress bar on stderr if stderr is a terminal.
        retry_wait_s: the wait before the first retry in seconds. It doubles with each further attempt without data.
        timeout_s: the time limit in seconds for connecting and for each read.

    Returns:
        The path of the file. If the entry has a size and a hash, the file matches them.

    Raises:
        DownloadError: the network failed, the server returned an error, the file has the wrong size or hash, or the
            disk is full. The message says what to do.
        OSError: the folder cannot be created or written.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    target = cache_dir / entry.filename
    url = entry.url if base_url is None else f"{base_url.rstrip('/')}/{entry.path}"
    with _locked(target.with_name(f"{target.name}.lock"), entry.name):
        if target.exists():
            _check_file(target, entry, remedy=f"delete {target} to download it again")
            return target
        try:
            with _bar(progress) as bar:
                part = _Part(target, entry, url, bar, bar.add_task(entry.filename, total=entry.size_bytes))
                part.fetch(retry_wait_s, timeout_s)
        except (DownloadError, httpx.HTTPError, httpx.InvalidURL) as error:
            raise DownloadError(_by_hand(entry, url, target, error)) from error
    return target


def _by_hand(entry: ZooEntry, url: str, target: Path, error: Exception) -> str:
    reason = str(error) or type(error).__name__
    expected = f" ({entry.size_bytes} bytes, sha256 {entry.sha256})" if entry.sha256 is not None else ""
    return (
        f"cannot download {entry.name} from {url}: {reason}. To download it manually, run `curl -fLO {url}` on a "
        f"machine with access and put the file at {target}{expected}"
    )


def _bar(progress: bool) -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not (progress and console.is_terminal))


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Hold the lock of one download. If another process holds the lock, wait for it."""
    file = lock_file(path)
    if file is None:
        logger.info("%s: waiting for another process to download it", name)
        file = lock_file(path, wait=True)
    assert file is not None
    with file:
        yield


def _check_file(path: Path, entry: ZooEntry, remedy: str) -> None:
    size = path.stat().st_size
    if entry.size_bytes is not None and size != entry.size_bytes:
        raise DownloadError(f"{path} has {size} bytes instead of {entry.size_bytes}: {remedy}")
    if entry.sha256 is None:
        return
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != entry.sha256:
        raise DownloadError(f"{path} has sha256 {actual} instead of {entry.sha256}: {remedy}")


class _Part:
    """A partial download.

    It consists of a file with the bytes received so far, and a file that identifies the version of the server's file.
    """

    def __init__(self, target: Path, entry: ZooEntry, url: str, bar: Progress, task: TaskID) -> None:
        self.target, self.entry, self.url = target, entry, url
        self.path = target.with_name(f"{target.name}.part")
        self.validator = target.with_name(f"{target.name}.part.validator")
        self._bar, self._task = bar, task

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.validator.unlink(missing_ok=True)

    def fetch(self, retry_wait_s: float, timeout_s: float) -> None:
        """Download the file with retries, check it, and rename it to its final name.

        Raises:
            DownloadError, httpx.HTTPError: the download failed.
        """
        resumed = self._size() > 0
        fruitless = 0
        with httpx.Client(follow_redirects=True, timeout=timeout_s) as client:
            while True:
                before = self._size()
                try:
                    self._attempt(client)
                    break
                except (httpx.TransportError, _TryAgainError) as error:
                    fruitless = 1 if self._size() > before else fruitless + 1
                    if fruitless >= MAX_ATTEMPTS:
                        raise
                    logger.warning("%s: %s; trying again", self.url, error or type(error).__name__)
                    time.sleep(retry_wait_s * 2 ** (fruitless - 1))
            try:
                _check_file(self.path, self.entry, remedy="the server's file is not the published one")
            except DownloadError:
                self._discard()
                if not resumed:
                    raise
                logger.warning("%s: the resumed file is wrong; downloading it again from the start", self.url)
                self._attempt(client)
                _check_file(self.path, self.entry, remedy="the server's file is not the published one")
        self._finish()

    def _attempt(self, client: httpx.Client) -> None:
        """Send one request and write the response to the partial file.

        If the server confirms that its file has not changed, the response is appended. Otherwise the response replaces
        the bytes received before.
        """
        headers = {"Accept-Encoding": "identity"}
        have = self._size()
        if have and self.validator.exists():
            headers |= {"Range": f"bytes={have}-", "If-Range": self.validator.read_text()}
        with client.stream("GET", self.url, headers=headers) as response:
            status = response.status_code
            if status == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                if response.headers.get("Content-Range") == f"bytes */{have}":
                    return  # complete: the last attempt ended between the last byte and the rename
                self._discard()
                raise _TryAgainError("the server's file is shorter than the partial download")
            if status >= 500 or status == httpx.codes.TOO_MANY_REQUESTS:
                raise _TryAgainError(f"the server returned {status} {response.reason_phrase}")
            if status == httpx.codes.PARTIAL_CONTENT:
                if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    self._discard()
                    raise _TryAgainError("the server sent a different range than requested")
            elif status == httpx.codes.OK:
                have = 0
            else:
                raise DownloadError(f"the server returned {status} {response.reason_phrase}")
            self._write(response, have)

    def _write(self, response: httpx.Response, have: int) -> None:
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        if total is not None:
            if self.entry.size_bytes not in (None, total):
                raise DownloadError(
                    f"the server's file has {total} bytes instead of {self.entry.size_bytes}: not the published file"
                )
            free = shutil.disk_usage(self.path.parent).free
            if free < total - have:
                raise DownloadError(f"{total - have} bytes are needed, but only {free} are free in {self.path.parent}")
        if have == 0:
            self._discard()
        self._bar.update(self._task, completed=have, total=total)
        try:
            if have == 0:
                self._remember_version(response)
            with self.path.open("ab" if have else "wb") as file:
                for chunk in response.iter_raw():  # written as received, so an interruption loses nothing
                    file.write(chunk)
                    self._bar.advance(self._task, len(chunk))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._discard()  # a full disk would affect other programs
            raise DownloadError(f"the disk is full: {self.path.parent}") from error
        if total is not None and self._size() != total:
            raise _TryAgainError(f"{self._size()} of {total} bytes arrived")

    def _remember_version(self, response: httpx.Response) -> None:
        """Store the response's strong ETag or Last-Modified date, which identifies the version of the server's file.

        If the response has neither, an interrupted download starts again, because parts of two versions must not be
        joined.
        """
        etag = response.headers.get("ETag", "")
        validator = "" if etag.startswith("W/") else etag or response.headers.get("Last-Modified", "")
        if validator:
            self.validator.write_text(validator)

    def _finish(self) -> None:
        publish(self.path, self.target)
        self.validator.unlink(missing_ok=True)
        if self.entry.sha256 is None:
            logger.info("%s: only the length was checked, because no hash is published", self.target)


class _TryAgainError(DownloadError):
    """The error of a failed attempt that is worth repeating."""

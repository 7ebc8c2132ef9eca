"""The verified download of a published backbone (`model/zoo.py`).

Meta's file is tried first. If it cannot be downloaded, Hugging Face's file, which contains the same tensors, is
downloaded instead.

An interrupted download is resumed with an HTTP range request. If the server's file has changed, the download starts
over. Before a file gets its final name, its size and its hash are checked if they are known. Hugging Face sends the
hash of its file. If the hash of Meta's file is not known, the checksums inside the file are checked instead. A lock
ensures that two processes download the same file only once. During a download, the cache folder contains `<file>.part`
and `<file>.part.validator`. An empty file `<file>.lock` remains afterwards.

This module does not import torch.
"""

import errno
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import httpx
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from safetensors import SafetensorError, safe_open

from model.files import publish, waiting_lock
from model.torch_file import TorchFileError, read_torch_file
from model.zoo import DEFAULT_DOWNLOAD, DownloadError, DownloadOptions, Hosts, OnProgress, Source, ZooEntry

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
"""The number of failed attempts in a row after which a download stops.

If an attempt receives data before it fails, the count starts again with this attempt.
"""

_WAITING: Final = "%s: waiting for another process to download it"
REPORT_S: Final = 10.0  # seconds between two log lines about a download


def download(
    entry: ZooEntry, options: DownloadOptions = DEFAULT_DOWNLOAD, *, retry_wait_s: float = 0.5, timeout_s: float = 30.0
) -> Path:
    """Download a weights file of a published backbone unless one is in the cache, and return its path.

    Args:
        entry: the backbone's entry, as returned by `resolve`.
        options: the servers, the cache folder, and a function to which the progress is reported. In addition, the
            progress is shown in a bar if stderr is a terminal, or else logged every `REPORT_S` seconds.
        retry_wait_s: the number of seconds to wait before the first retry. The wait doubles after each attempt that
            received no data.
        timeout_s: the time limit in seconds for connecting and for each read.

    Returns:
        The path of the complete file. Its size and its hash have been checked if they are known.

    Raises:
        DownloadError: the network failed, the servers returned errors, the file has the wrong size, hash or content, or
            the disk is full. The message says what to do.
        OSError: the folder cannot be created or written.
    """
    cache_dir, sources = options.cache_dir, entry.sources(options.hosts or Hosts.from_environment())
    cache_dir.mkdir(parents=True, exist_ok=True)
    with waiting_lock(cache_dir / f"{entry.filename}.lock", lambda: logger.info(_WAITING, entry.name)):
        for source in sources:
            target = cache_dir / source.filename
            if target.exists():
                _check_file(target, source.size_bytes, source.sha256, remedy=f"delete {target} to download it again")
                return target
        reasons = []
        for source in sources:
            try:
                with _Reporter(source.filename, options.on_progress) as reporter:
                    part = _Part(cache_dir / source.filename, source, reporter)
                    part.fetch(retry_wait_s, timeout_s)
                return part.target
            except (DownloadError, httpx.HTTPError, httpx.InvalidURL) as error:
                reasons.append(f"{source.url}: {str(error) or type(error).__name__}")
                logger.warning("cannot download %s", reasons[-1])
    raise DownloadError(_by_hand(entry, sources[0], cache_dir, reasons))


def downloaded_source(entry: ZooEntry, options: DownloadOptions) -> Source:
    """Return the source of the file that `download` returned for these arguments."""
    sources = entry.sources(options.hosts or Hosts.from_environment())
    return next(source for source in sources if (options.cache_dir / source.filename).exists())


def _by_hand(entry: ZooEntry, source: Source, cache_dir: Path, reasons: Sequence[str]) -> str:
    expected = f" ({source.size_bytes} bytes, sha256 {source.sha256})" if source.sha256 is not None else ""
    return (
        f"cannot download {entry.name} from {'; nor from '.join(reasons)}. To download it manually, run `curl -fLO "
        f"{source.url}` on a machine with access and put the file at {cache_dir / source.filename}{expected}"
    )


class _Reporter:
    """Reports the progress of one download: calls `on_progress`, and shows a progress bar or logs messages.

    The bar is shown if stderr is a terminal. Otherwise, messages are logged.
    """

    def __init__(self, name: str, on_progress: OnProgress | None) -> None:
        self._name, self._on_progress = name, on_progress
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(name, total=None)
        self._logged_at = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int | None) -> None:
        """Report that `done` of `total` bytes have been received."""
        self._bar.update(self._task, completed=done, total=total)
        if self._on_progress is not None:
            self._on_progress(done, total)
        if self._bar.disable and time.monotonic() - self._logged_at > REPORT_S:
            self._logged_at = time.monotonic()
            whole = "" if total is None else f" of {total / 1e6:.0f}"
            logger.info("downloading %s: %.0f%s MB", self._name, done / 1e6, whole)


def _check_file(path: Path, size_bytes: int | None, sha256: str | None, remedy: str) -> None:
    size = path.stat().st_size
    if size_bytes is not None and size != size_bytes:
        raise DownloadError(f"{path} has {size} bytes instead of {size_bytes}: {remedy}")
    if sha256 is not None:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != sha256:
            raise DownloadError(f"{path} has sha256 {actual} instead of {sha256}: {remedy}")
        return
    try:
        if ".pth" in path.suffixes:
            read_torch_file(path)  # checks the checksum of each tensor
        else:
            with safe_open(path, framework="numpy"):  # checks the header and the length
                pass
    except (TorchFileError, SafetensorError) as error:
        raise DownloadError(f"{path}: {error}: {remedy}") from error


class _Part:
    """A partial download.

    It consists of a file with the bytes received so far, and a file that identifies the version of the server's file.
    """

    def __init__(self, target: Path, source: Source, reporter: _Reporter) -> None:
        self.target, self.source, self.url = target, source, source.url
        self.path = target.with_name(f"{target.name}.part")
        self.validator = target.with_name(f"{target.name}.part.validator")
        self._reporter = reporter
        self._sha256 = source.sha256

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.validator.unlink(missing_ok=True)

    def fetch(self, retry_wait_s: float, timeout_s: float) -> None:
        """Download the file with retries, check it, and rename it to its final name.

        If the check fails, the file is downloaded once more from the start.

        Raises:
            DownloadError, httpx.HTTPError: the download failed.
        """
        with httpx.Client(follow_redirects=True, timeout=timeout_s) as client:
            self._receive(client, retry_wait_s)
            try:
                self._check()
            except DownloadError as error:
                logger.warning("%s; downloading it again from the start", error)
                self._receive(client, retry_wait_s)
                self._check()
        publish(self.path, self.target)
        self.validator.unlink(missing_ok=True)

    def _receive(self, client: httpx.Client, retry_wait_s: float) -> None:
        """Receive the rest of the file, with retries.

        The download fails after `MAX_ATTEMPTS` failed attempts in a row. A failed attempt that received data restarts
        the count at 1.
        """
        fruitless = 0
        while True:
            before = self._size()
            try:
                return self._attempt(client)
            except (httpx.TransportError, _TryAgainError) as error:
                fruitless = 1 if self._size() > before else fruitless + 1
                if fruitless >= MAX_ATTEMPTS:
                    raise
                logger.warning("%s: %s; trying again", self.url, error or type(error).__name__)
                time.sleep(retry_wait_s * 2 ** (fruitless - 1))

    def _check(self) -> None:
        """Check the received file, and delete it if it is wrong."""
        try:
            _check_file(
                self.path, self.source.size_bytes, self._sha256, remedy="the server's file is not the published one"
            )
        except DownloadError:
            self._discard()
            raise

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
            self._sha256 = self.source.sha256 or _linked_sha256(response)
            self._write(response, have)

    def _write(self, response: httpx.Response, have: int) -> None:
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        if total is not None:
            if self.source.size_bytes not in (None, total):
                raise DownloadError(
                    f"the server's file has {total} bytes instead of {self.source.size_bytes}: not the published file"
                )
            free = shutil.disk_usage(self.path.parent).free
            if free < total - have:
                raise DownloadError(f"{total - have} bytes are needed, but only {free} are free in {self.path.parent}")
        if have == 0:
            self._discard()
        self._reporter.update(have, total)
        try:
            if have == 0:
                self._remember_version(response)
            with self.path.open("ab" if have else "wb") as file:
                for chunk in response.iter_raw():  # written as received, so an interruption loses nothing
                    file.write(chunk)
                    have += len(chunk)
                    self._reporter.update(have, total)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._discard()  # a full disk would affect other programs
            raise DownloadError(f"the disk is full: {self.path.parent}") from error
        if total is not None and self._size() != total:
            raise _TryAgainError(f"{self._size()} of {total} bytes arrived")

    def _remember_version(self, response: httpx.Response) -> None:
        """Store the response's strong ETag or Last-Modified date, which identifies the version of the server's file.

        If the response has neither, an interrupted download cannot be resumed, because parts of two versions must not
        be joined.
        """
        etag = response.headers.get("ETag", "")
        validator = "" if etag.startswith("W/") else etag or response.headers.get("Last-Modified", "")
        if validator:
            self.validator.write_text(validator)


def _linked_sha256(response: httpx.Response) -> str | None:
    """Return the sha256 that Hugging Face sends with its redirect to a large file, or None if there is none."""
    for answer in (*response.history, response):
        value: str = answer.headers.get("X-Linked-ETag", "").strip('"')
        if re.fullmatch(r"[0-9a-f]{64}", value):
            return value
    return None


class _TryAgainError(DownloadError):
    """The error raised when a download attempt fails but another attempt may succeed."""

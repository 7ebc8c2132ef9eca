"""The published backbones: their names and their addresses.

Names and addresses are those of facebookresearch/dinov2 (`dinov2/hub/backbones.py`, README, MODEL_CARD), which
publishes no checksums. A hash is listed here only if it was computed from the real file. timm's and Hugging Face's
names refer to the same weights and are accepted as aliases. `model/downloads.py` downloads the files.

This module contains only data and is imported by every command, so it imports no package.
"""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

META_URL: Final = "https://dl.fbaipublicfiles.com/dinov2"
HUGGING_FACE_URL: Final = "https://huggingface.co"
DEFAULT_CACHE_DIR = Path.home() / ".cache" / "dinov2-service" / "weights"
OnProgress = Callable[[int, int | None], object]


class DownloadError(OSError):
    """The error raised when weights cannot be downloaded. The message gives the reason and explains what to do."""


@dataclass(frozen=True)
class Hosts:
    """The addresses of the two servers with published weights, or of mirrors with the same paths.

    A server whose address is None is not used.
    """

    meta: str | None = META_URL
    hugging_face: str | None = HUGGING_FACE_URL

    @staticmethod
    def from_environment() -> "Hosts":
        """Return the servers set in `DINOV2_META_URL` and `DINOV2_HUGGING_FACE_URL`, by default the original ones."""
        return Hosts(
            os.environ.get("DINOV2_META_URL") or META_URL,
            os.environ.get("DINOV2_HUGGING_FACE_URL") or HUGGING_FACE_URL,
        )


@dataclass(frozen=True)
class DownloadOptions:
    """Where published weights are downloaded from and stored.

    `cache_dir` is created if missing. During a download, `on_progress` is called with the number of bytes received so
    far and the size of the file in bytes (None if the size is unknown).
    """

    cache_dir: Path = DEFAULT_CACHE_DIR
    hosts: Hosts | None = None  # None means `Hosts.from_environment()`
    on_progress: OnProgress | None = None


DEFAULT_DOWNLOAD: Final = DownloadOptions()


class Source(NamedTuple):
    """A weights file to download. Its `size_bytes` and `sha256` are None if they are not known."""

    url: str
    filename: str
    size_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class ZooEntry:
    """The names and the file of one published backbone. `size_bytes` and `sha256` are None if they are not known."""

    name: str  # torch hub's name
    timm_name: str
    hf_name: str
    path: str  # relative to `Hosts.meta`
    licence: str = "Apache-2.0"
    size_bytes: int | None = None
    sha256: str | None = None

    @property
    def url(self) -> str:
        return f"{META_URL}/{self.path}"

    @property
    def filename(self) -> str:
        return self.path.rpartition("/")[2]

    def sources(self, hosts: Hosts) -> list[Source]:
        """Return the addresses from which the weights can be downloaded, in order of preference."""
        sources = []
        if hosts.meta is not None:
            url = f"{hosts.meta.rstrip('/')}/{self.path}"
            sources.append(Source(url, self.filename, self.size_bytes, self.sha256))
        if hosts.hugging_face is not None:
            url = f"{hosts.hugging_face.rstrip('/')}/{self.hf_name}/resolve/main/model.safetensors"
            sources.append(Source(url, f"{self.hf_name.rpartition('/')[2]}.safetensors"))
        return sources

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
"""The entries of the eight published backbones, keyed by torch hub name."""

_BY_ANY_NAME = {name: entry for entry in ENTRIES.values() for name in (entry.name, *entry.aliases)}


def resolve(name: str) -> ZooEntry:
    """Return the entry of the published backbone with this torch hub, timm or Hugging Face name. Case does not matter.

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

"""Stores heads in an artifact, lists them, and opens them for use.

    <artifact>/heads/<name>/
      head.json           describes the head (`model.heads.record.HeadRecord`)
      head.safetensors    the head's tensors, float32

If the artifact is the bundled one, or its folder is not writable, its heads are stored in the same way in
`artifact.derived` instead. Heads are not part of an artifact's manifest or fingerprint, because they do not change the
artifact's features. Heads are found by listing the folders, so a running service uses a new head without a restart.

A head's folder appears complete or not at all. When a head is opened, the hash, names, shapes and values of its tensors
are checked, and the fingerprint of the model that it belongs to.
"""

import hashlib
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from model.artifact import WEIGHTS, Artifact, StoredWeights
from model.config import ViTConfig
from model.files import name_problem, publish
from model.head_folders import folder_for_new_heads, head_folders
from model.heads.linear import classification_logits, depth_map, layer_norm, segmentation_logits
from model.heads.record import (
    NORM_EPS,
    Floats,
    HeadDescription,
    HeadError,
    HeadNotFound,
    HeadRecord,
    ImageTokens,
    Kind,
    check_tensors,
)
from model.messages import in_words

if TYPE_CHECKING:
    from model.heads.dpt import DptSession

log = logging.getLogger(__name__)

RECORD: Final = "head.json"
TENSORS: Final = "head.safetensors"
MAX_RECORD_BYTES: Final = 4 << 20
MAX_TENSORS_BYTES: Final = 2 << 30
OPEN_HEADS: Final = 4
"""The number of heads that stay in memory."""


@dataclass(frozen=True)
class Head:
    """An opened head. Its methods compute its predictions from the tokens of one image.

    Legend: C classes, D width, h x w patches, n blocks.
    """

    record: HeadRecord
    config: ViTConfig
    tensors: Mapping[str, Floats]
    norm: tuple[Floats, Floats]  # weight and bias of the backbone's final norm
    dpt: "DptSession | None" = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the backbone's inner outputs that the head needs."""
        return self.record.outputs(self.config)

    @property
    def most_patches(self) -> int | None:
        """The largest number of patches that the head accepts, or None if there is no limit."""
        return None if self.dpt is None else self.dpt.most_patches

    def classify(self, tokens: ImageTokens) -> Floats:
        """Return the logits of one image, [C]."""
        assert self.record.kind == "classification"
        cls = [cls for cls, _ in self._layers(tokens)]
        return classification_logits(self.tensors["weight"], self.tensors["bias"], cls, tokens.patches.mean(axis=0))

    def segment(self, tokens: ImageTokens) -> Floats:
        """Return the logits of each patch of one image, [C, h, w]."""
        assert self.record.kind == "segmentation"
        patches = [patches for _, patches in self._layers(tokens)]
        return segmentation_logits(self.tensors["weight"], self.tensors["bias"], patches, tokens.grid)

    def depth(self, tokens: ImageTokens, depth_range: tuple[float, float] | None = None) -> Floats:
        """Return depths in metres, clipped to a range.

        The result is [4h, 4w] for a linear head, and [32 ceil(h/2), 32 ceil(w/2)] for a DPT head.

        Args:
            tokens: the tokens of the image.
            depth_range: smallest and largest depth in metres. If None, those in the head's record are used.

        Raises:
            HeadError: the head is a DPT head, and the image has more patches than it accepts.
        """
        low, high = depth_range or self.record.depth_range or (0, 0)
        layers = self._layers(tokens)
        if self.record.architecture == "linear":
            metres = depth_map(self.tensors["weight"], self.tensors["bias"], layers, tokens.grid, (low, high))
        else:
            assert self.dpt is not None
            metres = self.dpt.run(layers, tokens.grid, low)
        return np.clip(metres, np.float32(low), np.float32(high))

    def _layers(self, tokens: ImageTokens) -> list[tuple[Floats, Floats]]:
        """Return the class token [D] and the patch tokens [N, D] of each of the head's blocks."""
        layers = []
        for index in self.record.layers:
            if self.record.normed and index == self.config.depth - 1:
                layers.append((tokens.cls, tokens.patches))
                continue
            inner = tokens.inner[f"tokens.{index}"]
            if self.record.normed:
                inner = layer_norm(inner, *self.norm, NORM_EPS)
            layers.append((inner[0], inner[1 + self.config.num_register_tokens :]))
        return layers


def make_head(
    record: HeadRecord, tensors: Mapping[str, Floats], config: ViTConfig, norm: tuple[Floats, Floats]
) -> Head:
    """Return a head that is ready for use. The arguments are the fields of `Head`. The tensors must already have been
    checked."""
    if record.architecture == "linear":
        return Head(record, config, tensors, norm)
    from model.heads.dpt import DptSession  # imports onnx

    return Head(record, config, {}, norm, DptSession(tensors, config.embed_dim))


def add_head(
    artifact: Artifact, head: HeadDescription, tensors: Mapping[str, Floats], *, replace: bool = False
) -> Path:
    """Store a head in an artifact and return the folder of the head.

    Args:
        artifact: the model that the head belongs to.
        head: the head's description.
        tensors: the head's tensors, float32.
        replace: whether a head of the same name is replaced.

    Raises:
        HeadError: the tensors do not belong to a head of this kind for this model, there is already a head of this name
            and `replace` is False, or the files cannot be written.
    """
    check_name(artifact, head.name, replace=replace)
    check_tensors(tensors, head, artifact.manifest.config)
    existing = head_folders(artifact, RECORD).get(head.name)
    target = existing or folder_for_new_heads(artifact) / head.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".adding-") as temporary:
            folder = Path(temporary) / "new"
            folder.mkdir()
            save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / TENSORS)
            (folder / TENSORS).chmod(0o644)
            with (folder / TENSORS).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            created = datetime.now(UTC).isoformat(timespec="seconds")
            record = HeadRecord(**head.model_dump(), sha256=digest, model=artifact.fingerprint, created=created)
            text = record.model_dump_json(indent=1) + "\n"
            if len(text.encode()) > MAX_RECORD_BYTES:
                raise HeadError(
                    f"{head.name}: its description, with the names of {len(head.classes)} classes, has more than "
                    f"{MAX_RECORD_BYTES} bytes"
                )
            (folder / RECORD).write_text(text)
            if existing is not None:
                target.rename(Path(temporary) / "old")
            publish(folder, target)
    except (OSError, SafetensorError) as error:
        raise HeadError(f"{target}: the head cannot be written: {error}") from error
    return target


def check_name(artifact: Artifact, name: str, *, replace: bool) -> None:
    """Check that a head may be stored under a name.

    Raises:
        HeadError: the name is not allowed, or there is already a head of this name and `replace` is False.
    """
    if problem := name_problem(name):
        raise HeadError(problem)
    if not replace and name in head_folders(artifact, RECORD):
        raise HeadError(f"{artifact.name} already has a head named {name}: choose another name, or replace it")


def remove_head(artifact: Artifact, name: str) -> None:
    """Delete a head.

    Raises:
        HeadNotFound: the artifact has no head of this name.
        HeadError: the head cannot be deleted.
    """
    folder = _folder(artifact, name)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".deleting-") as temporary:
            folder.rename(Path(temporary) / "old")  # first, so that no request finds half of the head
    except OSError as error:
        raise HeadError(f"the head {name} cannot be deleted: {error}") from error


def list_heads(artifact: Artifact, kind: Kind | None = None) -> list[HeadRecord]:
    """Return the records of the artifact's heads, or of those of one kind, sorted by name.

    A head that belongs to another model or has an unreadable record is left out, and a warning is logged.
    """
    records = []
    for folder in head_folders(artifact, RECORD).values():
        try:
            record = _record(folder, artifact)
        except HeadError as error:
            log.warning("head left out: %s", error)
            continue
        if kind is None or record.kind == kind:
            records.append(record)
    return sorted(records, key=lambda record: record.name)


def choose_head(artifact: Artifact, kind: Kind, name: str | None) -> HeadRecord:
    """Return the record of the head with this name and kind. If `name` is None, return the only head of this kind.

    Raises:
        HeadNotFound: there is no such head, or `name` is None and there are several. The message lists the model's
            heads of this kind, and says how to add or train one.
        HeadError: the head's record is unreadable, or it belongs to another model.
    """
    available = [record.name for record in list_heads(artifact, kind)]
    listed = f"heads for {kind}: {', '.join(available)}" if available else f"{artifact.name} has no head for {kind}"
    advice = f"`dinov2 heads add` adds one of Meta's to a published model, and `dinov2 train-head {kind}` trains one"
    if name is None:
        if len(available) == 1:
            name = available[0]
        elif available:
            raise HeadNotFound(f"choose a head: {listed}")
        else:
            raise HeadNotFound(f"{listed}; {advice}")
    if name not in head_folders(artifact, RECORD):
        raise HeadNotFound(f"there is no head named {name!r}; {listed}; {advice}")
    record = _record(_folder(artifact, name), artifact)
    if record.kind != kind:
        raise HeadNotFound(f"the head {name!r} is for {record.kind}, not for {kind}; {listed}")
    return record


def open_head(artifact: Artifact, record: HeadRecord) -> Head:
    """Open a head and return it. The most recently used heads stay in memory.

    Raises:
        HeadNotFound: the head no longer exists.
        HeadError: the head's file is damaged, or does not match the record.
    """
    config, weights = artifact.manifest.config, artifact.file(WEIGHTS)
    with _lock:
        return _opened(_folder(artifact, record.name) / TENSORS, record.model_dump_json(), config, weights)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read the names of classes from a text file, one per line, in the order of their numbers.

    Raises:
        ValueError: the file is not UTF-8, or a name occurs twice.
        OSError: the file cannot be read.
    """
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8") from error
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: the name {twice[0]!r} occurs twice")
    return names


_lock: Final = Lock()  # keeps two requests from opening the same head at once


@lru_cache(maxsize=OPEN_HEADS)
def _opened(path: Path, record_json: str, config: ViTConfig, weights_file: Path) -> Head:
    record = HeadRecord.model_validate_json(record_json)
    try:
        size = path.stat().st_size
        if size > MAX_TENSORS_BYTES:
            raise HeadError(f"{path}: {size} bytes; a head has at most {MAX_TENSORS_BYTES}")
        content = path.read_bytes()
        if (actual := hashlib.sha256(content).hexdigest()) != record.sha256:
            raise HeadError(f"{path}: its sha256 is {actual}, but {RECORD} has {record.sha256}: the file was changed")
        tensors = {key: np.asarray(value, np.float32) for key, value in load(content).items()}
    except OSError as error:
        raise HeadError(f"{path}: {error.strerror}") from error
    except (SafetensorError, KeyError) as error:  # KeyError: a number type that numpy does not have
        raise HeadError(f"{path}: not a readable safetensors file: {error}") from error
    try:
        check_tensors(tensors, record, config)
    except HeadError as error:
        raise HeadError(f"{path}: {error}") from error
    weights = StoredWeights(weights_file)
    norm = (weights["norm.weight"].astype(np.float32), weights["norm.bias"].astype(np.float32))
    return make_head(record, tensors, config, norm)


def _record(folder: Path, artifact: Artifact) -> HeadRecord:
    path = folder / RECORD
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise HeadError(f"{path}: larger than {MAX_RECORD_BYTES} bytes")
        record = HeadRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise HeadError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise HeadError(f"{path}: not a head's record: {in_words(error)}") from error
    if record.name != folder.name:
        raise HeadError(f"{path}: the head is named {record.name}, but its folder is named {folder.name}")
    if record.model != artifact.fingerprint:
        raise HeadError(
            f"{path}: the head belongs to the model with fingerprint {record.model[:8]}, "
            f"not to {artifact.fingerprint[:8]}"
        )
    return record


def _folder(artifact: Artifact, name: str) -> Path:
    folder = head_folders(artifact, RECORD).get(name)
    if folder is None:
        raise HeadNotFound(f"{artifact.name} has no head named {name!r}")
    return folder

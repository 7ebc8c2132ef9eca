"""Stores dino.txt in an artifact, and opens it.

    <artifact>/heads/<name>/
      dinotxt.json                  describes the files (`Record`)
      vision_head.safetensors       Meta's tensors, float32
      text_encoder.safetensors      Meta's tensors, float32; 2.15 GB for the published encoder
      bpe_simple_vocab_16e6.txt.gz  CLIP's vocabulary

If the artifact is the bundled one, or its folder is not writable, dino.txt is stored in `artifact.derived` instead. A
folder appears complete or not at all, so a running service uses it without a restart. The tensors are stored as
safetensors, because ONNX Runtime can map this format into memory.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.artifact import Artifact, FileRecord, describe_file
from model.convert import CheckpointError
from model.dinotxt.bpe import KNOWN_VOCABULARY_SHA256, Tokenizer, VocabularyError
from model.dinotxt.networks import TextEncoder, VisionHead
from model.dinotxt.towers import check_match, text_encoder_shape, vision_head_shape
from model.files import NAME_PATTERN, name_problem, publish
from model.head_folders import folder_for_new_heads, head_folders
from model.messages import in_words
from model.weights import read_tensors

log = logging.getLogger(__name__)

RECORD: Final = "dinotxt.json"
VISION_HEAD: Final = "vision_head.safetensors"
TEXT_ENCODER: Final = "text_encoder.safetensors"
VOCABULARY: Final = "bpe_simple_vocab_16e6.txt.gz"
DEFAULT_NAME: Final = "dinotxt"
MAX_RECORD_BYTES: Final = 1 << 20
HOW_TO_ADD: Final = (
    "Add Meta's files for dinov2_vitl14_reg with `dinov2 heads add-dinotxt VISION_HEAD.pth TEXT_ENCODER.pth "
    "bpe_simple_vocab_16e6.txt.gz` (docs/vision/words.md)"
)


class DinoTxtError(ValueError):
    """The error raised when dino.txt cannot be added or opened. The message gives the reason."""


class DinoTxtNotFound(DinoTxtError):
    """The error raised when an artifact has no dino.txt of the requested name."""


class Record(BaseModel):
    """The content of `dinotxt.json`.

    `model` is the fingerprint of the artifact. `files` describes the files in the folder. `sources` maps the names of
    the imported files to their sha256.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    model: str = Field(pattern=r"^[0-9a-f]{64}$")
    files: dict[str, FileRecord]
    sources: dict[str, str]
    created: str  # ISO 8601, UTC


class Sources(NamedTuple):
    """The files that make up dino.txt: Meta's two files, as .pth or .safetensors, and CLIP's vocabulary."""

    vision_head: Path
    text_encoder: Path
    vocabulary: Path


@dataclass(frozen=True)
class DinoTxt:
    """An opened dino.txt. Any thread may use it."""

    record: Record
    vision_head: VisionHead
    text_encoder: TextEncoder
    tokenizer: Tokenizer


def add_dinotxt(artifact: Artifact, sources: Sources, name: str = DEFAULT_NAME, *, replace: bool = False) -> Path:
    """Check Meta's files, store them in an artifact, and return the new folder.

    Args:
        artifact: the model that dino.txt belongs to.
        sources: the files.
        name: the name of the folder.
        replace: whether an existing dino.txt of this name is replaced.

    Raises:
        DinoTxtError: a file is not the expected one, the files do not belong to this model, the name is not allowed or
            already used, or a file cannot be read or written.
    """
    if problem := name_problem(name):
        raise DinoTxtError(problem)
    target = folder_for_new_heads(artifact) / name
    if target.exists() and not replace:
        raise DinoTxtError(f"{target}: exists already: choose another name, or replace it")
    try:
        vision, text = read_tensors(sources.vision_head), read_tensors(sources.text_encoder)
        text_shape = text_encoder_shape(text)
        check_match(vision_head_shape(vision), text_shape, artifact.manifest.config)
        Tokenizer(sources.vocabulary, text_shape.vocab_size)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".adding-") as temporary:
            folder = Path(temporary) / "new"
            folder.mkdir()
            write_safetensors(folder / VISION_HEAD, vision)
            write_safetensors(folder / TEXT_ENCODER, text)
            shutil.copyfile(sources.vocabulary, folder / VOCABULARY)
            record = _record(artifact, sources, name, folder)
            (folder / RECORD).write_text(record.model_dump_json(indent=1) + "\n")
            if target.exists():
                target.rename(Path(temporary) / "old")
            publish(folder, target)
    except (CheckpointError, VocabularyError) as error:
        raise DinoTxtError(str(error)) from error
    except OSError as error:
        raise DinoTxtError(f"{error.filename or target}: {error.strerror or error}") from error
    if record.files[VOCABULARY].sha256 != KNOWN_VOCABULARY_SHA256:
        log.warning("%s: not the copy of CLIP's vocabulary that this project was tested with", sources.vocabulary)
    return target


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write tensors to a safetensors file as float32.

    Only one tensor at a time is read and converted, whereas the safetensors library needs memory for all of them.

    Raises:
        CheckpointError: a value is not finite.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.size
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            values = np.ascontiguousarray(tensor, np.float32)
            if not np.isfinite(values).all():
                raise CheckpointError(f"the tensor {name} has values that are not finite")
            file.write(values.data)


def list_dinotxt(artifact: Artifact) -> list[Record]:
    """Return the records of all dino.txt folders of an artifact, sorted by name.

    A folder that belongs to another model or has an unreadable record is left out, and a warning is logged.
    """
    records = []
    for folder in head_folders(artifact, RECORD).values():
        try:
            records.append(_read_record(folder, artifact))
        except DinoTxtError as error:
            log.warning("dino.txt left out: %s", error)
    return sorted(records, key=lambda record: record.name)


def remove_dinotxt(artifact: Artifact, name: str) -> None:
    """Delete the dino.txt with this name.

    Raises:
        DinoTxtNotFound: the artifact has no dino.txt of this name.
        DinoTxtError: the folder cannot be deleted.
    """
    folders = head_folders(artifact, RECORD)
    if name not in folders:
        raise DinoTxtNotFound(f"{artifact.name} has no dino.txt named {name!r}")
    try:
        shutil.rmtree(folders[name])
    except OSError as error:
        raise DinoTxtError(f"{folders[name]}: cannot be deleted: {error.strerror or error}") from error


def open_dinotxt(artifact: Artifact, name: str | None = None) -> DinoTxt:
    """Open the dino.txt with this name, or the artifact's only one if `name` is None. The most recently used one stays
    open.

    Raises:
        DinoTxtNotFound: the artifact has no dino.txt of this name, or `name` is None and there are several.
        DinoTxtError: a file is damaged or was changed, or belongs to another model.
    """
    folders = head_folders(artifact, RECORD)
    if name is None and len(folders) == 1:
        [name] = folders
    if name is None or name not in folders:
        available = f"it has {', '.join(sorted(folders))}" if folders else f"it has none. {HOW_TO_ADD}"
        wanted = "a single dino.txt head" if name is None else f"a dino.txt head named {name!r}"
        raise DinoTxtNotFound(f"{artifact.name} does not have {wanted}: {available}")
    record = _read_record(folders[name], artifact)
    with _lock:
        return _opened(folders[name], record.model_dump_json())


_lock: Final = Lock()  # keeps two requests from opening the same files at once


@lru_cache(maxsize=1)
def _opened(folder: Path, record_json: str) -> DinoTxt:
    record = Record.model_validate_json(record_json)
    try:
        for file, expected in record.files.items():
            if describe_file(folder / file) != expected:
                raise DinoTxtError(f"{folder / file}: its size or hash differs from {RECORD}: the file was changed")
        vision_head, text_encoder = VisionHead(folder / VISION_HEAD), TextEncoder(folder / TEXT_ENCODER)
        return DinoTxt(record, vision_head, text_encoder, Tokenizer(folder / VOCABULARY, text_encoder.shape.vocab_size))
    except (CheckpointError, VocabularyError) as error:
        raise DinoTxtError(f"{folder}: {error}") from error
    except OSError as error:
        raise DinoTxtError(f"{error.filename or folder}: {error.strerror or error}") from error


def _record(artifact: Artifact, sources: Sources, name: str, folder: Path) -> Record:
    files = {file: describe_file(folder / file) for file in (VISION_HEAD, TEXT_ENCODER, VOCABULARY)}
    hashes = {}
    for path in sources:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(name=name, model=artifact.fingerprint, files=files, sources=hashes, created=created)


def _read_record(folder: Path, artifact: Artifact) -> Record:
    path = folder / RECORD
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise DinoTxtError(f"{path}: larger than {MAX_RECORD_BYTES} bytes")
        record = Record.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DinoTxtError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise DinoTxtError(f"{path}: not a record of dino.txt: {in_words(error)}") from error
    if record.files.keys() != {VISION_HEAD, TEXT_ENCODER, VOCABULARY} or record.name != folder.name:
        raise DinoTxtError(f"{path}: it names other files, or another folder than {folder.name}")
    if record.model != artifact.fingerprint:
        raise DinoTxtError(
            f"{path}: it belongs to the model with fingerprint {record.model[:8]}, not to {artifact.fingerprint[:8]}"
        )
    return record

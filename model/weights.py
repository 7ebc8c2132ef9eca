"""Reads weights files as numpy arrays, without torch.

Meta's, timm's, Hugging Face's and this project's formats can be read. A weights file is untrusted input, so only
tensors are read from it. A safetensors file cannot contain code, and `model/torch_file.py` executes no code from a
PyTorch file. Reading is strict: a missing or extra tensor, or a tensor with the wrong shape, raises an error that names
the tensor, because a partly loaded backbone would still produce vectors, but wrong ones. `model/convert.py` contains
this check and the tables of tensor names.

The arrays are mapped from the file, so they take no memory until they are read.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from model import downloads, zoo
from model.config import CONFIGS, PosEmbedRule, ViTConfig, config_for
from model.convert import META_HUB, Array, CheckpointError, Dialect, FloatArray, convert
from model.torch_file import TorchFileError, read_torch_file
from model.wrapped import CODE_ADVICE, RANK_ADVICE, is_rank_file, tensors_in, without_prefixes

logger = logging.getLogger(__name__)

FORMAT: Final = "dinov2-service"
"""The value of the metadata entry `format` that marks this project's checkpoints."""

_SAFETENSORS_DTYPES: Final = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_tensors(path: Path | str) -> dict[str, Array]:
    """Read a safetensors or PyTorch file and return its tensors as arrays, keyed by their names in the file.

    Wrappers of training code are removed (see `model/wrapped.py`). If the file is one of Meta's training dumps, only
    the tensors under its key `teacher` are returned. If it is an mmcv checkpoint, such as Meta's segmentation and depth
    heads, only the tensors under `state_dict` are returned.

    Raises:
        CheckpointError (a ValueError): the file is damaged, contains no weights, or is a pickle with objects other than
            tensors. The message says what to do.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        if _is_safetensors(path):
            return without_prefixes(_read_safetensors(path))
        return without_prefixes(tensors_in(read_torch_file(path)))
    except TorchFileError as error:
        has_objects = "could run any code" in str(error) or "which torch does not write" in str(error)
        advice = f": {CODE_ADVICE}" if has_objects else ""
        raise CheckpointError(f"{path}: {RANK_ADVICE if is_rank_file(path) else f'{error}{advice}'}") from error
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error


def _is_safetensors(path: Path) -> bool:
    """Return whether a file starts like a safetensors file, with an eight-byte length and then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Array]:
    """Memory-map the arrays of a safetensors file.

    The safetensors library is not used for this, because its numpy interface cannot read bfloat16.
    """
    _safetensors_metadata(path)  # the library checks the header
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    arrays: dict[str, Array] = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has the type {entry['dtype']}, which no weights have")
        dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        start = 8 + length + entry["data_offsets"][0]
        empty = 0 in shape
        arrays[name] = np.zeros(shape, dtype) if empty else np.memmap(path, dtype, "r", offset=start, shape=shape)
    return arrays


def _safetensors_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged safetensors file: {error}") from error


def _own_metadata(path: Path) -> tuple[ViTConfig, dict[str, Any]] | None:
    """Return the configuration and the provenance of a checkpoint in this project's format.

    If the file has another format, return None.

    Raises:
        CheckpointError: the file is a damaged safetensors file, or its metadata is invalid.
    """
    if not _is_safetensors(path):
        return None
    metadata = _safetensors_metadata(path)
    if metadata.get("format") != FORMAT:
        return None
    try:
        config = json.loads(metadata["config"])
        unknown = set(config) - {known.name for known in fields(ViTConfig)}
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}: written by a newer version")
        return ViTConfig(**config), json.loads(metadata.get("provenance", "{}"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata cannot be read: {error}") from error


def is_own_checkpoint(path: Path | str) -> bool:
    """Return whether a file is a checkpoint in this project's format, according to its metadata.

    Raises:
        CheckpointError: the file is a damaged safetensors file, or its metadata is invalid.
    """
    return _own_metadata(Path(path)) is not None


def read_checkpoint(path: Path | str) -> tuple[dict[str, FloatArray], ViTConfig, dict[str, Any]]:
    """Read a checkpoint in this project's format.

    Returns:
        The float32 tensors keyed by Meta's names, the configuration, and the provenance.

    Raises:
        CheckpointError: the file is damaged, has another format, or contains tensors that do not match its
            configuration.
        OSError: the file cannot be read.
    """
    path = Path(path)
    tensors = read_tensors(path)
    own = _own_metadata(path)
    if own is None:
        raise CheckpointError(
            f"{path}: not a checkpoint of this project; load other files by name: load_model(name, weights=...)"
        )
    config, provenance = own
    return _converted(path, tensors, config, META_HUB)[0], config, provenance


def _converted(
    path: Path, tensors: Mapping[str, Array], config: ViTConfig, dialect: Dialect | None = None
) -> tuple[dict[str, FloatArray], ViTConfig]:
    try:
        converted = convert(tensors, config, dialect)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if converted.dropped:
        heads = sorted({key.split(".")[0] for key in converted.dropped})
        logger.info("%s: left out %d tensors of %s", path, len(converted.dropped), ", ".join(heads))
    logger.info("%s: %s weights, pos_embed rule %s", path, converted.dialect.name, converted.config.pos_embed_rule)
    return converted.arrays, converted.config


def check_architecture(path: Path, name: str, own: ViTConfig) -> None:
    """Check that the configuration `own` in a file is that of the model `name`.

    The fields `img_size`, `pos_embed_rule` and `layerscale_init` may differ.

    Raises:
        ValueError: the name is unknown.
        CheckpointError: the architectures differ.
    """
    wanted, found = asdict(config_for(hub_name(name))), asdict(own)
    fixed = set(wanted) - {"img_size", "pos_embed_rule", "layerscale_init"}
    different = [f"{key} {found[key]} instead of {wanted[key]}" for key in sorted(fixed) if wanted[key] != found[key]]
    if different:
        raise CheckpointError(
            f"{path}: not a {name}: {', '.join(different)}. The file contains its own architecture: load it without a "
            "name"
        )


def hub_name(name: str) -> str:
    """Return the torch hub name of an architecture, given this name or the one in timm or Hugging Face.

    Raises:
        ValueError: the name is unknown.
    """
    return name if name in CONFIGS and name not in zoo.ENTRIES else zoo.resolve(name).name


def read_weights(
    name: str,
    weights: Path | str | None = None,
    *,
    pos_embed_rule: PosEmbedRule | None = None,
    download: zoo.DownloadOptions = zoo.DEFAULT_DOWNLOAD,
) -> tuple[dict[str, FloatArray], ViTConfig]:
    """Return the weights of a backbone (float32, keyed by Meta's names) and the backbone's configuration.

    The weights file may be in the format of Meta (from torch hub or a training dump), timm, Hugging Face or this
    project. The format is detected.

    The configuration's `pos_embed_rule` is the rule by which the file's publisher resizes position embeddings, so the
    features are the same as the publisher's at every input size. Meta's rule depends on the model's name. Hugging
    Face's rule is "antialias" for models with registers and "size" for others. timm's rule is "antialias". This
    project's checkpoints store their own rule.

    Args:
        name: the model's name in torch hub (`dinov2_vits14`), timm or Hugging Face.
        weights: the weights file. If None, the published weights with this name are used. They are downloaded unless
            they are in the cache, and get Meta's rule, even if they come from Hugging Face.
        pos_embed_rule: the rule to use instead of the one described above. For instance, with "offset", a Hugging Face
            file gives torch hub's features.
        download: the options for downloading published weights.

    Raises:
        ValueError: the name or the rule is unknown, or no weights are published under this name and `weights` is None.
        CheckpointError (a ValueError): the file does not contain the weights of this model. The message lists the
            tensors that are missing, extra or of the wrong shape.
        zoo.DownloadError: the published weights cannot be downloaded.
        OSError: the file cannot be read.
    """
    name = hub_name(name)
    entry, config = zoo.ENTRIES.get(name), config_for(name)
    if weights is None:
        if entry is None:
            raise ValueError(f"no weights are published for {name!r}: pass a file with weights=")
        weights = downloads.download(entry, download)
        pos_embed_rule = pos_embed_rule or config.pos_embed_rule
    path = Path(weights)
    tensors = read_tensors(path)
    own = _own_metadata(path)
    if own is None:
        arrays, config = _converted(path, tensors, config)
    else:
        check_architecture(path, name, own[0])
        arrays, config = _converted(path, tensors, own[0], META_HUB)
    if pos_embed_rule is not None:
        config = replace(config, pos_embed_rule=pos_embed_rule)
    return arrays, config

"""Reads and writes weights files.

Meta's, timm's and Hugging Face's formats can be read, and this project's own format can be read and written. A weights
file is untrusted input, so only tensors are read from it. A safetensors file cannot contain code. PyTorch files are
loaded with `torch.load(weights_only=True)`, which refuses a pickle that would run code. Loading is strict: a missing,
extra or misshapen tensor raises an error that names the tensor, because a partly loaded backbone would still produce
vectors, but wrong ones. `model/convert.py` contains the tables of names and this check.

This project's checkpoints are safetensors files with Meta's tensor names and three metadata entries: `format`, `config`
(a `ViTConfig` as JSON) and `provenance` (JSON). A checkpoint is written under a temporary name, flushed to the disk and
renamed, so a crash leaves either the old file or the new one.
"""

import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import zoo
from model.config import CONFIGS, PosEmbedRule, ViTConfig, config_for
from model.convert import META_HUB, CheckpointError, Dialect, convert
from model.files import replacing
from model.vit import DinoVisionTransformer

logger = logging.getLogger(__name__)

FORMAT = "dinov2-service"
"""The value of the metadata entry `format` that marks this project's checkpoints."""


def _on_meta(config: ViTConfig) -> DinoVisionTransformer:
    """Return a model on torch's meta device, where tensors have names and shapes but no data."""
    with torch.device("meta"):
        return DinoVisionTransformer(config)


def _expected_shapes(config: ViTConfig) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in _on_meta(config).state_dict().items()}


def _is_safetensors(path: Path) -> bool:
    """Return whether a file starts like a safetensors file, with an eight-byte length and then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, cut after 200 characters.

    The later lines of torch's messages advise disabling `weights_only`.
    """
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _load_pickled(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not loaded, because it contains something other than tensors or is not a weights file. A pickle "
            f"can run any code, so only tensors are unpickled ({_first_line(error)})"
        ) from error
    except Exception as error:  # torch raises many kinds of exceptions on damaged files
        raise CheckpointError(f"{path}: damaged or not a PyTorch file: {_first_line(error)}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("teacher"), dict):  # Meta's training dumps
        loaded = loaded["teacher"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        found = list(loaded)[:10] if isinstance(loaded, dict) else type(loaded).__name__
        raise CheckpointError(f"{path}: expected named tensors, at the top or under 'teacher', but found {found}")
    return loaded


def load_state_dict_file(path: Path | str) -> dict[str, Tensor]:
    """Read a safetensors or PyTorch file and return its tensors on the CPU, by the names in the file.

    If the file is one of Meta's training dumps, only the tensors under its key `teacher` are returned.

    Raises:
        CheckpointError (a ValueError): the file is damaged, contains no weights, or is a pickle with objects other than
            tensors.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if not _is_safetensors(path):
        return _load_pickled(path)
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged safetensors file: {error}") from error


def save_safetensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to a safetensors file, completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata=dict(metadata))
        except SafetensorError as error:  # raised on a full disk
            raise OSError(f"{path}: cannot be written: {error}") from error
        temporary.chmod(0o644)  # safetensors makes its files readable by the owner only


def save_checkpoint(
    path: Path | str, state_dict: Mapping[str, Tensor], config: ViTConfig, provenance: Mapping[str, Any]
) -> None:
    """Write a checkpoint in this project's format.

    Args:
        path: the file, by convention `*.safetensors`.
        state_dict: the backbone's tensors under Meta's names, as returned by `DinoVisionTransformer.state_dict()`.
        config: the backbone's shape.
        provenance: the origin of the weights, such as recipe, data, revision and scores. It is stored as JSON.

    Raises:
        CheckpointError: `state_dict` does not match a model of this shape.
        OSError: the file cannot be written.
    """
    convert(state_dict, config, _expected_shapes, META_HUB)
    metadata = {"format": FORMAT, "config": json.dumps(asdict(config)), "provenance": json.dumps(dict(provenance))}
    save_safetensors(path, state_dict, metadata)


def _own_metadata(path: Path) -> tuple[ViTConfig, dict[str, Any]] | None:
    """Return the configuration and the provenance of a checkpoint in this project's format.

    If the file has another format, return None.

    Raises:
        CheckpointError: the file is a damaged safetensors file, or its metadata is invalid.
    """
    if not _is_safetensors(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged safetensors file: {error}") from error
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


def load_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], ViTConfig, dict[str, Any]]:
    """Read a checkpoint in this project's format.

    Returns:
        The float32 tensors under Meta's names, the configuration, and the provenance.

    Raises:
        CheckpointError: the file is damaged, has another format, or its tensors do not match its configuration.
        OSError: the file cannot be read.
    """
    path = Path(path)
    tensors = load_state_dict_file(path)
    own = _own_metadata(path)
    if own is None:
        raise CheckpointError(
            f"{path}: not a checkpoint of this project; load other files by name: load_model(name, weights=...)"
        )
    config, provenance = own
    return _converted(path, tensors, config, META_HUB)[0], config, provenance


def _converted(
    path: Path, tensors: Mapping[str, Tensor], config: ViTConfig, dialect: Dialect | None = None
) -> tuple[dict[str, Tensor], ViTConfig]:
    try:
        converted = convert(tensors, config, _expected_shapes, dialect)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if converted.dropped:
        heads = sorted({key.split(".")[0] for key in converted.dropped})
        logger.info("%s: left out %d tensors of %s", path, len(converted.dropped), ", ".join(heads))
    logger.info("%s: %s weights, pos_embed rule %s", path, converted.dialect.name, converted.config.pos_embed_rule)
    return converted.state_dict, converted.config


def _check_same_shape(path: Path, name: str, named: ViTConfig, own: ViTConfig) -> None:
    """Raise a CheckpointError if the configurations `named` and `own` differ in architecture.

    The fields `img_size`, `pos_embed_rule` and `layerscale_init` may differ.
    """
    wanted, found = asdict(named), asdict(own)
    fixed = set(wanted) - {"img_size", "pos_embed_rule", "layerscale_init"}
    different = [f"{key} {found[key]} instead of {wanted[key]}" for key in sorted(fixed) if wanted[key] != found[key]]
    if different:
        raise CheckpointError(f"{path}: not a {name}: {', '.join(different)}")


def load_model(
    name: str,
    weights: Path | str | None = None,
    *,
    pos_embed_rule: PosEmbedRule | None = None,
    cache_dir: Path | str | None = None,
) -> DinoVisionTransformer:
    """Load a backbone with its weights and return it on the CPU, in float32 and eval mode.

    The weights file may have Meta's format (from torch hub or a training dump), timm's, Hugging Face's or this
    project's. The format is detected.

    The model's `config.pos_embed_rule` is the rule by which the file's publisher resizes position embeddings, so the
    features equal the publisher's at every input size. Meta's rule depends on the model's name. Hugging Face's rule is
    "antialias" for models with registers and "size" for others. timm's rule is "antialias". This project's checkpoints
    contain their rule.

    Args:
        name: the model's name in torch hub (`dinov2_vits14`), timm or Hugging Face.
        weights: the weights file. If None, the published weights of this name are used, and downloaded if `cache_dir`
            does not contain them.
        pos_embed_rule: the rule to use instead of the file's. For instance, "offset" gives torch hub's features from a
            Hugging Face file. If None, the file's rule is used.
        cache_dir: the folder for downloads. If None, `zoo.DEFAULT_CACHE_DIR` is used.

    Raises:
        ValueError: the name or the rule is unknown, or no weights are published under this name and `weights` is None.
        CheckpointError (a ValueError): the file does not contain the weights of this model. The message lists the
            missing, extra and misshapen keys.
        zoo.DownloadError: the published weights cannot be downloaded.
        OSError: the file cannot be read.
    """
    entry = None if name in CONFIGS and name not in zoo.ENTRIES else zoo.resolve(name)
    hub_name = name if entry is None else entry.name
    config = config_for(hub_name)
    if weights is None:
        if entry is None:
            raise ValueError(f"no weights are published for {name!r}: pass a file with weights=")
        weights = zoo.download(entry, zoo.DEFAULT_CACHE_DIR if cache_dir is None else Path(cache_dir))
    path = Path(weights)
    tensors = load_state_dict_file(path)
    own = _own_metadata(path)
    if own is None:
        state_dict, config = _converted(path, tensors, config)
    else:
        _check_same_shape(path, hub_name, config, own[0])
        state_dict, config = _converted(path, tensors, own[0], META_HUB)
    if pos_embed_rule is not None:
        config = replace(config, pos_embed_rule=pos_embed_rule)
    model = _on_meta(config)
    model.load_state_dict(state_dict, strict=True, assign=True)
    return model.eval()

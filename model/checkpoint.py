"""Weights on disk: reading those of four publishers and our own, writing ours.

A file is data from somebody else. Only tensors are read from it: safetensors can hold nothing else, and PyTorch's files
go through `torch.load(weights_only=True)`, which refuses a pickle that would run code. Loading is strict: a key that is
missing, extra or misshapen is an error that names it, because a half-loaded backbone still gives vectors, only bad ones
(`model/convert.py` holds the tables and the check).

Our own checkpoints are safetensors with Meta's tensor names and three entries of metadata: `format`, `config` (the
ViTConfig) and `provenance`, both JSON. They are written beside their place, flushed to the disk and renamed, so a crash
leaves the old file or the new one.
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
"""Value of the metadata entry `format` that marks our own checkpoints."""


def _on_meta(config: ViTConfig) -> DinoVisionTransformer:
    """A model without memory for its weights: names and shapes only."""
    with torch.device("meta"):
        return DinoVisionTransformer(config)


def _expected_shapes(config: ViTConfig) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in _on_meta(config).state_dict().items()}


def _is_safetensors(path: Path) -> bool:
    """By content: eight bytes of header length, then JSON. Names of files prove nothing."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _first_line(error: Exception) -> str:
    """torch's messages go on with a page of advice, some of it to switch the protection off."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _load_pickled(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not read, because it holds more than tensors or is no weights file at all; a pickle can run any "
            f"code, so only tensors are unpickled ({_first_line(error)})"
        ) from error
    except Exception as error:  # damaged files end in all kinds of exceptions inside torch
        raise CheckpointError(f"{path}: damaged or not a PyTorch file: {_first_line(error)}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("teacher"), dict):  # Meta's training dumps
        loaded = loaded["teacher"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        found = list(loaded)[:10] if isinstance(loaded, dict) else type(loaded).__name__
        raise CheckpointError(f"{path}: expected named tensors, or those under 'teacher', and found {found}")
    return loaded


def load_state_dict_file(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file, under the file's own names, on the CPU.

    A Meta training dump gives what is under its `teacher` key.

    Raises:
        CheckpointError (a ValueError): damaged, not a weights file, or a pickle that holds anything but tensors.
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
    """Write tensors to a file that is whole or not there.

    Raises:
        OSError: it cannot be written; `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata=dict(metadata))
        except SafetensorError as error:  # a full disk arrives as one
            raise OSError(f"{path}: cannot be written: {error}") from error
        temporary.chmod(0o644)  # safetensors makes its files for the owner alone


def save_checkpoint(
    path: Path | str, state_dict: Mapping[str, Tensor], config: ViTConfig, provenance: Mapping[str, Any]
) -> None:
    """Write one of our checkpoints.

    Args:
        path: the file, by convention `*.safetensors`.
        state_dict: the backbone's tensors under Meta's names, as `DinoVisionTransformer.state_dict()` gives them.
        config: the backbone's shape.
        provenance: where the weights come from, as JSON: recipe, data, revision, scores.

    Raises:
        CheckpointError: `state_dict` is not that of a model of this shape.
        OSError: it cannot be written.
    """
    convert(state_dict, config, _expected_shapes, META_HUB)
    metadata = {"format": FORMAT, "config": json.dumps(asdict(config)), "provenance": json.dumps(dict(provenance))}
    save_safetensors(path, state_dict, metadata)


def _own_metadata(path: Path) -> tuple[ViTConfig, dict[str, Any]] | None:
    """Configuration and provenance of our own checkpoints; None for files of others."""
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
            raise ValueError(f"unknown fields {sorted(unknown)}, written by a newer version")
        return ViTConfig(**config), json.loads(metadata.get("provenance", "{}"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata cannot be read: {error}") from error


def is_own_checkpoint(path: Path | str) -> bool:
    """Whether a file says that it is one of our checkpoints.

    Raises:
        CheckpointError: it says so, but its metadata cannot be read.
    """
    return _own_metadata(Path(path)) is not None


def load_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], ViTConfig, dict[str, Any]]:
    """One of our checkpoints: tensors under Meta's names (float32), configuration, provenance.

    Raises:
        CheckpointError: not one of ours, damaged, or its tensors are not those of its configuration.
        OSError: the file cannot be read.
    """
    path = Path(path)
    tensors = load_state_dict_file(path)
    own = _own_metadata(path)
    if own is None:
        raise CheckpointError(
            f"{path}: no checkpoint of this project; files of others load by name: load_model(name, weights=...)"
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
    """The file's configuration may differ from the name's in what is not the architecture."""
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
    """A backbone with its weights, in eval mode, float32, on the CPU.

    The file may be Meta's (hub or training dump), timm's, Hugging Face's or one of our own checkpoints; which one is
    detected. The result's `config.pos_embed_rule` says how it resizes positions: as the library that the file comes
    from does (Meta: by the model's name; Hugging Face: "size", with registers "antialias"; timm: "antialias"; our own:
    as recorded), so that the features are those of that library at every input size.

    Args:
        name: torch hub's name (`dinov2_vits14`), timm's or Hugging Face's.
        weights: the file; None takes the published weights of that name, downloaded once.
        pos_embed_rule: another rule than the file's, for instance "offset" to get torch hub's features from Hugging
            Face's file.
        cache_dir: where downloads are kept; None: `zoo.DEFAULT_CACHE_DIR`.

    Raises:
        ValueError: unknown name or rule.
        CheckpointError (a ValueError): a file that is not these weights; missing, extra and misshapen keys are listed.
        zoo.DownloadError: the published weights cannot be downloaded.
        OSError: the file cannot be read.
    """
    entry = None if name in CONFIGS and name not in zoo.ENTRIES else zoo.resolve(name)
    hub_name = name if entry is None else entry.name
    config = config_for(hub_name)
    if weights is None:
        if entry is None:
            raise ValueError(f"there are no published weights of {name!r}: give the file with weights=")
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

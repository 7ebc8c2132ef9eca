"""Loads a backbone into torch from any source that `model/loading.py` reads, and writes this project's checkpoints.

This project's checkpoints are safetensors files with Meta's tensor names and three metadata entries: `format`, `config`
(a `ViTConfig` as JSON) and `provenance` (JSON). A checkpoint is written under a temporary name, flushed to the disk and
renamed, so a crash leaves either the old file or the new one.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.config import PosEmbedRule, ViTConfig
from model.convert import META_HUB, Array, check_tensors
from model.files import replacing
from model.loading import LoadedWeights, read_model
from model.vit import DinoVisionTransformer
from model.weights import FORMAT, check_architecture, hub_name, read_checkpoint, read_tensors
from model.zoo import DEFAULT_DOWNLOAD, DownloadOptions


def _tensor(array: Array) -> Tensor:
    """Copy an array into a tensor of the same type."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array.view(np.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def load_state_dict_file(path: Path | str) -> dict[str, Tensor]:
    """Return the tensors in a safetensors or PyTorch file, on the CPU, keyed by their names in the file.

    If the file is one of Meta's training dumps, only the tensors under its key `teacher` are returned. The errors are
    those of `model.weights.read_tensors`.
    """
    return {name: _tensor(array) for name, array in read_tensors(path).items()}


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
        state_dict: the backbone's tensors, keyed by Meta's names, as returned by `DinoVisionTransformer.state_dict()`.
        config: the backbone's shape.
        provenance: where the weights come from, for instance the recipe, the data, the code revision and the evaluation
            scores. It is stored as JSON.

    Raises:
        CheckpointError: `state_dict` does not match a model of this shape.
        OSError: the file cannot be written.
    """
    check_tensors({name: tuple(tensor.shape) for name, tensor in state_dict.items()}, config, META_HUB)
    metadata = {"format": FORMAT, "config": json.dumps(asdict(config)), "provenance": json.dumps(dict(provenance))}
    save_safetensors(path, state_dict, metadata)


def load_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], ViTConfig, dict[str, Any]]:
    """Load a checkpoint in this project's format.

    Returns:
        The tensors (float32, keyed by Meta's names), the configuration and the provenance.

    Raises:
        CheckpointError, OSError: see `model.weights.read_checkpoint`.
    """
    arrays, config, provenance = read_checkpoint(path)
    return {name: _tensor(array) for name, array in arrays.items()}, config, provenance


def load_model(
    source: Path | str,
    weights: Path | str | None = None,
    *,
    pos_embed_rule: PosEmbedRule | None = None,
    download: DownloadOptions = DEFAULT_DOWNLOAD,
) -> DinoVisionTransformer:
    """Load a backbone with its weights, in eval mode, float32, on the CPU.

    Args:
        source: a checkpoint of this project, a run's folder, an artifact's folder, or the name of a published model,
            which is downloaded. If `weights` is given, the name of an architecture in torch hub, timm or Hugging Face.
        weights: a weights file of Meta, timm, Hugging Face or this project, a run's folder or an artifact's folder.
        pos_embed_rule: the rule for resizing positions, instead of the one in the source (see
            `model.weights.read_weights`).
        download: the options for downloading published weights.

    Raises:
        ValueError, OSError: see `model.loading.read_model`. If `weights` contains its own architecture, it must be that
            of the model `source`.
    """
    if weights is None:
        return network_of(read_model(source, pos_embed_rule=pos_embed_rule, download=download))
    name = hub_name(str(source))
    loaded = read_model(Path(weights), arch=name, pos_embed_rule=pos_embed_rule)
    if loaded.kind != "foreign":
        check_architecture(loaded.path, name, loaded.config)
    return network_of(loaded)


def network_of(loaded: LoadedWeights) -> DinoVisionTransformer:
    """Return a backbone with these weights, in eval mode, float32, on the CPU."""
    with torch.device("meta"):  # no memory for weights that are replaced
        model = DinoVisionTransformer(loaded.config)
    model.load_state_dict(state_dict_of(loaded), strict=True, assign=True)
    return model.eval()


def state_dict_of(loaded: LoadedWeights) -> dict[str, Tensor]:
    """Return the weights as float32 tensors on the CPU."""
    return {name: _tensor(array) for name, array in loaded.arrays.items()}

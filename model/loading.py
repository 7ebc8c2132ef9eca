"""Finds and reads a backbone, given a name, a file or a folder. `load_model` and all commands use this function.

A source is one of these:

- the name of a published model, which is downloaded once
- a checkpoint of this project, which contains its architecture and preprocessing
- a weights file of Meta, timm or Hugging Face, which does not contain the name of its architecture
- the folder of a training run: its best checkpoint, or else its last one
- the folder of an artifact

Only the weights of an artifact are read and checked, not its graphs. This module does not import torch.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from model import downloads, zoo
from model.artifact import MANIFEST, WEIGHTS, verified_manifest
from model.config import CONFIGS, PosEmbedRule, ViTConfig
from model.convert import META_HUB, Array, CheckpointError, FloatArray, check_tensors, convert
from model.files import expanded
from model.preprocess import PreprocessSpec, read_spec
from model.weights import is_own_checkpoint, read_checkpoint, read_tensors, read_weights

RUN_CHECKPOINTS: Final = ("checkpoint.best.safetensors", "checkpoint.safetensors")
"""The checkpoints in the folder of a training run, in order of preference."""

_WEIGHT_SUFFIXES: Final = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".onnx")
_STATES: Final = "states"  # the folder in a run's folder that exists from the run's first state on
_OTHERS: Final = ("model.safetensors", "pytorch_model.bin")  # how transformers and timm name the file in their folders

Kind = Literal["published", "checkpoint", "foreign", "artifact"]


@dataclass(frozen=True)
class LoadedWeights:
    """A backbone's weights, and everything that its source says about it.

    Attributes:
        arrays: the tensors in float32, keyed by Meta's names.
        config: the shape of the backbone.
        kind: what the source is. A run's folder is a "checkpoint". "foreign" is a file of Meta, timm or Hugging Face.
        path: the file, or the folder of the artifact.
        preprocess: the preprocessing in the source. If it contains none, the reference for the patch size.
        name: the name in the source, else the name of the architecture, else that of the run's folder or of the file.
        provenance: the origin of the weights.
        licence: the SPDX identifier of the licence, or None if it is unknown.
        fingerprint: the fingerprint of an artifact, else None.
    """

    arrays: dict[str, FloatArray]
    config: ViTConfig
    kind: Kind
    path: Path
    preprocess: PreprocessSpec
    name: str
    provenance: Mapping[str, Any]
    licence: str | None = None
    fingerprint: str | None = None


def read_model(
    source: Path | str,
    *,
    arch: str | None = None,
    pos_embed_rule: PosEmbedRule | None = None,
    download: zoo.DownloadOptions = zoo.DEFAULT_DOWNLOAD,
) -> LoadedWeights:
    """Read the weights of a backbone.

    Args:
        source: a file, a run's folder, an artifact's folder, or the name of a published model. A `Path` is never a
            name. If a file or such a folder has the name of a published model, it is preferred.
        arch: the torch hub, timm or Hugging Face name of the architecture. It is used only for a file that does not
            contain its architecture.
        pos_embed_rule: the rule for resizing positions, instead of the one in the source (see `read_weights`).
        download: the options for downloading a published model.

    Raises:
        FileNotFoundError: `source` looks like a path, but there is no such file or folder.
        ValueError: no published model has the name `source`, the folder contains no model, `arch` is missing or
            unknown, or a file is damaged or does not contain the weights of this architecture. If a weight is NaN or
            infinite, the message names its tensor.
        zoo.DownloadError: the published weights cannot be downloaded.
        OSError: a file cannot be read.
    """
    path, entry = expanded(Path(source)), published(source) if isinstance(source, str) else None
    if (path / MANIFEST).is_file():
        loaded = _artifact(path)
    elif path.is_dir() and (checkpoint := run_checkpoint(path)) is not None:
        loaded = _own(checkpoint, folder=path)
    elif path.is_file():
        loaded = _own(path) if is_own_checkpoint(path) else _foreign(path, arch)
    elif entry is not None:
        loaded = _published(entry, download)
    elif path.is_dir():
        raise ValueError(_not_a_model(path))
    elif isinstance(source, Path) or looks_like_path(source):
        raise FileNotFoundError(f"{source}: no such file or folder{_similar_name(str(source))}")
    elif source in CONFIGS:
        raise ValueError(f"no weights are published for {source!r}: pass a file with weights=, or give its path")
    else:
        try:
            entry = zoo.resolve(source)
        except ValueError as error:
            raise ValueError(
                f"{error}. Other models are named by the path of their file or folder, such as data/artifacts/NAME"
            ) from None
        loaded = _published(entry, download)
    if pos_embed_rule is not None:
        loaded = replace(loaded, config=replace(loaded.config, pos_embed_rule=pos_embed_rule))
    return loaded


def run_checkpoint(folder: Path) -> Path | None:
    """Return the best checkpoint in a run's folder, or the last one, or None if there is no checkpoint."""
    return next((folder / name for name in RUN_CHECKPOINTS if (folder / name).is_file()), None)


def published(name: str) -> zoo.ZooEntry | None:
    """Return the entry of the published model with this name, or None if there is none."""
    try:
        return zoo.resolve(name)
    except ValueError:
        return None


def looks_like_path(source: str) -> bool:
    """Return whether a text is meant as a path and not as the name of a model."""
    separators = [separator for separator in (os.sep, os.altsep) if separator]
    return (
        any(separator in source for separator in separators)
        or source.startswith((".", "~"))
        or source.lower().endswith(_WEIGHT_SUFFIXES)
    )


def _artifact(path: Path) -> LoadedWeights:
    manifest = verified_manifest(path)
    converted = convert(read_tensors(path / WEIGHTS), manifest.config, META_HUB)
    return LoadedWeights(
        converted.arrays,
        manifest.config,
        "artifact",
        path,
        manifest.preprocess,
        manifest.name,
        manifest.provenance,
        manifest.licence,
        manifest.fingerprint,
    )


def _own(path: Path, folder: Path | None = None) -> LoadedWeights:
    """Read a checkpoint of this project. `folder` is the run's folder, if the user named the folder."""
    arrays, config, provenance = read_checkpoint(path)
    spec = read_spec(provenance.get("preprocess", {"patch_size": config.patch_size}))
    name = provenance.get("name") or (folder.resolve().name if folder else path.stem)
    return LoadedWeights(arrays, config, "checkpoint", path, spec, name, provenance)


def _foreign(path: Path, arch: str | None) -> LoadedWeights:
    if arch is None:
        fitting = fitting_architectures(read_tensors(path))
        example = fitting[0] if fitting else "dinov2_vits14"
        hint = f"; its tensors have the shapes of {' or '.join(fitting)}" if fitting else ""
        raise ValueError(
            f"{path} does not record its architecture: add --arch, e.g. --arch {example}, or in Python "
            f'load_model("{example}", weights="{path}"){hint}'
        )
    arrays, config = read_weights(arch, path)
    spec = read_spec({"patch_size": config.patch_size})
    return LoadedWeights(arrays, config, "foreign", path, spec, arch, {"file": path.name})


def _published(entry: zoo.ZooEntry, download: zoo.DownloadOptions) -> LoadedWeights:
    arrays, config = read_weights(entry.name, download=download)
    source = downloads.downloaded_source(entry, download)
    spec = read_spec({"patch_size": config.patch_size})
    path = download.cache_dir / source.filename
    return LoadedWeights(arrays, config, "published", path, spec, entry.name, {"url": source.url}, entry.licence)


def fitting_architectures(tensors: Mapping[str, Array]) -> list[str]:
    """Return the names of the architectures whose tensors have the names and shapes of these tensors."""
    shapes, names = {name: array.shape for name, array in tensors.items()}, []
    for name, config in CONFIGS.items():
        try:
            check_tensors(shapes, config)
        except CheckpointError:
            continue
        names.append(name)
    return names


def _not_a_model(path: Path) -> str:
    if (path / _STATES).is_dir():
        return f"{path}: the run has not written a checkpoint yet ({' or '.join(RUN_CHECKPOINTS)})"
    if other := next((path / name for name in _OTHERS if (path / name).is_file()), None):
        return f"{path} is a folder of another project: give its file {other} and the architecture (--arch)"
    return (
        f"{path} is a folder without a model: not an artifact (no {MANIFEST}) and not a run's folder "
        f"(no {RUN_CHECKPOINTS[-1]})"
    )


def _similar_name(source: str) -> str:
    """Return a hint at the published model with a similar name, such as the right spelling of a Hugging Face name."""
    names = [name for entry in zoo.ENTRIES.values() for name in (entry.name, *entry.aliases)]
    near = difflib.get_close_matches(source.lower(), names, n=1, cutoff=0.8)
    return f" (did you mean the published model {near[0]}?)" if near else ""

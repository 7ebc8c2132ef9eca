"""Load a model and its preprocessing from a checkpoint, an artifact (exported model) or a published model."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import zoo
from model.artifact import MANIFEST, WEIGHTS, bundled_artifact, find_artifacts, fingerprint, load_artifact
from model.checkpoint import load_checkpoint, load_model, load_state_dict_file
from model.preprocess import PreprocessSpec, changed_spec, read_spec
from model.vit import DinoVisionTransformer
from model.weights import is_own_checkpoint
from training.evaluate.settings import DenseSettings, TaskSettings


@dataclass(frozen=True)
class Backbone:
    """A model to evaluate, in eval mode, with its name and its preprocessing (`spec`).

    `fingerprint` is a hash of the model and its preprocessing. A checkpoint and the artifact exported from it have the
    same fingerprint.
    """

    name: str
    model: DinoVisionTransformer
    spec: PreprocessSpec
    fingerprint: str


def _artifact_of(source: str, data_dir: Path) -> Path | None:
    if source == "auto":
        return (find_artifacts(data_dir) or [bundled_artifact()])[0]
    if (Path(source) / MANIFEST).is_file():
        return Path(source)
    return next((path for path in find_artifacts(data_dir) if source in (path.name, path.name[:-9])), None)


def load_backbone(
    source: str, *, arch: str | None = None, data_dir: Path = Path("data"), device: torch.device | str = "cpu"
) -> Backbone:
    """Load a model to evaluate.

    Args:
        source: a checkpoint file, an artifact's folder, the name of an artifact in `data_dir`, the name of a published
            model (which is downloaded), or "auto". The value "auto" selects the newest artifact in `data_dir` or, if it
            has none, the bundled artifact.
        arch: torch hub's name for the architecture; needed only for files that do not contain this name.
        data_dir: folder that is searched for artifacts.
        device: device to which the model is moved.

    Raises:
        ValueError: no model has the name `source`, the file is damaged, or the file needs `arch`.
        zoo.DownloadError: a published model cannot be downloaded.
    """
    path, name = Path(source), source
    artifact = _artifact_of(source, data_dir)
    spec: PreprocessSpec | None = None
    if artifact is not None:
        with tempfile.TemporaryDirectory() as derived:  # loading writes derived files, which are deleted
            loaded = load_artifact(artifact, derived_dir=Path(derived))
        config, spec, name = loaded.manifest.config, loaded.manifest.preprocess, loaded.name
        state = load_state_dict_file(artifact / WEIGHTS)
        digest = loaded.fingerprint
    else:
        provenance: Mapping[str, Any] = {}
        if path.is_file() and is_own_checkpoint(path):
            state, config, provenance = load_checkpoint(path)
        elif path.exists() and arch is None:
            what = "does not name its architecture: add --arch, e.g. --arch dinov2_vits14"
            raise ValueError(f"{source} {what}" if path.is_file() else f"{source} is not an artifact: no {MANIFEST}")
        else:
            named = zoo.resolve(source).name if arch is None else arch
            other = load_model(named, weights=path if path.is_file() else None)
            state, config = other.state_dict(), other.config
        spec = read_spec(provenance.get("preprocess", {"patch_size": config.patch_size}))
        digest = fingerprint({key: tensor.numpy() for key, tensor in state.items()}, config, spec)
    model = DinoVisionTransformer(config)
    model.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return Backbone(name, model.eval().to(device), spec, digest)


def spec_for(own: PreprocessSpec, settings: TaskSettings) -> PreprocessSpec:
    """Return the preprocessing for a task: the model's own, with the task's `resize`, `crop` and `fit` if they are set.

    If `crop` is 0, or the task is segmentation or depth, the whole image is used, and `fit` has no effect.

    Raises:
        ValueError: `crop` is larger than `resize` or is not a multiple of the patch size, `fit` is "crop" without a
            `resize`, or `resize` is set although `fit` is "pad" or "squash".
    """
    if isinstance(settings, DenseSettings) or settings.crop == 0:
        resize = settings.resize or own.resize or own.crop
        return read_spec(own.model_dump() | {"crop": None, "resize": resize, "fit": "crop"})
    return changed_spec(own, fit=settings.fit, resize=settings.resize, crop=settings.crop)

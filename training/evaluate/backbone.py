"""Load a model and its preprocessing from any source that `model/loading.py` reads, or from the data folder."""

from dataclasses import dataclass
from pathlib import Path

import torch

from model.artifact import MANIFEST, bundled_artifact, find_artifacts, fingerprint
from model.checkpoint import network_of
from model.loading import read_model
from model.preprocess import PreprocessSpec, changed_spec, read_spec
from model.vit import DinoVisionTransformer
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
        source: a source of `model.loading.read_model` (a checkpoint or weights file, a run's folder, an artifact's
            folder, or the name of a published model), the name of an artifact in `data_dir`, or "auto". The value
            "auto" selects the newest artifact in `data_dir` or, if it has none, the bundled artifact.
        arch: torch hub's name for the architecture; needed only for files that do not contain their architecture.
        data_dir: folder that is searched for artifacts.
        device: device to which the model is moved.

    Raises:
        ValueError: no model has the name `source`, the file is damaged, contains a weight that is not finite, or needs
            `arch`.
        OSError: there is no such file, or it cannot be read.
        zoo.DownloadError: a published model cannot be downloaded.
    """
    loaded = read_model(_artifact_of(source, data_dir) or source, arch=arch)
    digest = loaded.fingerprint or fingerprint(loaded.arrays, loaded.config, loaded.preprocess)
    name = source if loaded.kind != "artifact" else f"{loaded.name}-{digest[:8]}"
    return Backbone(name, network_of(loaded).to(device), loaded.preprocess, digest)


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

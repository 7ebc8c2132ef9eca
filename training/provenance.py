"""Collect the provenance of a checkpoint: metadata about the run, the images and the code that produced it."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import torch

from model.artifact import WEIGHTS
from model.loading import run_checkpoint
from training.config import TrainConfig
from training.data.curation_facts import curation_facts


def code_revision() -> str:
    """Return the git revision of this code, or `unknown` if git is missing or the code is not in a git repository.

    `+changes` is appended if tracked files in this package have uncommitted changes.
    """
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder)]
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)  # noqa: S603
        changes = subprocess.run(  # noqa: S603
            [*git, "status", "--porcelain", "--untracked-files=no", "."], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision.stdout.strip() + ("+changes" if changes.stdout else "")


def initial_digest(init: str) -> dict[str, str]:
    """Return the name of a run's initial weights `init` and, if they are on disk, the sha256 of the file.

    The name does not include the folder, because the path may be private.
    """
    path = Path(init)
    if not path.exists():
        return {"name": init}  # published weights
    weights = (run_checkpoint(path) or path / WEIGHTS) if path.is_dir() else path
    return {"name": path.name, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}


def provenance(config: TrainConfig, data_sha256: str, n_photos: int, hardware: str) -> dict[str, Any]:
    """Return the metadata of a run's checkpoints.

    When a checkpoint is exported, the entries `name` and `preprocess` become the defaults for the artifact. The
    training loop adds the entry `steps` and, at the end of the run, `knn` and `whitened`.

    Args:
        config: the run's settings.
        data_sha256: the digest that `training.data.sources.source_digest` computes from the images.
        n_photos: the number of training images.
        hardware: a description of the hardware.

    Raises:
        ValueError: a dataset of the run that `dinov2 curate` has written is no longer complete.
    """
    private = {"data", "out", "init", "teacher", "wandb", "mlflow"}
    return {
        "name": f"{config.model}_{config.recipe}",
        "preprocess": config.eval_spec.model_dump(mode="json"),
        "recipe": config.recipe,
        "settings": config.model_dump(mode="json", exclude=private),
        "init": None if config.init is None else initial_digest(config.init),
        "teacher": None if config.teacher is None else Path(config.teacher).name,
        "photos": n_photos,
        "data_sha256": data_sha256,
        "curation": curation_facts(config.data),
        "revision": code_revision(),
        "torch": torch.__version__,
        "hardware": hardware,
    }

"""Where a checkpoint comes from, so that a figure can be traced to the run, the photos and the code that made it."""

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.artifact import WEIGHTS
from training.config import TrainConfig


def data_digest(paths: Sequence[Path], root: Path) -> str:
    """sha256 over the photos' paths below `root` and their contents, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def code_revision() -> str:
    """Git revision of this code, with `+changes` if the working tree differs; `unknown` without git."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)  # noqa: S603
        changes = subprocess.run(  # noqa: S603
            [*git, "status", "--porcelain", "--untracked-files=no", "."], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision.stdout.strip() + ("+changes" if changes.stdout else "")


def initial_digest(init: Path) -> dict[str, str]:
    """What a run started from: name and sha256 of the weights' file, without the folder that it lay in."""
    weights = init / WEIGHTS if init.is_dir() else init
    return {"name": init.name, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}


def provenance(config: TrainConfig, photos: Sequence[Path]) -> dict[str, Any]:
    """What a checkpoint says of itself; `name` and `preprocess` are what an artifact of it gets by default.

    The loop adds `steps` and, at the end, `knn`.

    Args:
        config: the run's settings.
        photos: what is trained on, below `config.data`.
    """
    return {
        "name": f"{config.model}_{config.recipe}",
        "preprocess": config.eval_spec.model_dump(mode="json"),
        "recipe": config.recipe,
        "settings": config.model_dump(mode="json", exclude={"data", "out", "init"}),
        "init": None if config.init is None else initial_digest(config.init),
        "photos": len(photos),
        "data_sha256": data_digest(photos, config.data),
        "revision": code_revision(),
        "torch": torch.__version__,
    }

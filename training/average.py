"""One checkpoint out of several: the mean of their weights, and what each of them and the mean are worth.

Weights of one run at different times, or of runs that share a long beginning, lie in one valley of the loss, and their
mean is often better than each (arXiv 1803.05407, arXiv 2203.05482). Often is not always, so each is evaluated beside
the mean, and the table says which to take.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import ViTConfig
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.dataset import photos_of, split_source
from training.evaluate.knn import evaluate_knn
from training.sources import open_source


def average_weights(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor over the state dicts, summed in float64."""
    return {
        key: (sum(state[key].double() for state in states) / len(states)).to(states[0][key].dtype)  # type: ignore[union-attr]
        for key in states[0]
    }


def average_checkpoints(paths: Sequence[Path], out: Path) -> None:
    """Write the mean of our checkpoints to `out`.

    Raises:
        ValueError: fewer than two, other networks, or whitened weights, whose bases differ (training/whiten.py).
    """
    if len(paths) < 2:
        raise ValueError(f"an average needs at least two checkpoints, not {len(paths)}")
    states: list[dict[str, Tensor]] = []
    sources = []
    first: tuple[ViTConfig, dict[str, object]] | None = None
    for path in paths:
        weights, config, facts = load_checkpoint(path)
        if first is not None and config != first[0]:
            raise ValueError(f"{path} is another network than {paths[0]}: {config}, not {first[0]}")
        if facts.get("settings", {}).get("whiten") is not None:
            raise ValueError(f"{path} is whitened: such weights are in a basis of their own; train with whiten=none")
        states.append(weights)
        sources.append({"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
        first = first or (config, facts)
    assert first is not None
    config, facts = first
    save_checkpoint(out, average_weights(states), config, {**facts, "knn": None, "average_of": sources})


def knn_of(path: Path, data: Path, ks: Sequence[int] = (10, 20)) -> dict[int, float]:
    """k-NN of a checkpoint's class token, by the preprocessing that it names.

    Raises:
        ValueError: no checkpoint, or no photos to hold out.
    """
    weights, config, facts = load_checkpoint(path)
    backbone = DinoVisionTransformer(config)
    backbone.load_state_dict(weights)
    settings = facts.get("settings", {})
    with tempfile.TemporaryDirectory() as index:
        source = open_source(data, Path(index))
    train, held_out = split_source(source, settings.get("held_out_share", 0.1), settings.get("seed", 0))
    spec = PreprocessSpec.model_validate(facts["preprocess"])
    with torch.inference_mode():
        return evaluate_knn(backbone, photos_of(train), photos_of(held_out), spec, ks)["cls"]

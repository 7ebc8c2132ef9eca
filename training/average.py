"""One checkpoint out of several: the mean of their weights, and what each of them and the mean are worth.

Weights of one run at different times, or of runs that share a long beginning, lie in one valley of the loss, and their
mean is often better than each (arXiv 1803.05407, arXiv 2203.05482). Often is not always, so each is evaluated beside
the mean, and the table says which to take. Runs that share no beginning have nothing in common to average: the table
shows that too.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import ViTConfig
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.config import TrainConfig
from training.data.dataset import Photo, Source, photos_of, split_source
from training.data.sources import open_source
from training.evaluate.knn import evaluate_knn

KS = (10, 20)
UNLIKE = {"steps", "knn"}  # facts of one checkpoint, not of a mean


def average_weights(states: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor over the state dicts, summed in float64; one state at a time is looked at.

    Raises:
        ValueError: no state at all.
    """
    sums: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    count = 0
    for count, state in enumerate(states, start=1):  # noqa: B007 - the last number is the divisor
        if not sums:
            sums = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in state.items()}
            types = {key: tensor.dtype for key, tensor in state.items()}
        assert state.keys() == sums.keys()
        for key, tensor in state.items():
            sums[key] += tensor
    if not count:
        raise ValueError("nothing to average")
    return {key: (total / count).to(types[key]) for key, total in sums.items()}


def average_checkpoints(paths: Sequence[Path], out: Path) -> None:
    """Write the mean of our checkpoints to `out`.

    What it says of itself is what all of them say, with the preprocessing and the name of the first; `average_of` lists
    them.

    Raises:
        ValueError: fewer than two, other networks, whitened weights, whose bases differ (training/whiten.py), a file
            that is no checkpoint of ours, or an `out` that is one of them or has no folder.
        OSError: a file cannot be read or written.
    """
    if len(paths) < 2:
        raise ValueError(f"an average needs at least two checkpoints, not {len(paths)}")
    if out.resolve() in {path.resolve() for path in paths}:
        raise ValueError(f"{out} is one of the checkpoints to average: choose another file for the mean")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: the folder {out.parent} does not exist")
    configs, facts = list[ViTConfig](), list[dict[str, Any]]()

    def loaded(path: Path) -> dict[str, Tensor]:
        weights, config, said = load_checkpoint(path)
        if configs and config != configs[0]:
            raise ValueError(f"{path} is another network than {paths[0]}: {config}, not {configs[0]}")
        if is_whitened(said):
            raise ValueError(
                f"{path} is whitened: such weights are in a basis of their own; average a run's earlier ones"
            )
        configs.append(config)
        facts.append(said)
        return weights

    mean = average_weights(loaded(path) for path in paths)
    sources = [
        {"name": path.name, "sha256": _sha256(path), "steps": f.get("steps")}
        for path, f in zip(paths, facts, strict=True)
    ]
    own: dict[str, Any] = {key: facts[0][key] for key in ("name", "preprocess") if key in facts[0]}
    save_checkpoint(out, mean, configs[0], {**in_common(facts), **own, "average_of": sources})


def is_whitened(facts: dict[str, Any]) -> bool:
    """Whether a checkpoint's weights are. Whitening is a run's last act: what it keeps before is as trained."""
    return bool(facts.get("whitened"))


def in_common(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all say alike; of dictionaries (`settings`), the entries that are alike."""
    first, *rest = facts
    found: dict[str, Any] = {}
    for key, value in first.items():
        others = [other.get(key) for other in rest]
        if key in UNLIKE:
            continue
        if all(other == value for other in others):
            found[key] = value
        elif isinstance(value, dict) and all(isinstance(other, dict) for other in others):
            found[key] = in_common([value, *others])  # type: ignore[list-item]
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_for(source: Source, facts: Sequence[dict[str, Any]]) -> tuple[list[Photo], list[Photo]]:
    """Photos that k-NN looks among, and images that none of the checkpoints was trained on.

    Data with train and val is split so. Otherwise each run held out its share (`held_out_share` and `seed` of its
    settings) and trained on what others held out, so only what all held out is fair to the mean of them.

    Raises:
        ValueError: nothing is left to test on, or there are no labels of at least two classes.
    """
    default = {name: TrainConfig.model_fields[name].default for name in ("held_out_share", "seed")}
    settings = [f.get("settings", {}) for f in facts]
    drawn = dict.fromkeys(tuple(s.get(name, value) for name, value in default.items()) for s in settings)
    held_out = [{photo.name for photo in photos_of(split_source(source, share, seed)[1])} for share, seed in drawn]
    fair = set.intersection(*held_out)
    train_images, test = list[Photo](), list[Photo]()
    for photo in photos_of(source):
        (test if photo.name in fair else train_images).append(photo)
    if not test:
        how = ", ".join(f"held_out_share={share} seed={seed}" for share, seed in drawn)
        raise ValueError(f"no image was held out by every checkpoint ({how}): give data with train and val in it")
    labels = {photo.label for photo in train_images}
    if len(labels) < 2 or None in labels:
        raise ValueError("k-NN needs images with labels, of at least two classes")
    return train_images, test


def knn_of(paths: Sequence[Path], mean: Path, data: str, ks: Sequence[int] = KS) -> tuple[list[dict[int, float]], int]:
    """k-NN of the class token of each checkpoint and, last, of their mean, by the preprocessing that each names.

    Args:
        paths: what was averaged.
        mean: what came out.
        data: a folder of images, tar shards or a dataset on disk, as for training.
        ks: numbers of neighbours.

    Returns:
        accuracy by k of each, and on how many images.

    Raises:
        ValueError: no checkpoint, or no data to test on fairly (`split_for`).
        OSError: the images' place does not answer.
    """
    with tempfile.TemporaryDirectory() as index:  # of tar shards
        train_images, test = split_for(open_source(data, Path(index)), [load_checkpoint(path)[2] for path in paths])
        return [_knn(path, train_images, test, ks) for path in (*paths, mean)], len(test)


def _knn(path: Path, train_images: list[Photo], test: list[Photo], ks: Sequence[int]) -> dict[int, float]:
    weights, config, facts = load_checkpoint(path)
    backbone = DinoVisionTransformer(config)
    backbone.load_state_dict(weights)
    backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    spec = PreprocessSpec.model_validate(facts.get("preprocess", {"patch_size": config.patch_size}))
    return evaluate_knn(backbone, train_images, test, spec, ks)["cls"]

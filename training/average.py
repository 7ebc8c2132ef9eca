"""Average the weights of several checkpoints, and measure whether the mean is better than each checkpoint.

If checkpoints come from different times in one run, or from runs that continue the same long run, the mean of their
weights is often better than each checkpoint (arXiv 1803.05407, arXiv 2203.05482). The mean is not always better, so the
mean and every checkpoint are evaluated. If the runs have no initial training in common, the mean is useless, and the
evaluation shows this.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import ViTConfig
from model.preprocess import read_spec
from model.vit import DinoVisionTransformer
from training.config import TrainConfig
from training.data.dataset import Photo, Source, photos_of, split_source
from training.data.sources import open_source
from training.evaluate.knn import evaluate_knn, labels_of, with_labels
from training.evaluate.meaning import check_classification, not_finite

KS = (10, 20)
SEARCHED, TEST = "the part that k-NN searches", "the held-out part"
UNLIKE = {"steps", "knn"}  # facts that hold for one checkpoint and not for a mean


def average_weights(states: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average each tensor over the state dicts in float64, and return the means in the tensors' original data types.

    The state dicts are read one at a time.

    Raises:
        ValueError: `states` is empty, or a mean is not finite.
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
    mean = {key: (total / count).to(types[key]) for key, total in sums.items()}
    if (problem := not_finite(mean)) is not None:
        raise ValueError(f"the mean cannot be used: the tensor {problem}")
    return mean


def average_checkpoints(paths: Sequence[Path], out: Path) -> None:
    """Average the weights of this project's checkpoints `paths`, and write the mean to the checkpoint `out`.

    The metadata of `out` contains the entries that are the same in all checkpoints, and `average_of`, a list of the
    checkpoints. The entries `name` and `preprocess` are copied from the first checkpoint.

    Raises:
        ValueError: there are fewer than two checkpoints, their networks differ, a file is not a checkpoint of this
            project, a checkpoint is whitened (its weights are in another basis, see training/whiten.py), a weight is
            not finite, `out` is one of the checkpoints, or the folder of `out` does not exist.
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
        weights, config, metadata = load_checkpoint(path)
        if configs and config != configs[0]:
            raise ValueError(f"{path} has a different network from {paths[0]}: {config}, not {configs[0]}")
        if is_whitened(metadata):
            raise ValueError(
                f"{path} is whitened: its weights are in another basis; average earlier checkpoints of the run"
            )
        if (problem := not_finite(weights)) is not None:
            raise ValueError(f"{path}: the tensor {problem}; leave this checkpoint out")
        configs.append(config)
        facts.append(metadata)
        return weights

    mean = average_weights(loaded(path) for path in paths)
    sources = [
        {"name": path.name, "sha256": _sha256(path), "steps": f.get("steps")}
        for path, f in zip(paths, facts, strict=True)
    ]
    own: dict[str, Any] = {key: facts[0][key] for key in ("name", "preprocess") if key in facts[0]}
    save_checkpoint(out, mean, configs[0], {**in_common(facts), **own, "average_of": sources})


def is_whitened(facts: dict[str, Any]) -> bool:
    """Return whether the metadata `facts` describes a whitened checkpoint. A run whitens only its last checkpoint."""
    return bool(facts.get("whitened"))


def in_common(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the entries that are the same in all dictionaries of `facts`, except `steps` and `knn`.

    If the values of an entry are dictionaries that differ, the value in the result is a dictionary of the entries that
    are the same in all of them.
    """
    first, *rest = facts
    common: dict[str, Any] = {}
    for key, value in first.items():
        others = [other.get(key) for other in rest]
        if key in UNLIKE:
            continue
        if all(other == value for other in others):
            common[key] = value
        elif isinstance(value, dict) and all(isinstance(other, dict) for other in others):
            common[key] = in_common([value, *others])  # type: ignore[list-item]
    return common


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class FairTest:
    """The images that k-NN searches, the test images, and sentences about what was left out."""

    searched: list[Photo]
    test: list[Photo]
    notes: list[str]


def split_for(source: Source, facts: Sequence[dict[str, Any]]) -> FairTest:
    """Split the images of `source` into the images that k-NN searches and the test images.

    Images without a label are left out. The test images are images on which no checkpoint was trained. If the data is
    divided into train and val, the test images are those in val. Otherwise each run held out its own images, which
    other runs may have trained on. The test images are then the images that every run held out.

    Args:
        source: the images.
        facts: the metadata of each checkpoint. It includes the settings `held_out_share` and `seed`, which determine
            the images that the checkpoint's run held out.

    Raises:
        ValueError: there are no test images, or every checkpoint would have the same accuracy, for instance because the
            images that k-NN searches have no labels or belong to fewer than two classes.
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
        raise ValueError(f"no image was held out by every checkpoint ({how}): use data with a train and val split")
    (searched, notes), (test, more) = with_labels(train_images, SEARCHED), with_labels(test, TEST)
    labels, classes = labels_of(searched)
    check_classification(labels, labels_of(test, classes)[0], SEARCHED, TEST)
    return FairTest(searched, test, [*notes, *more])


def open_test(paths: Sequence[Path], data: str) -> FairTest:
    """Open the images for a fair test of the checkpoints `paths`.

    `data` is a folder of images, tar shards or a dataset on disk, as for training.

    Raises:
        ValueError: a file is not a checkpoint, or there are no images for a fair test (see `split_for`).
        OSError: the images cannot be reached.
    """
    with tempfile.TemporaryDirectory() as index:  # for the index of tar shards, which is also in memory
        return split_for(open_source(data, Path(index)), [load_checkpoint(path)[2] for path in paths])


def knn_of(
    paths: Sequence[Path], mean: Path, fair: FairTest, ks: Sequence[int] = KS
) -> tuple[list[dict[int, float]], list[str]]:
    """Compute the k-NN accuracy with class tokens for each checkpoint and for the mean of all checkpoints.

    Each checkpoint is tested with the preprocessing in its metadata.

    Args:
        paths: the checkpoints that were averaged.
        mean: the checkpoint with the mean of their weights.
        fair: the images from `open_test`.
        ks: the values of k, the number of neighbours. Values above the number of neighbours are left out.

    Returns:
        two values: a list of dictionaries, and sentences about what was left out. Each dictionary maps k to the
        accuracy of one checkpoint, in the order of `paths`. The last dictionary is for `mean`.

    Raises:
        ValueError: a file is not a checkpoint, or every checkpoint would have the same accuracy.
        OSError: the images cannot be reached.
    """
    notes = list(fair.notes)
    accuracies = [_knn(path, fair, ks, notes.append) for path in (*paths, mean)]
    return accuracies, list(dict.fromkeys(notes))


def _knn(path: Path, fair: FairTest, ks: Sequence[int], say: Callable[[str], object]) -> dict[int, float]:
    weights, config, facts = load_checkpoint(path)
    backbone = DinoVisionTransformer(config)
    backbone.load_state_dict(weights)
    backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    spec = read_spec(facts.get("preprocess", {"patch_size": config.patch_size}))
    said = list[str]()
    accuracy = evaluate_knn(backbone, fair.searched, fair.test, spec, ks, said.append)
    if not accuracy:
        raise ValueError(f"{path}: {'; '.join(said)}")
    for note in said:
        say(note)
    return accuracy["cls"]

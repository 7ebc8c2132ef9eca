"""k-NN classification on frozen features: how DINO and DINOv2 are compared without training anything.

Protocol (facebookresearch/dinov2, `dinov2/eval/knn.py`): features L2-normalised; the k most similar training photos
vote with weight exp(cosine / 0.07); the class with most votes wins. (The original divides the weights by their sum over
the 200 nearest, which changes no vote.) The original's preprocessing is short side 256, crop 224; here it is the
model's own spec, stated beside every figure.

Legend: n training photos, m test photos, D features, C classes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from model.preprocess import PreprocessSpec, preprocess
from model.vit import DinoVisionTransformer
from training.dataset import read_photo

TEMPERATURE = 0.07
Pooling = Literal["cls", "mean", "cls+mean"]
POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "cls+mean")


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    *,
    leave_one_out: bool = False,
) -> dict[int, float]:
    """Share of test photos classified rightly, for each k.

    Args:
        train: features [n, D], any scale.
        train_labels: class numbers [n].
        test, test_labels: [m, D], [m].
        ks: neighbours; more than there are photos means all of them.
        leave_one_out: `test` is `train`, and a photo is never its own neighbour.
    """
    similarity = F.normalize(test.float(), dim=1) @ F.normalize(train.float(), dim=1).T  # [m, n]
    if leave_one_out:
        assert similarity.shape[0] == similarity.shape[1]
        similarity.fill_diagonal_(-torch.inf)
    n_classes = int(torch.cat((train_labels, test_labels)).max()) + 1
    accuracy = {}
    for k in ks:
        top = similarity.topk(min(k, similarity.shape[1] - int(leave_one_out)), dim=1)
        votes = torch.zeros(len(test), n_classes, device=test.device)
        votes.scatter_add_(1, train_labels[top.indices], (top.values / TEMPERATURE).exp())
        accuracy[k] = (votes.argmax(dim=1) == test_labels).float().mean().item()
    return accuracy


def labels_of(paths: Sequence[Path], classes: dict[str, int] | None = None) -> tuple[Tensor, dict[str, int]]:
    """Class numbers by the name of the folder a photo lies in; `classes` is extended by names it lacks."""
    classes = dict(classes or {})
    numbers = [classes.setdefault(path.parent.name, len(classes)) for path in paths]
    return torch.tensor(numbers), classes


def _batches(
    paths: Sequence[Path], spec: PreprocessSpec, batch_size: int
) -> Iterator[tuple[list[int], npt.NDArray[np.float32]]]:
    """Preprocessed photos of one size, [b, 3, h, w], with their positions in `paths`."""
    waiting: dict[tuple[int, ...], list[tuple[int, npt.NDArray[np.float32]]]] = {}
    for index, path in enumerate(paths):
        pixels = preprocess(read_photo(path), spec)
        same_size = waiting.setdefault(pixels.shape, [])
        same_size.append((index, pixels))
        if len(same_size) == batch_size:
            yield [i for i, _ in same_size], np.stack([p for _, p in same_size])
            same_size.clear()
    for rest in waiting.values():
        if rest:
            yield [i for i, _ in rest], np.stack([p for _, p in rest])


@torch.inference_mode()
def extract_features(
    model: DinoVisionTransformer, paths: Sequence[Path], spec: PreprocessSpec, batch_size: int = 64
) -> dict[Pooling, Tensor]:
    """Features [n, D] (cls+mean: [n, 2D]) of photos, float32 on the CPU. The halves of cls+mean have unit length each.

    Raises:
        ValueError: a photo that cannot be read.
    """
    was_training, device = model.training, model.cls_token.device
    model.eval()
    cls = torch.empty(len(paths), model.embed_dim)
    mean = torch.empty(len(paths), model.embed_dim)
    for positions, pixels in _batches(paths, spec, batch_size):
        out = model.forward_features(torch.from_numpy(pixels).to(device))
        cls[positions] = out["x_norm_clstoken"].float().cpu()
        mean[positions] = out["x_norm_patchtokens"].float().mean(dim=1).cpu()
    model.train(was_training)
    both = torch.cat((F.normalize(cls, dim=1), F.normalize(mean, dim=1)), dim=1)
    return {"cls": cls, "mean": mean, "cls+mean": both}


def evaluate_knn(
    model: DinoVisionTransformer,
    train: Sequence[Path],
    test: Sequence[Path],
    spec: PreprocessSpec,
    ks: Sequence[int] = (1, 10, 20),
) -> dict[Pooling, dict[int, float]]:
    """k-NN accuracy of `test` photos among `train` photos, by pooling and k. Classes are folder names."""
    train_labels, classes = labels_of(train)
    test_labels, _ = labels_of(test, classes)
    known, unknown = extract_features(model, train, spec), extract_features(model, test, spec)
    return {p: knn_accuracy(known[p], train_labels, unknown[p], test_labels, ks) for p in POOLINGS}

"""Two proxies for continuing from released weights on a company's own images, and the figures of a backbone on them.

- `cifar`: the bundled model, trained on groceries, continues on CIFAR-10's images, enlarged to 56 pixels.
- `grocery`: a backbone trained on CIFAR-10 (recipe `cifar`) continues on Grocery Store images of 48 pixels.

A `Proxy` has three pools. The company's own images are a random part of `own`. The reported k-NN accuracy classifies
the `queries` by the labelled `neighbours`, which are the same for all runs, because it is the backbone that is compared
and not the number of neighbours. For CIFAR-10, the pools are disjoint parts of the training images. For groceries, the
neighbours are all 2,640 training images, and the queries are the 296 val images, which were taken in other shops. As
296 queries are few, the accuracy of leave-one-out on the training images is reported too. It excludes the ten images
before and after the query in the sequence of its class, which show the same shelf (decision 0010).

The measures that choose a checkpoint see only the company's own images.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.artifact import bundled_artifact
from model.cpus import available_cpus
from model.preprocess import PreprocessSpec, preprocess
from model.vit import DinoVisionTransformer
from training.data.dataset import find_images, read_photo, squash
from training.evaluate.knn import knn_accuracy
from training.evaluate.own_images import KS
from training.setup import make_autocast

GAP = 10  # images before and after a query that are not its neighbours
PER_CLASS = (300, 300, 200)  # CIFAR-10's images in `own`, `neighbours` and `queries`

COMMON: dict[str, Any] = {
    "n_local": 4,
    "local_scale": (0.1, 0.35),
    "blur": (0.0, 0.0, 0.0),
    "solarize": 0.0,
    "head_hidden_dim": 512,
    "head_bottleneck_dim": 128,
}


@dataclass(frozen=True)
class Pool:
    """Images as network inputs [n, 3, h, w], with class numbers [n] and positions in the sequence of the class [n].

    `squares` uint8 [n, 3, S, S] and `aspect` [n] are what training reads (see `training/data/crops.py`).
    """

    inputs: Tensor
    labels: Tensor
    sequence: Tensor
    squares: Tensor
    aspect: Tensor


@dataclass(frozen=True)
class Proxy:
    """A backbone to start from, the settings of the network and the crops, and three pools of images.

    Training on one image takes about `cost` times as long as in the proxy `cifar`.
    """

    name: str
    init: str
    settings: dict[str, Any]
    own: Pool
    neighbours: Pool
    queries: Pool
    cost: float = 1.0


def read_pool(paths: Sequence[Path], side: int, spec: PreprocessSpec, classes: Sequence[str]) -> Pool:
    """Decode the images `paths`, whose folders are named after their classes."""

    def read(path: Path) -> tuple[Any, Any, float]:
        pixels = read_photo(path)
        square, aspect = squash(pixels, side)
        return preprocess(pixels, spec).astype(np.float16), square, aspect

    with ThreadPoolExecutor(available_cpus()) as threads:
        inputs, squares, aspect = zip(*threads.map(read, paths), strict=True)
    seen: dict[str, int] = {}
    sequence = []
    for path in paths:
        sequence.append(seen.get(path.parent.name, 0))
        seen[path.parent.name] = sequence[-1] + 1
    return Pool(
        torch.from_numpy(np.stack(inputs)),
        torch.tensor([classes.index(path.parent.name) for path in paths]),
        torch.tensor(sequence),
        torch.from_numpy(np.stack(squares)),
        torch.tensor(aspect),
    )


def cifar_proxy(folder: Path) -> Proxy:
    """Return the proxy `cifar` from a folder with one folder of images per class."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [sorted((folder / name).iterdir()) for name in classes]
    ends = np.cumsum((0, *PER_CLASS))
    pools = [[path for of_class in files for path in of_class[a:b]] for a, b in itertools.pairwise(ends)]
    spec = PreprocessSpec(resize=56, crop=56, patch_size=14)
    sizes = {"cache_size": 64, "global_size": 56, "local_size": 28, "eval_resize": 56, "eval_crop": 56}
    vit = {"depth": 4, "img_size": 70, "layerscale_init": 1.0}
    read = [read_pool(paths, 64, spec, classes) for paths in pools]
    return Proxy("cifar", str(bundled_artifact()), COMMON | sizes | {"vit": vit}, *read)


def grocery_proxy(folder: Path, checkpoint: Path) -> Proxy:
    """Return the proxy `grocery` from the folder with `train` and `val`, and the checkpoint of the recipe `cifar`."""
    classes = sorted(path.name for path in (folder / "train").iterdir())
    spec = PreprocessSpec(resize=60, crop=48, patch_size=4)
    sizes = {"cache_size": 80, "global_size": 36, "local_size": 16, "eval_resize": 60, "eval_crop": 48}
    colours = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.4, "hue": 0.05, "gray": 0.1}  # as in recipe grocery
    vit = {"embed_dim": 128, "depth": 4, "num_heads": 2, "patch_size": 4, "img_size": 32, "layerscale_init": 1.0}
    own, queries = (read_pool(find_images(folder / part), 80, spec, classes) for part in ("train", "val"))
    settings = COMMON | sizes | colours | {"vit": vit, "local_scale": (0.05, 0.3)}
    return Proxy("grocery", str(checkpoint), settings, own, own, queries, cost=2.0)


@torch.no_grad()
def class_tokens(model: DinoVisionTransformer, inputs: Tensor) -> Tensor:
    """Compute the class tokens [n, D] of network inputs [n, 3, h, w]."""
    with make_autocast("auto", inputs.device):
        parts = [model.forward_features(part.float())["x_norm_clstoken"] for part in inputs.split(256)]
    return torch.cat(parts).float()


def leave_one_out_far(features: Tensor, labels: Tensor, sequence: Tensor) -> dict[int, float]:
    """Compute the leave-one-out k-NN accuracy, without neighbours of the same class that are close in its sequence."""
    unit = F.normalize(features, dim=1)
    similarity = unit @ unit.T
    near = (labels[:, None] == labels) & ((sequence[:, None] - sequence).abs() <= GAP)
    values, indices = similarity.masked_fill_(near, -torch.inf).topk(max(KS), dim=1)
    weights, votes = (values / 0.07).exp(), labels[indices]
    accuracy = {}
    for k in KS:
        sums = torch.zeros(len(unit), int(labels.max()) + 1).scatter_add_(1, votes[:, :k], weights[:, :k])
        accuracy[k] = float((sums.argmax(dim=1) == labels).float().mean())
    return accuracy


def reported(model: DinoVisionTransformer, proxy: Proxy) -> dict[str, float]:
    """Return the k-NN accuracies of a backbone that a run cannot see: `10` for k = 10, and `mean` over all k.

    The mean over k is less noisy than the accuracy for a single k.
    """
    neighbours = class_tokens(model, proxy.neighbours.inputs)
    queries = class_tokens(model, proxy.queries.inputs)
    labels = proxy.neighbours.labels
    accuracy = {"knn": knn_accuracy(neighbours, labels, queries, proxy.queries.labels, KS)}
    if proxy.neighbours is proxy.own:
        accuracy["far"] = leave_one_out_far(neighbours, labels, proxy.own.sequence)
    means = {f"{name}_mean": sum(by_k.values()) / len(by_k) for name, by_k in accuracy.items()}
    return {f"{name}_10": by_k[10] for name, by_k in accuracy.items()} | means

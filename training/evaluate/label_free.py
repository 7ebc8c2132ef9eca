"""Measures of a network on held-out images that need no classes.

Augmented retrieval: each image is found among all held-out images by a random crop of itself. The crop shows a part of
the image, and its colours, light and sharpness are changed. A network that describes what is in an image finds it, and
a collapsed network does not. The crops are the same in every call, so two calls differ only if the networks differ.

RankMe (arXiv 2210.02885) is the effective rank of the features.

The decision docs/decisions/0034-signs-of-collapse.md shows how closely each measure follows k-NN.

Legend: n images, D features, S side of a square.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.decode import Pixels
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.data.augment import Geometry, Jitter, View, augmented_views
from training.data.dataset import Photo, read_photo, squash
from training.evaluate.features import ForwardSettings, compute_features, default_workers, in_order
from training.evaluate.own_images import view_likelihood
from training.randomness import SampleRandom, sample_keys
from training.spread import rankme_share, token_spread

MOST_IMAGES = 1000
BATCH = 64
QUERY_SCALE = (0.3, 0.6)  # area of a query crop as a share of the image's area
QUERY_JITTER = Jitter()  # DINOv2's colour changes
QUERY_BLUR = 0.5
SQUARE = 2  # side of the squares that crops are cut from, in sides of a crop; fewer pixels would blur the crops


@dataclass(frozen=True)
class LabelFree:
    """Label-free measures of a network on `n_images` held-out images.

    `view_certainty` says how surely an image is found by its own augmented crop: 1 + l / ln n, where l is the mean
    log-likelihood of n images (`own_images.view_likelihood`). It is 0 if the crops tell nothing, and 1 if each finds
    its image for certain. `retrieval_1` and `retrieval_5` are the shares of images that their own augmented crop finds
    first, and among the first five. `rankme_share` is RankMe of the class tokens as a share of its maximum. `spread` is
    1 minus the mean cosine of two class tokens.
    """

    n_images: int
    view_certainty: float
    retrieval_1: float
    retrieval_5: float
    rankme_share: float
    spread: float

    @property
    def retrieval(self) -> float:
        """Return the mean of `retrieval_1` and `retrieval_5`, the measure of a run without classes."""
        return (self.retrieval_1 + self.retrieval_5) / 2


def recall_of_own(queries: Tensor, database: Tensor, ks: Sequence[int]) -> list[float]:
    """Return, for each k, the share of queries whose own image is among the k most similar ones.

    Row i of `queries` [n, D] is a feature of a crop of image i, and row i of `database` [n, D] is a feature of image i.
    Images that are exactly as similar as the own image count as more similar, so a network that maps all images to the
    same vector finds nothing.
    """
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(database.float(), dim=1).T  # [n, n]
    better = (similarity >= similarity.diagonal()[:, None]).sum(dim=1) - 1
    return [float((better < k).float().mean()) for k in ks]


@dataclass(frozen=True)
class QueryCrops:
    """How the query crops are made: the kind of crop, the colour changes, and the seed of the random choices."""

    view: View
    jitter: Jitter = QUERY_JITTER
    seed: int = 0


def query_crops(spec: PreprocessSpec, seed: int = 0) -> QueryCrops:
    """Return the settings of query crops for a network whose input is defined by `spec`.

    A query crop has as many pixels as the network's input.

    Raises:
        ValueError: `spec` does not set the side of the input (`crop`).
    """
    if spec.crop is None:
        raise ValueError("crop=None: the measures without classes need a square input; set crop to its side in pixels")
    return QueryCrops(View(spec.crop, QUERY_SCALE, QUERY_BLUR), seed=seed)


@torch.no_grad()
def query_features(
    model: DinoVisionTransformer, photos: Sequence[Path | Photo], crops: QueryCrops, workers: int | None = None
) -> Tensor:
    """Compute the class tokens of one augmented crop of each image, float32 [n, D] on the CPU.

    The random choices depend on the seed and on the position of an image in `photos`.

    Raises:
        ValueError: an image cannot be read.
    """
    was_training, device = model.training, model.cls_token.device
    side = SQUARE * crops.view.size

    def read(photo: Path | Photo) -> tuple[Pixels, float]:
        return squash(read_photo(photo), side)

    tokens = []
    model.eval()
    try:
        for start in range(0, len(photos), BATCH):
            squares = list(in_order(read, photos[start : start + BATCH], workers or default_workers()))
            pixels = torch.from_numpy(np.stack([square for square, _ in squares])).to(device)
            aspect = torch.tensor([aspect for _, aspect in squares])
            random = SampleRandom(sample_keys(crops.seed, 0, torch.arange(start, start + len(squares))))
            views = augmented_views(pixels, aspect, crops.view, 1, crops.jitter, Geometry(), random)
            tokens.append(model.forward_features(views)["x_norm_clstoken"].float().cpu())
    finally:
        model.train(was_training)
    return torch.cat(tokens)


def measure_label_free(
    model: DinoVisionTransformer,
    photos: Sequence[Path | Photo],
    spec: PreprocessSpec,
    seed: int = 0,
    *,
    most: int = MOST_IMAGES,
    workers: int | None = None,
) -> LabelFree:
    """Compute the label-free measures of a network on held-out images. Unreadable images are left out.

    Args:
        model: the network; its mode (train or eval) is restored afterwards.
        photos: the held-out images. Pass the same images in the same order for all figures that are compared.
        spec: preprocessing.
        seed: seed of the query crops.
        most: maximum number of images. They are spread evenly over `photos`.
        workers: number of threads that read images; None: one per CPU, at most 8.

    Raises:
        ValueError: fewer than two images can be read, a feature is not finite, or `spec` does not set the side of the
            input.
    """
    crops = query_crops(spec, seed)
    chosen = photos[:: max(1, -(-len(photos) // most))]
    found = compute_features(model, chosen, spec, forward=ForwardSettings(workers=workers))
    readable = [chosen[at] for at in found.kept.tolist()]
    if len(readable) < 2:
        raise ValueError(f"{len(readable)} of {len(chosen)} held-out images can be read; the measures need two")
    database, queries = found.pooled("cls"), query_features(model, readable, crops, workers)
    one, five = recall_of_own(queries, database, (1, 5))
    certainty = 1 + view_likelihood(queries, database) / math.log(len(readable))
    return LabelFree(len(readable), certainty, one, five, rankme_share(database), float(token_spread(database)))

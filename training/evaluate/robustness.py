"""Robustness: how much an image's class token changes when the image is cropped, blurred, recoloured or compressed.

Augmentations in training are random. Here each image gets the same eight changes, so all networks get the same test.
The changes apply to the network's input (the preprocessed image as uint8 pixels), not to the original image. A blur of
2 pixels therefore has the same strength for large and small originals.

Two metrics are computed for each change, from class tokens:

- cosine: the mean cosine similarity between an image and its changed version. A collapsed network gives all images the
  same features and has cosine 1. The mean cosine between different images is therefore reported as well.
- recall@1: the share of changed images for which the most similar unchanged image is their own original. Unlike the
  cosine, it can be compared between networks. It falls as the number of images grows, so the number of images is
  reported too.

Legend: n images, b images in a batch, D width, s side of the network's input.
"""

from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.data.augment import (
    BRIGHTNESS,
    CONTRAST,
    SATURATION,
    adjust_hue_,
    blend_,
    gaussian_blur,
    grayscale,
)
from training.data.boxes import crop_resize
from training.data.dataset import Photo, Skipped
from training.evaluate.features import check_features, default_workers, in_order, name_of, read_pixels
from training.evaluate.knn import nearest

CROP_SIDE = 0.7
BLUR_SIGMA = 2.0
BRIGHTER, FLATTER, PALER = 1.4, 0.6, 0.4
HUE_TURN = 0.05
JPEG_QUALITY = 20


def centre_crop(pixels: Tensor) -> Tensor:
    """Cut out the centre of each image, and enlarge it to the full size.

    The sides of the centre are `CROP_SIDE` times those of the image, so the centre covers about half of the image.

    `pixels` are uint8 [b, 3, s, s]. The result is float [b, 3, s, s] in 0..1.
    """
    box = pixels.new_tensor([(1 - CROP_SIDE) / 2] * 2 + [CROP_SIDE] * 2, dtype=torch.float32).expand(len(pixels), 4)
    still = torch.zeros(len(pixels), 2, dtype=torch.bool)
    side = pixels.shape[-1]
    return crop_resize(pixels, torch.arange(len(pixels)), box, side, still, side, "bilinear")


def jpeg(pixels: Tensor) -> Tensor:
    """Compress each image as a JPEG of quality `JPEG_QUALITY`, and decompress it.

    Pillow's JPEG stores colour at half the resolution. `pixels` are uint8 [b, 3, s, s]. The result is float
    [b, 3, s, s] in 0..1.
    """
    decoded = []
    for photo in pixels.permute(0, 2, 3, 1).numpy():
        file = BytesIO()
        Image.fromarray(photo).save(file, "JPEG", quality=JPEG_QUALITY)
        decoded.append(np.asarray(Image.open(file, formats=("JPEG",))))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2) / 255


def _blended(kind: int, factor: float) -> Callable[[Tensor], Tensor]:
    def change(pixels: Tensor) -> Tensor:
        return blend_(pixels / 255, torch.full((len(pixels),), kind), torch.full((len(pixels),), factor))

    return change


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    f"centre crop {CROP_SIDE:.0%}": centre_crop,
    f"blur sigma {BLUR_SIGMA:g}": lambda x: gaussian_blur(x / 255, torch.full((len(x),), BLUR_SIGMA)),
    f"brightness x{BRIGHTER}": _blended(BRIGHTNESS, BRIGHTER),
    f"contrast x{FLATTER}": _blended(CONTRAST, FLATTER),
    f"saturation x{PALER}": _blended(SATURATION, PALER),
    f"hue +{HUE_TURN}": lambda x: adjust_hue_(x / 255, torch.full((len(x),), HUE_TURN)),
    "grey": lambda x: grayscale(x / 255).expand(-1, 3, -1, -1),
    f"JPEG quality {JPEG_QUALITY}": jpeg,
}
"""The image changes, keyed by name. Each takes uint8 [b, 3, s, s] on the CPU and returns float [b, 3, s, s] in 0..1."""


def _squares(
    photos: Sequence[Path | Photo], spec: PreprocessSpec, workers: int, skipped: list[Skipped]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each image and the network's input for it, before normalisation, as uint8 [3, s, s].

    Unreadable images are added to `skipped`.
    """
    plain = spec.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})  # 0..1, not normalised

    def read(photo: Path | Photo) -> tuple[str, Tensor] | Skipped:
        try:
            return name_of(photo), torch.from_numpy(read_pixels(photo, plain)).mul_(255).round_().byte()
        except ValueError as error:
            return Skipped(name_of(photo), str(error))

    for outcome in in_order(read, photos, workers):
        if isinstance(outcome, Skipped):
            skipped.append(outcome)
        else:
            yield outcome


@torch.no_grad()
def robustness(
    model: DinoVisionTransformer,
    photos: Sequence[Path | Photo],
    spec: PreprocessSpec,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Measure how much each of the image changes in `CHANGES` affects the class token.

    There are two metrics for each change. `cosine` is the mean cosine similarity between an image and its changed
    version. `recall@1` is the share of changed images for which the most similar unchanged image is their own original.

    Args:
        model: the network; its mode (train or eval) is restored afterwards.
        photos: images, at least two of them readable; labels are not needed.
        spec: preprocessing with a crop, because all inputs must be squares of one size.
        batch_size: number of images in a batch.
        workers: number of threads that read images; None: one per CPU, at most 8.
        advance: called with the number of images of each batch.

    Returns:
        a dictionary that can be stored as JSON: `photos` (number of images used), `skipped` (number of unreadable
        images), `other_photos_cosine` (mean cosine over pairs of different unchanged images), `changes` (a dictionary
        that maps each change's name to its `cosine` and `recall@1`), and `mean` (the means of `cosine` and `recall@1`
        over the changes).

    Raises:
        ValueError: `spec` has no crop, fewer than two images are readable, or the class token of an image is not
            finite.
    """
    if spec.crop is None:
        raise ValueError("robustness needs preprocessing with a crop, so that all images are squares of one size")
    was_training, device = model.training, model.cls_token.device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (spec.mean, spec.std))

    def features(names: Sequence[str], pixels: Tensor) -> Tensor:
        """Compute the class tokens, [b, D], of images, float [b, 3, s, s] in 0..1, with the names [b]."""
        [(_, cls)] = model.get_intermediate_layers((pixels.to(device) - mean) / std, n=1, return_class_token=True)
        check_features(cls, names, model)
        return cls.float().cpu()

    clean, changed, skipped = list[Tensor](), {name: list[Tensor]() for name in CHANGES}, list[Skipped]()
    model.eval()
    try:
        squares = _squares(photos, spec, workers or default_workers(), skipped)
        while batch := list(islice(squares, batch_size)):
            names, pixels = [name for name, _ in batch], torch.stack([square for _, square in batch])
            clean.append(features(names, pixels / 255))
            for name, change in CHANGES.items():
                changed[name].append(features(names, change(pixels)))
            advance(len(pixels))
    finally:
        model.train(was_training)
    advance(len(skipped))
    n = sum(map(len, clean))
    if n < 2:
        first = f"; the first: {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"robustness needs at least two images that can be read, not {n} of {len(photos)}{first}")
    return _figures(torch.cat(clean), {name: torch.cat(parts) for name, parts in changed.items()}, len(skipped))


def _figures(clean: Tensor, changed: dict[str, Tensor], n_skipped: int) -> dict[str, Any]:
    """Compute the result of `robustness` from class tokens.

    `clean` [n, D] contains the tokens of the unchanged images. `changed` maps the name of each change to the tokens
    of the changed images, [n, D].
    """
    n, rows = len(clean), F.normalize(clean, dim=1)
    figures = {name: _kept(rows, F.normalize(tokens, dim=1)) for name, tokens in changed.items()}
    # The sum of the cosines of all pairs, including each image with itself, is the squared length of the sum of rows.
    others = (rows.double().sum(dim=0).square().sum() - n) / (n * (n - 1))
    return {
        "photos": n,
        "skipped": n_skipped,
        "other_photos_cosine": float(others),
        "changes": figures,
        "mean": {key: sum(f[key] for f in figures.values()) / len(figures) for key in ("cosine", "recall@1")},
    }


def _kept(clean: Tensor, changed: Tensor) -> dict[str, float]:
    """Compute `cosine` and `recall@1` for one kind of change from L2-normalised class tokens.

    `clean` [n, D] contains the tokens of the unchanged images, and `changed` [n, D] those of the changed images.
    """
    _, neighbours = nearest(clean, changed, 1)  # [n, 1]
    return {
        "cosine": float((clean * changed).sum(dim=1).mean()),
        "recall@1": float((neighbours[:, 0] == torch.arange(len(clean))).double().mean()),
    }

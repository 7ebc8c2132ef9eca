"""Image features from a frozen model, optionally cached on disk. Threads read the images.

Every evaluation except segmentation and depth starts from the class tokens of the last blocks and the mean patch token
of the last block. Each image has so few of these features that the features of a whole data set fit into memory. One
pass over the images serves k-NN, logistic regression, the linear probe and retrieval. Unreadable images are skipped and
listed.

Legend: n images, b images in a batch, L blocks, D width, N patches, h x w pixels of the network's input.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint import save_safetensors
from model.cpus import available_cpus
from model.pooling import PATCH_PARTS, Pooling, pool
from model.preprocess import PreprocessSpec, preprocess
from model.vit import DinoVisionTransformer
from training.data.dataset import Photo, Skipped, read_photo
from training.evaluate.meaning import not_finite
from training.ordered import Item, Result, ordered

Box = tuple[float, float, float, float]  # x, y, width, height in pixels of the image
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class ImageFeatures:
    """The features of the n images that could be read, float32 on the CPU.

    `kept` [n] contains the positions of these images among all requested images. `cls` [n, L, D] contains the class
    tokens of the last L blocks, with the last block last. `patch_parts` maps each name in `model.pooling.PATCH_PARTS`
    to vectors [n, D] that are computed from the patch tokens of the last block. `skipped` lists the images that could
    not be read.
    """

    kept: Tensor
    cls: Tensor
    patch_parts: dict[str, Tensor]
    skipped: list[Skipped]

    def pooled(self, pooling: Pooling) -> Tensor:
        """Return one vector per image, as a tensor with n rows.

        `pooling` selects the class token, the mean patch token or both. If both are selected, the two vectors are
        L2-normalised and concatenated.
        """
        parts = {"cls": self.cls[:, -1], **self.patch_parts}
        return pool(parts, pooling, unit=partial(F.normalize, dim=-1), join=partial(torch.cat, dim=-1))


def read_pixels(path: Path | Photo, spec: PreprocessSpec, box: Box | None = None) -> npt.NDArray[np.float32]:
    """Return the network's input, [3, h, w], for an image or for the part of it inside `box`.

    Raises:
        ValueError: the image cannot be read, or the box contains no pixel of the image.
    """
    photo = read_photo(path)
    if box is not None:
        height, width = photo.shape[:2]
        left, top = max(0, round(box[0])), max(0, round(box[1]))
        right, bottom = min(width, round(box[0] + box[2])), min(height, round(box[1] + box[3]))
        if left >= right or top >= bottom:
            raise ValueError(
                f"box {box} (x, y, width, height) contains no pixel of {path}, which has {height}x{width} pixels"
            )
        photo = photo[top:bottom, left:right]
    return preprocess(photo, spec)


def name_of(photo: Path | Photo) -> str:
    """Return the name of an image for messages. The name of a file is its path."""
    return str(photo) if isinstance(photo, Path) else photo.name


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield the result of `work(item)` for each of `items`, in order.

    `workers` threads compute the results ahead of time, up to 4 per thread. Pillow releases the interpreter's lock
    while it decodes and resizes, so reading images overlaps with the forward pass.
    """
    return ordered(work, items, workers, ahead=4 * workers)


def _batches(
    photos: Sequence[tuple[Path | Photo, Box | None]],
    spec: PreprocessSpec,
    batch_size: int,
    workers: int,
    skipped: list[Skipped],
) -> Iterator[tuple[list[int], npt.NDArray[np.float32]]]:
    """Yield batches of network inputs that have the same size.

    A batch is two values: the positions of its images in `photos`, and the inputs [b, 3, h, w]. Unreadable images are
    added to `skipped`.
    """

    def read(photo: tuple[Path | Photo, Box | None]) -> npt.NDArray[np.float32] | Skipped:
        try:
            return read_pixels(photo[0], spec, photo[1])
        except ValueError as error:
            return Skipped(name_of(photo[0]), str(error))

    waiting: dict[tuple[int, ...], list[tuple[int, npt.NDArray[np.float32]]]] = {}
    for index, pixels in enumerate(in_order(read, photos, workers)):
        if isinstance(pixels, Skipped):
            skipped.append(pixels)
            continue
        same_size = waiting.setdefault(pixels.shape, [])
        same_size.append((index, pixels))
        if len(same_size) == batch_size:
            yield [i for i, _ in same_size], np.stack([p for _, p in same_size])
            same_size.clear()
    for rest in waiting.values():
        if rest:
            yield [i for i, _ in rest], np.stack([p for _, p in rest])


def check_features(features: Tensor, names: Sequence[str], model: DinoVisionTransformer) -> None:
    """Check that the features of b images are finite. `features` [b, ...] and `names` [b] are in the same order.

    Raises:
        ValueError: a feature is NaN or infinite. The message names the first such image and, if there is one, a
            parameter of the model that contains such values.
    """
    broken = ~torch.isfinite(features.flatten(1)).all(dim=1)
    if not broken.any():
        return
    cause = not_finite(dict(model.named_parameters()))
    raise ValueError(
        f"the features of {names[int(broken.nonzero()[0])]} are NaN or infinite"
        + (f": the model's tensor {cause}" if cause else ", although the weights are finite: the model cannot be used")
    )


def default_workers() -> int:
    """Return the default number of threads that read images."""
    return min(8, available_cpus())


def _photos(paths: Sequence[Path | Photo], boxes: Sequence[Box | None] | None) -> list[tuple[Path | Photo, Box | None]]:
    assert boxes is None or len(boxes) == len(paths)
    return list(zip(paths, boxes or [None] * len(paths), strict=True))


@dataclass(frozen=True)
class ForwardSettings:
    """The settings of a forward pass over images. Batch size and number of threads do not affect the result.

    `workers` is the number of threads that read images; None means one per CPU, at most 8. If `precision` is "bf16",
    the forward pass runs in bfloat16 autocast.
    """

    batch_size: int = 64
    workers: int | None = None
    precision: Precision = "fp32"


FORWARD = ForwardSettings()


@torch.no_grad()  # not inference_mode, because probes are trained on the result
def compute_features(
    model: DinoVisionTransformer,
    paths: Sequence[Path | Photo],
    spec: PreprocessSpec,
    *,
    n_blocks: int = 1,
    boxes: Sequence[Box | None] | None = None,
    forward: ForwardSettings = FORWARD,
    advance: Callable[[int], object] = lambda count: None,
) -> ImageFeatures:
    """Compute features of images, in order, on the model's device.

    Args:
        model: the network; its mode (train or eval) is restored afterwards.
        paths: the images.
        spec: preprocessing.
        n_blocks: number of blocks, counted from the last, whose class tokens are returned. Each token passes through
            the network's final norm, as in Meta's probes.
        boxes: the part of each image to use, or None for the whole image. If `boxes` is None, all images are used
            whole.
        forward: batch size, threads and precision.
        advance: called with the number of images of each batch.

    Raises:
        ValueError: the model has fewer than `n_blocks` blocks, no image could be read, or the features of an image are
            not finite.
    """
    was_training, device = model.training, model.cls_token.device
    model.eval()
    cls = torch.empty(len(paths), n_blocks, model.embed_dim)
    patch_parts = {name: torch.empty(len(paths), model.embed_dim) for name in PATCH_PARTS}
    read = torch.zeros(len(paths), dtype=torch.bool)
    skipped: list[Skipped] = []
    workers = forward.workers or default_workers()
    batches = _batches(_photos(paths, boxes), spec, forward.batch_size, workers, skipped)
    try:
        for positions, pixels in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=forward.precision == "bf16"):
                layers = model.get_intermediate_layers(
                    torch.from_numpy(pixels).to(device), n=n_blocks, return_class_token=True
                )
            cls[positions] = torch.stack([token for _, token in layers], dim=1).float().cpu()
            for name, part in PATCH_PARTS.items():
                patch_parts[name][positions] = part(layers[-1][0].float()).cpu()
            for tensor in (cls, *patch_parts.values()):
                check_features(tensor[positions], [name_of(paths[index]) for index in positions], model)
            read[positions] = True
            advance(len(positions))
    finally:
        model.train(was_training)
    advance(len(skipped))
    if skipped and not read.any():
        raise ValueError(
            f"none of {len(paths)} images could be read; the first: {skipped[0].name}: {skipped[0].reason}"
        )
    kept = read.nonzero().flatten()
    if skipped:
        cls, patch_parts = cls[kept], {name: part[kept] for name, part in patch_parts.items()}
    return ImageFeatures(kept, cls, patch_parts, skipped)


def cache_key(
    model_digest: str,
    spec: PreprocessSpec,
    paths: Sequence[Path | Photo],
    boxes: Sequence[Box | None] | None,
    precision: str,
) -> str:
    """Compute a sha256 (64 hex digits) of everything that determines the features.

    The hash covers the model, the preprocessing, the precision, the boxes and, for each image, its size in bytes and
    its name or path. The contents of the images are not read, so the hash does not change if an image is replaced with
    one that has exactly the same number of bytes.
    """
    digest = hashlib.sha256(f"{model_digest}\n{json.dumps(spec.model_dump(mode='json'))}\n{precision}\n".encode())
    for path, box in zip(paths, boxes or [None] * len(paths), strict=True):
        if isinstance(path, Photo):
            name, size = path.name, path.source.fingerprint(path.index)
        else:
            name, size = str(path.absolute()), str(path.stat().st_size if path.is_file() else -1)
        digest.update(f"{name}\0{size}\0{box}\n".encode())
    return digest.hexdigest()


def _save(path: Path, features: ImageFeatures) -> None:
    skipped = json.dumps([[s.name, s.reason] for s in features.skipped])
    tensors = {"kept": features.kept, "cls": features.cls, **features.patch_parts}
    save_safetensors(path, tensors, {"skipped": skipped})


def _load(path: Path, n_blocks: int) -> ImageFeatures | None:
    """Load features from a cache file.

    Return None if the file is missing or damaged, if it contains features that are not finite, or if it has the class
    tokens of fewer than `n_blocks` blocks.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            skipped = [Skipped(p, reason) for p, reason in json.loads(file.metadata()["skipped"])]
            kept, cls = file.get_tensor("kept"), file.get_tensor("cls")
            patch_parts = {name: file.get_tensor(name) for name in PATCH_PARTS}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    if not_finite({"cls": cls, **patch_parts}):  # computing the features again fails with the name of an image
        return None
    return ImageFeatures(kept, cls[:, -n_blocks:], patch_parts, skipped) if cls.shape[1] >= n_blocks else None


@dataclass(frozen=True)
class FeatureCache:
    """A folder in which the features of one model are cached, and the digest of the model."""

    folder: Path
    model_digest: str


def cached_features(
    cache: FeatureCache | None,
    model: DinoVisionTransformer,
    paths: Sequence[Path | Photo],
    spec: PreprocessSpec,
    *,
    n_blocks: int = 1,
    boxes: Sequence[Box | None] | None = None,
    forward: ForwardSettings = FORWARD,
    advance: Callable[[int], object] = lambda count: None,
) -> ImageFeatures:
    """Load features from the cache, or compute them with `compute_features` and store them in the cache.

    If `cache` is None, features are always computed and never stored. The other arguments are those of
    `compute_features`.

    Raises:
        ValueError: as in `compute_features`.
        OSError: the cache cannot be written.
    """
    file = None
    if cache is not None:
        file = cache.folder / f"{cache_key(cache.model_digest, spec, paths, boxes, forward.precision)}.safetensors"
        stored = _load(file, n_blocks)
        if stored is not None:
            advance(len(paths))
            return stored
    features = compute_features(model, paths, spec, n_blocks=n_blocks, boxes=boxes, forward=forward, advance=advance)
    if file is not None:
        _save(file, features)
    return features

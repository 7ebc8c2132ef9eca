"""Linear segmentation: a linear layer on patch tokens predicts the class of each pixel.

The protocol follows the DINOv2 paper (section 7.4; facebookresearch/dinov2, `dinov2/eval/segmentation`). The head is
batch normalisation and a 1x1 convolution. Its input is the patch tokens of the last block (the paper's "linear") or of
the last four blocks (the paper's "+ms", but without its larger images and test-time augmentation). It is trained with
cross-entropy and AdamW, with learning rate 1e-3 and weight decay 1e-3. Logits are enlarged bilinearly to the size of
the mask. Predictions are scored at the original size of the masks, because shrinking the masks would change the scores.
The paper trains on random crops of 512 pixels and tests with a sliding window. This module uses each image whole,
without augmentation.

mIoU is computed from one confusion matrix for the whole val set. It is the mean over the classes that occur in the
masks or are predicted.

Legend: C classes, h x w patches, H x W pixels of a mask, F features of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from training.evaluate.dense import Advance, DenseData, HeadTraining, train_head
from training.evaluate.meaning import NoMeaning

IGNORE = 255
SUFFIXES = (".png",)


@dataclass(frozen=True)
class SegmentationReport:
    """The scores of a segmentation head on val, and the last training loss.

    `iou` contains the intersection over union of each class, or nan for a class that is neither in the masks nor
    predicted. `not_in_train` is the number of classes that occur only in the masks of val. Their IoU is 0.
    """

    mean_iou: float
    pixel_accuracy: float
    mean_accuracy: float
    iou: list[float]
    loss: float
    not_in_train: int = 0


def read_mask(path: Path, *, zero_is_ignored: bool = False) -> Tensor:
    """Read class numbers, uint8 [H, W], from an indexed or gray PNG. The number 255 marks pixels to ignore.

    Args:
        path: the file.
        zero_is_ignored: True if 0 also marks pixels to ignore, as in ADE20k's masks. Class 1 then becomes 0, class 2
            becomes 1, and so on.

    Raises:
        ValueError: the file cannot be read, or it is not an indexed or 8-bit gray image.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise ValueError(f"a mask is an indexed or 8-bit gray PNG, not one of mode {image.mode}")
            mask = torch.from_numpy(np.array(image, dtype=np.uint8))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return torch.where((mask == 0) | (mask == IGNORE), IGNORE, mask - 1) if zero_is_ignored else mask


def classes_in(data: DenseData, n_classes: int | None = None) -> set[int]:
    """Return the class numbers that occur in the masks. Pixels to ignore do not count.

    Raises:
        ValueError: a mask contains a class number that is not below `n_classes`.
    """
    classes = set[int]()
    for pair in data.pairs:
        classes |= set(data.read_target(pair.target).unique().tolist()) - {IGNORE}
        if n_classes is not None and classes and max(classes) >= n_classes:
            raise ValueError(
                f"{pair.target} has class {max(classes)}, but classes={n_classes} allows 0 to {n_classes - 1}"
            )
    return classes


def count_classes(data: Sequence[DenseData], n_classes: int | None = None) -> int:
    """Return the number of classes: `n_classes` or, if it is None, one more than the largest class number in the masks.

    Raises:
        ValueError: the masks have only ignored pixels, or a mask contains a class number that is not below `n_classes`.
    """
    classes = set[int]().union(*(classes_in(part, n_classes) for part in data))
    if not classes:
        raise ValueError(f"the masks have only ignored pixels ({IGNORE})")
    return max(classes) + 1 if n_classes is None else n_classes


def check_masks(in_train: set[int], in_val: set[int]) -> None:
    """Check that the scores on val can differ between models. The arguments are the class numbers in the masks.

    Raises:
        NoMeaning: the masks of a part have only ignored pixels, the masks of train have one class, or no class of val
            occurs in train.
    """
    for part, classes in (("train", in_train), ("val", in_val)):
        if not classes:
            raise NoMeaning(f"the masks of {part} have only ignored pixels ({IGNORE})")
    if len(in_train) < 2:
        raise NoMeaning(
            f"the masks of train have 1 class ({min(in_train)}), but a segmentation needs at least 2: the head would "
            "predict this class everywhere, whatever the model"
        )
    if not in_train & in_val:
        raise NoMeaning(
            f"none of the {len(in_val)} classes in the masks of val is among the {len(in_train)} classes in those of "
            "train: every model would score 0.0 %"
        )


class LinearSegmenter(nn.Module):
    """A segmentation head: batch normalisation and a 1x1 convolution on patch tokens.

    The convolution is computed as a linear layer, so that images of different sizes can be in one batch.
    """

    def __init__(self, dim: int, n_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, n_classes)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.linear.weight.copy_(0.01 * torch.randn(n_classes, dim, generator=draw))
            self.linear.bias.zero_()

    def forward(self, tokens: list[Tensor]) -> list[Tensor]:
        """Compute the logits, [C, h, w] for C classes, of each image from its tokens [h, w, F].

        In training, batch normalisation uses statistics over the patches of all images in the batch.
        """
        flat = torch.cat([photo.flatten(0, 1) for photo in tokens])  # [patches of the batch, F]
        logits = self.linear(self.bn(flat)).split([photo.shape[0] * photo.shape[1] for photo in tokens])
        return [part.T.reshape(-1, *photo.shape[:2]) for part, photo in zip(logits, tokens, strict=True)]


def segmentation_loss(logits: list[Tensor], masks: list[Tensor]) -> Tensor:
    """Compute the mean cross-entropy over the labelled pixels of a batch.

    The logits of each image, [C, h, w] for C classes, are first enlarged to the size of its mask [H, W].
    """
    total = logits[0].new_zeros(())
    count = 0
    for photo, mask in zip(logits, masks, strict=True):
        large = F.interpolate(photo[None], size=tuple(mask.shape), mode="bilinear", align_corners=False)
        total = total + F.cross_entropy(large, mask[None].long(), ignore_index=IGNORE, reduction="sum")
        count += int((mask != IGNORE).sum())
    return total / max(1, count)


def predict(logits: Tensor, size: tuple[int, int], classes_at_once: int = 16) -> Tensor:
    """Enlarge logits to `size`, and return the class with the largest logit at each pixel, int64 [H, W].

    Masks may be large, so only `classes_at_once` classes are enlarged at a time.

    Args:
        logits: logits of C classes, [C, h, w].
        size: height and width (H, W) of the result.
        classes_at_once: number of classes to enlarge at a time.
    """
    best = torch.full(size, -torch.inf, device=logits.device)
    where = torch.zeros(size, dtype=torch.long, device=logits.device)
    for first in range(0, len(logits), classes_at_once):
        part = logits[None, first : first + classes_at_once]
        values, index = F.interpolate(part, size=size, mode="bilinear", align_corners=False)[0].max(dim=0)
        better = values > best
        best, where = torch.where(better, values, best), torch.where(better, index + first, where)
    return where


def confusion_matrix(predicted: Tensor, mask: Tensor, n_classes: int) -> Tensor:
    """Count the pixels for each true class (row) and predicted class (column), int64 [n_classes, n_classes].

    Pixels that the mask marks as ignored do not count.
    """
    labelled = mask != IGNORE
    pairs = mask[labelled].long() * n_classes + predicted[labelled]
    return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)


def iou_of(confusion: Tensor) -> Tensor:
    """Compute the intersection over union of each of C classes, float64 [C], from a confusion matrix [C, C].

    The value is nan for a class that neither occurs in the masks nor is predicted.
    """
    counts = confusion.double()
    hits = counts.diagonal()
    return hits / (counts.sum(0) + counts.sum(1) - hits)


def fit_segmentation(
    train: DenseData, training: HeadTraining, n_classes: int, advance: Advance = lambda count: None
) -> tuple[LinearSegmenter, float]:
    """Train a linear head on the tokens of `train`, and return the head and the loss of the last iteration.

    The arguments are those of `evaluate_segmentation`.

    Raises:
        FloatingPointError: the head's loss is not finite.
    """
    first = train[0][0]
    head = LinearSegmenter(first.shape[-1], n_classes, training.seed).to(first.device)

    def loss_of(tokens: list[Tensor], masks: list[Tensor]) -> Tensor:
        return segmentation_loss(head(tokens), masks)

    return head, train_head(head, train, loss_of, training, advance)


@torch.no_grad()
def score_segmentation(head: LinearSegmenter, val: DenseData, n_classes: int, loss: float) -> SegmentationReport:
    """Score a head on `val` at the original size of each mask. `loss` is the last training loss."""
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.long)
    for index, pair in enumerate(val.pairs):
        mask = val.read_target(pair.target)
        logits = head([val[index][0]])[0]
        confusion += confusion_matrix(predict(logits, (mask.shape[0], mask.shape[1])).cpu(), mask, n_classes)
    iou, counts = iou_of(confusion), confusion.double()
    recall = counts.diagonal() / counts.sum(1)
    return SegmentationReport(
        mean_iou=iou.nanmean().item(),
        pixel_accuracy=(counts.diagonal().sum() / counts.sum()).item(),
        mean_accuracy=recall.nanmean().item(),
        iou=iou.tolist(),
        loss=loss,
    )


def evaluate_segmentation(
    train: DenseData,
    val: DenseData,
    training: HeadTraining,
    *,
    n_classes: int | None = None,
    advance: Advance = lambda count: None,
) -> SegmentationReport:
    """Train a linear head on the tokens of `train`, and score it on `val` at the original size of each mask.

    Args:
        train: training data, with masks from `read_mask`.
        val: data to score on, with masks from `read_mask`.
        training: iterations, batch size, learning rate, weight decay and seed.
        n_classes: number of classes; None: one more than the largest class number in the masks.
        advance: called with 1 after each iteration.

    Raises:
        ValueError: a mask contains a class number that is not below `n_classes`.
        NoMeaning: the scores would be the same for every model (see `check_masks`).
        FloatingPointError: the head's loss or a weight of the head is not finite.
    """
    in_train, in_val = classes_in(train, n_classes), classes_in(val, n_classes)
    check_masks(in_train, in_val)
    classes = max(in_train | in_val) + 1 if n_classes is None else n_classes
    head, loss = fit_segmentation(train, training, classes, advance)
    return replace(score_segmentation(head, val, classes, loss), not_in_train=len(in_val - in_train))
